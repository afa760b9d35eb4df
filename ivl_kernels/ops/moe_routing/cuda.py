"""MoE routing and dispatch on NVIDIA GPUs: launches of csrc/cuda/moe_routing.cu."""

from __future__ import annotations

from typing import Any

import torch

from ... import _cuda

WARPS = 8
SLOTS = 4096  # of one dispatch block, at most


def _lanes(logits: torch.Tensor, top_k: int) -> tuple[int, int]:
    """Lanes of a token, and scores of a lane: 16 of them cost fewer instructions than 16 lanes do."""
    experts = logits.shape[1]
    lanes = max(_power_of_2(-(-experts // 16)), _power_of_2(top_k))
    return lanes, next(n for n in (16 // logits.element_size(), 8, 16) if lanes * n >= experts)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _launch(name: str, logits: torch.Tensor, top_k: int, before: list[Any], after: list[Any]) -> None:
    tokens, experts = logits.shape
    lanes, each = _lanes(logits, top_k)
    kernel = f"{name}_{str(logits.dtype).removeprefix('torch.')}_{each}"
    args = [*before, tokens, experts, top_k, lanes, *after]
    _cuda.launch("moe_routing", kernel, (-(-tokens * lanes // 128),), 128, args)


def moe_routing(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, scoring: str, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = logits.shape[0]
    ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k)
    before = [logits.contiguous(), None if bias is None else bias.contiguous(), ids, weights]
    _launch("moe_routing", logits, top_k, before, [scoring == "topk_then_softmax", renormalize])
    return ids, weights


def moe_routing_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    scoring: str,
    renormalize: bool,
) -> torch.Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    over_all = scoring == "softmax_then_topk" and not renormalize
    before = [
        grad.contiguous(),
        logits.contiguous(),
        None if bias is None else bias.contiguous(),
        ids.contiguous(),
        out,
    ]
    _launch("moe_routing_backward", logits, ids.shape[1], before, [over_all])
    return out


def moe_dispatch(ids: torch.Tensor, num_experts: int, tile: int) -> tuple[torch.Tensor, ...]:
    """One launch up to 4,096 slots, two beyond: each block counts its slots, then places them after earlier ones."""
    slots = ids.numel()
    num_tiles = slots // tile + num_experts if tile else 0
    sizes = ((slots,), (slots,), (num_experts,), (num_experts + 1,), (num_tiles, 2))
    permutation, inverse, counts, offsets, tiles = (ids.new_empty(size, dtype=torch.int32) for size in sizes)
    ids, kind = ids.contiguous(), str(ids.dtype).removeprefix("torch.")
    blocks = max(1, -(-slots // SLOTS))
    warps = min(WARPS, max(1, -(-slots // 128)))
    run = -(-slots // (blocks * warps * 64)) * 64
    shared = 4 * (warps + 3) * (num_experts + 1) + 3 * 2 * warps * run
    block_counts = None
    if blocks > 1:
        block_counts = permutation.new_empty(blocks, num_experts + 1)
        args = [ids, slots, num_experts, run, block_counts]
        _cuda.launch("moe_routing", f"moe_dispatch_count_{kind}", (blocks,), 32 * warps, args, shared)
    args = [ids, slots, num_experts, run, block_counts, permutation, inverse, counts, offsets, tiles, num_tiles, tile]
    _cuda.launch("moe_routing", f"moe_dispatch_place_{kind}", (blocks,), 32 * warps, args, shared)
    return permutation, inverse, counts, offsets, tiles
