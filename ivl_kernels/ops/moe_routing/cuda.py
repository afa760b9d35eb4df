"""MoE routing and dispatch on NVIDIA GPUs: launches of csrc/cuda/moe_routing.cu."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _cuda
from .op import Dispatch, Routed, Routing, RoutingBackward, Sorting, empty_dispatch, empty_routed

WARPS = 8
SLOTS = 4096  # of one dispatch block, at most


def _lanes(logits: Tensor, top_k: int) -> tuple[int, int]:
    """Lanes of a token, and scores of a lane: 16 of them cost fewer instructions than 16 lanes do."""
    experts = logits.shape[1]
    lanes = max(_power_of_2(-(-experts // 16)), _power_of_2(top_k))
    return lanes, next(n for n in (16 // logits.element_size(), 8, 16) if lanes * n >= experts)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _launch(name: str, logits: Tensor, top_k: int, before: list[Any], after: list[Any]) -> None:
    tokens, experts = logits.shape
    lanes, each = _lanes(logits, top_k)
    kernel = f"{name}_{str(logits.dtype).removeprefix('torch.')}_{each}"
    args = [*before, tokens, experts, top_k, lanes, *after]
    _cuda.launch("moe_routing", kernel, (-(-tokens * lanes // 128),), 128, args)


def moe_routing(a: Routing) -> Routed:
    result = empty_routed(a)
    before = [a.logits.contiguous(), None if a.bias is None else a.bias.contiguous(), *result]
    _launch("moe_routing", a.logits, a.top_k, before, [a.scoring == "topk_then_softmax", a.renormalize])
    return result


def moe_routing_backward(a: RoutingBackward) -> Tensor:
    out = a.logits.new_empty(a.logits.shape)
    over_all = a.scoring == "softmax_then_topk" and not a.renormalize
    bias = None if a.bias is None else a.bias.contiguous()
    before = [a.grad.contiguous(), a.logits.contiguous(), bias, a.ids.contiguous(), out]
    _launch("moe_routing_backward", a.logits, a.ids.shape[1], before, [over_all])
    return out


def moe_dispatch(a: Sorting) -> Dispatch:
    """One launch up to 4,096 slots, two beyond: each block counts its slots, then places them after earlier ones."""
    slots, num_experts, result = a.ids.numel(), a.num_experts, empty_dispatch(a)
    ids, kind = a.ids.contiguous(), str(a.ids.dtype).removeprefix("torch.")
    blocks = max(1, -(-slots // SLOTS))
    warps = min(WARPS, max(1, -(-slots // 128)))
    run = -(-slots // (blocks * warps * 64)) * 64
    shared = 4 * (warps + 3) * (num_experts + 1) + 3 * 2 * warps * run
    block_counts = None
    if blocks > 1:
        block_counts = result.permutation.new_empty(blocks, num_experts + 1)
        args = [ids, slots, num_experts, run, block_counts]
        _cuda.launch("moe_routing", f"moe_dispatch_count_{kind}", (blocks,), 32 * warps, args, shared)
    args = [ids, slots, num_experts, run, block_counts, *result, result.tiles.shape[0], a.tile]
    _cuda.launch("moe_routing", f"moe_dispatch_place_{kind}", (blocks,), 32 * warps, args, shared)
    return result
