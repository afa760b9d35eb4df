"""Mixture-of-experts routing on the CPU: thin calls into csrc/cpu/moe_routing.cpp."""

from __future__ import annotations

import torch

from ... import _native


def moe_routing(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, scoring: str, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = logits.new_empty(logits.shape[0], top_k, dtype=torch.int64)
    weights = logits.new_empty(logits.shape[0], top_k)
    bias = None if bias is None else bias.contiguous()
    _native.op("moe_routing")(logits.contiguous(), bias, scoring == "softmax_then_topk", renormalize, ids, weights)
    return ids, weights


def moe_routing_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    scoring: str,
    renormalize: bool,
) -> torch.Tensor:
    out = logits.new_empty(logits.shape)
    bias = None if bias is None else bias.contiguous()
    softmax_first = scoring == "softmax_then_topk"
    _native.op("moe_routing_backward")(
        grad.contiguous(), logits.contiguous(), bias, ids.contiguous(), softmax_first, renormalize, out
    )
    return out


def moe_dispatch(ids: torch.Tensor, num_experts: int, tile: int) -> tuple[torch.Tensor, ...]:
    slots = ids.numel()
    tiles = slots // tile + num_experts if tile else 0
    sizes = ((slots,), (slots,), (num_experts,), (num_experts + 1,), (tiles, 2))
    results = tuple(ids.new_empty(size, dtype=torch.int32) for size in sizes)
    _native.op("moe_dispatch")(ids.long().contiguous(), tile, *results)
    return results
