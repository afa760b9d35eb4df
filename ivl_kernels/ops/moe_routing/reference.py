"""Mixture-of-experts routing in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Dispatch, Routed, Routing, RoutingBackward, Sorting


def _scores(a: Routing | RoutingBackward) -> Tensor:
    logits = a.logits if a.bias is None else a.logits + a.bias
    return logits if logits.dtype == torch.float64 else logits.float()


def moe_routing(a: Routing) -> Routed:
    scores = _scores(a)
    if a.scoring == "softmax_then_topk":
        scores = scores.softmax(-1)
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, : a.top_k], order[:, : a.top_k].contiguous()
    if a.scoring == "topk_then_softmax":
        values = values.softmax(-1)
    elif a.renormalize:
        values = values / values.sum(-1, keepdim=True)
    return Routed(ids, values.to(a.logits.dtype).contiguous())


def moe_routing_backward(a: RoutingBackward) -> Tensor:
    """Gradient of the logits [S, E]. A renormalised softmax is the softmax over the picked logits."""
    scores = _scores(a)
    grad = a.grad.to(scores.dtype)
    if a.scoring == "softmax_then_topk" and not a.renormalize:
        probabilities = scores.softmax(-1)
        picked = grad * probabilities.gather(1, a.ids)
        out = -probabilities * picked.sum(-1, keepdim=True)
        return out.scatter_add_(1, a.ids, picked).to(a.logits.dtype)
    weights = scores.gather(1, a.ids).softmax(-1)
    picked = weights * (grad - (grad * weights).sum(-1, keepdim=True))
    return torch.zeros_like(scores).scatter_(1, a.ids, picked).to(a.logits.dtype)


def moe_dispatch(a: Sorting) -> Dispatch:
    flat, experts, tile = a.ids.reshape(-1).long(), a.num_experts, a.tile
    flat = torch.where((flat < 0) | (flat > experts), experts, flat)
    permutation = flat.argsort(stable=True)
    rows = torch.arange(flat.shape[0], device=flat.device)
    inverse = torch.empty_like(permutation).scatter_(0, permutation, rows)
    counts = flat.new_zeros(experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[:experts]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    tiles = flat.new_empty(0, 2)
    if tile:
        ends = ((counts + tile - 1) // tile).cumsum(0)
        index = torch.arange(flat.shape[0] // tile + experts, device=flat.device)
        expert = torch.searchsorted(ends, index, right=True)
        starts = torch.nn.functional.pad(ends, (1, 0))
        first = torch.where(expert < experts, offsets[expert] + (index - starts[expert]) * tile, offsets[-1])
        tiles = torch.stack([expert, first], 1)
    return Dispatch(*(t.int() for t in (permutation, inverse, counts, offsets, tiles)))
