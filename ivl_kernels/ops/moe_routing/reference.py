"""Mixture-of-experts routing in plain torch."""

from __future__ import annotations

import torch


def _scores(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        logits = logits + bias
    return logits if logits.dtype == torch.float64 else logits.float()


def moe_routing(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, scoring: str, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(logits, bias)
    if scoring == "softmax_then_topk":
        scores = scores.softmax(-1)
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :top_k], order[:, :top_k].contiguous()
    if scoring == "topk_then_softmax":
        values = values.softmax(-1)
    elif renormalize:
        values = values / values.sum(-1, keepdim=True)
    return ids, values.to(logits.dtype).contiguous()


def moe_routing_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    scoring: str,
    renormalize: bool,
) -> torch.Tensor:
    """Gradient of the logits [S, E]. A renormalised softmax is the softmax over the picked logits."""
    scores = _scores(logits, bias)
    grad = grad.to(scores.dtype)
    if scoring == "softmax_then_topk" and not renormalize:
        probabilities = scores.softmax(-1)
        picked = grad * probabilities.gather(1, ids)
        out = -probabilities * picked.sum(-1, keepdim=True)
        return out.scatter_add_(1, ids, picked).to(logits.dtype)
    weights = scores.gather(1, ids).softmax(-1)
    picked = weights * (grad - (grad * weights).sum(-1, keepdim=True))
    return torch.zeros_like(scores).scatter_(1, ids, picked).to(logits.dtype)


def moe_dispatch(ids: torch.Tensor, num_experts: int, tile: int) -> tuple[torch.Tensor, ...]:
    flat = ids.reshape(-1).long()
    flat = torch.where((flat < 0) | (flat > num_experts), num_experts, flat)
    permutation = flat.argsort(stable=True)
    rows = torch.arange(flat.shape[0], device=flat.device)
    inverse = torch.empty_like(permutation).scatter_(0, permutation, rows)
    counts = flat.new_zeros(num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    tiles = flat.new_empty(0, 2)
    if tile:
        ends = ((counts + tile - 1) // tile).cumsum(0)
        index = torch.arange(flat.shape[0] // tile + num_experts, device=flat.device)
        expert = torch.searchsorted(ends, index, right=True)
        starts = torch.nn.functional.pad(ends, (1, 0))
        first = torch.where(expert < num_experts, offsets[expert] + (index - starts[expert]) * tile, offsets[-1])
        tiles = torch.stack([expert, first], 1)
    return tuple(t.int() for t in (permutation, inverse, counts, offsets, tiles))
