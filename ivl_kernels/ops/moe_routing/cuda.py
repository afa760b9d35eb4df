"""MoE routing and dispatch on NVIDIA GPUs: launches of csrc/cuda/moe_routing.cu."""

from __future__ import annotations

import torch

from ... import _cuda

WARPS = 8
SLOTS = 4096  # of one dispatch block, at most


def _kernel(name: str, logits: torch.Tensor) -> str:
    count = next(n for n in (1, 4, 16) if logits.shape[1] <= 32 * n)
    return f"{name}_{str(logits.dtype).removeprefix('torch.')}_{count}"


def moe_routing(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, scoring: str, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, experts = logits.shape
    ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k)
    args = [
        logits.contiguous(),
        None if bias is None else bias.contiguous(),
        ids,
        weights,
        tokens,
        experts,
        top_k,
        scoring == "topk_then_softmax",
        renormalize,
    ]
    _cuda.launch("moe_routing", _kernel("moe_routing", logits), (-(-tokens // 4),), 128, args)
    return ids, weights


def moe_routing_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    scoring: str,
    renormalize: bool,
) -> torch.Tensor:
    tokens, experts = logits.shape
    out = torch.empty(tokens, experts, dtype=logits.dtype, device=logits.device)
    over_all = scoring == "softmax_then_topk" and not renormalize
    args = [
        grad.contiguous(),
        logits.contiguous(),
        None if bias is None else bias.contiguous(),
        ids.contiguous(),
        out,
        tokens,
        experts,
        ids.shape[1],
        over_all,
    ]
    _cuda.launch("moe_routing", _kernel("moe_routing_backward", logits), (-(-tokens // 4),), 128, args)
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
    run = -(-slots // (blocks * warps * 32)) * 32
    block_counts = None
    if blocks > 1:
        block_counts = permutation.new_empty(blocks, num_experts + 1)
        args = [ids, slots, num_experts, run, block_counts]
        shared = 4 * warps * (num_experts + 1)
        _cuda.launch("moe_routing", f"moe_dispatch_count_{kind}", (blocks,), 32 * warps, args, shared)
    args = [ids, slots, num_experts, run, block_counts, permutation, inverse, counts, offsets, tiles, num_tiles, tile]
    shared = 4 * (warps + 2) * (num_experts + 1)
    _cuda.launch("moe_routing", f"moe_dispatch_place_{kind}", (blocks,), 32 * warps, args, shared)
    return permutation, inverse, counts, offsets, tiles
