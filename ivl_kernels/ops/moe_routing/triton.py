"""MoE routing and dispatch on GPUs without CUDA C++ (AMD): one program a few tokens, or a block of slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import Kernel, cdiv, next_power_of_2
from .op import Dispatch, Routed, Routing, RoutingBackward, Sorting, empty_dispatch, empty_routed

SLOTS = 4096  # of one dispatch program, at most


@triton.jit
def _scores(logits, bias, s, S, E: tl.constexpr, E_POW2: tl.constexpr):
    e = tl.arange(0, E_POW2)
    live = (s < S)[:, None] & (e < E)[None, :]
    score = tl.load(logits + s.to(tl.int64)[:, None] * E + e[None, :], mask=live, other=-float("inf"))
    if bias is not None:
        score += tl.load(bias + e, mask=e < E, other=0.0)[None, :]
    score = score.to(tl.float32)
    return tl.where((s < S)[:, None], score, 0.0)


@Kernel
@triton.jit(do_not_specialize=["S"])
def moe_routing_kernel(
    logits,  # [S, E]
    bias,  # [E] or None
    ids,  # [S, TOP_K], written
    weights,  # [S, TOP_K], written
    S, E: tl.constexpr, TOP_K: tl.constexpr, TOPK_FIRST: tl.constexpr, RENORMALIZE: tl.constexpr,
    K_POW2: tl.constexpr, E_POW2: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    e = tl.arange(0, E_POW2)
    score = _scores(logits, bias, s, S, E, E_POW2)
    if not TOPK_FIRST:
        score = tl.exp(score - tl.max(score, 1)[:, None])
        score = tl.where((e < E)[None, :], score / tl.sum(score, 1)[:, None], -1.0)
    j = tl.arange(0, K_POW2)
    picked = tl.zeros([BS, K_POW2], dtype=tl.int64)
    value = tl.full([BS, K_POW2], -float("inf") if TOPK_FIRST else 0.0, dtype=tl.float32)
    for step in tl.static_range(TOP_K):
        best, expert = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        score = tl.where(e[None, :] == expert[:, None], -float("inf"), score)
        picked = tl.where(j[None, :] == step, expert[:, None].to(tl.int64), picked)
        value = tl.where(j[None, :] == step, best[:, None], value)
    if TOPK_FIRST:
        value = tl.exp(value - tl.max(value, 1)[:, None])
    if TOPK_FIRST or RENORMALIZE:
        value = value / tl.sum(value, 1)[:, None]
    at = s.to(tl.int64)[:, None] * TOP_K + j[None, :]
    mask = (s < S)[:, None] & (j < TOP_K)[None, :]
    tl.store(ids + at, picked, mask=mask)
    tl.store(weights + at, value.to(weights.dtype.element_ty), mask=mask)


@Kernel
@triton.jit(do_not_specialize=["S"])
def moe_routing_backward_kernel(
    grad,  # [S, TOP_K]
    logits,  # [S, E]
    bias,  # [E] or None
    ids,  # [S, TOP_K]
    out,  # [S, E], written
    S, E: tl.constexpr, TOP_K: tl.constexpr, OVER_ALL: tl.constexpr, K_POW2: tl.constexpr, E_POW2: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """OVER_ALL: the softmax ran over all experts; otherwise over the picked ones."""
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    e = tl.arange(0, E_POW2)
    score = _scores(logits, bias, s, S, E, E_POW2)
    picked = tl.zeros([BS, E_POW2], dtype=tl.int1)
    from_out = tl.zeros([BS, E_POW2], dtype=tl.float32)
    choice = tl.arange(0, K_POW2)[None, :]
    at = s.to(tl.int64)[:, None] * TOP_K + choice
    live = (s < S)[:, None] & (choice < TOP_K)
    chosen = tl.load(ids + at, mask=live, other=0).to(tl.int32)
    slope = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
    for j in tl.static_range(TOP_K):
        here = e[None, :] == tl.sum(tl.where(choice == j, chosen, 0), 1)[:, None]
        picked = picked | here
        from_out += tl.where(here, tl.sum(tl.where(choice == j, slope, 0.0), 1)[:, None], 0.0)
    if not OVER_ALL:
        score = tl.where(picked, score, -float("inf"))
    weight = tl.exp(score - tl.max(score, 1)[:, None])
    weight = weight / tl.sum(weight, 1)[:, None]
    value = weight * (from_out - tl.sum(weight * from_out, 1)[:, None])
    at = out + s.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=(s < S)[:, None] & (e < E)[None, :])


@triton.jit
def _experts(ids, first, slots, E: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] from slot `first` on. In pairs: 16 bytes a thread, next to its neighbours', of int64."""
    i = first + 2 * tl.arange(0, BLOCK // 2)[:, None] + tl.arange(0, 2)[None, :]
    expert = tl.load(ids + i, mask=i < slots, other=E)
    return tl.reshape(tl.where((expert < 0) | (expert > E), E, expert).to(tl.int32), [BLOCK])


@Kernel
@triton.jit(do_not_specialize=["S"])
def moe_dispatch_count_kernel(
    ids, block_counts, S, TOP_K: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """block_counts [blocks, ROW]: slots of each expert, and without one, among BLOCK slots."""
    block = tl.program_id(0)
    count = tl.histogram(_experts(ids, block * BLOCK, S * TOP_K, E, BLOCK), E_POW2)
    e = tl.arange(0, E_POW2)
    tl.store(block_counts + block * ROW + e, count, mask=e < ROW)


@Kernel
@triton.jit(do_not_specialize=["S", "num_tiles"])
def moe_dispatch_place_kernel(
    ids,
    block_counts,  # of all blocks, or None: there is one
    permutation, inverse, counts, offsets, tiles, S, num_tiles, TOP_K: tl.constexpr, E: tl.constexpr,
    TILE: tl.constexpr, E_POW2: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    SORT_BACK: tl.constexpr,
):  # fmt: skip
    """Sorted by expert, and back, so that both results are written in runs. Slots past the end sort last."""
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    i = block * BLOCK + place
    expert = _experts(ids, block * BLOCK, S * TOP_K, E, BLOCK)
    order = tl.sort(expert * BLOCK + place)
    at = order % BLOCK
    e = tl.arange(0, E_POW2)
    if block_counts is None:
        total = tl.histogram(expert, E_POW2)
        first = tl.cumsum(total, 0) - total
        row = i
    else:
        total = tl.zeros([E_POW2], dtype=tl.int32)
        before = tl.zeros([E_POW2], dtype=tl.int32)
        for start in range(0, tl.num_programs(0), TILES):
            b = start + tl.arange(0, TILES)
            mask = (b < tl.num_programs(0))[:, None] & (e < ROW)[None, :]
            part = tl.load(block_counts + b[:, None] * ROW + e[None, :], mask=mask, other=0)
            total += tl.sum(part, 0)
            before += tl.sum(tl.where((b < block)[:, None], part, 0), 0)
        here = tl.load(block_counts + block * ROW + e, mask=e < ROW, other=0)
        first = tl.cumsum(total, 0) - total
        shift = first + before - (tl.cumsum(here, 0) - here)
        row = place + tl.gather(shift, order // BLOCK, 0)
    slot = block * BLOCK + at
    tl.store(permutation + row, slot, mask=row < S * TOP_K)
    if SORT_BACK:
        back = tl.sort(at * BLOCK + place) % BLOCK
        if block_counts is not None:
            back += tl.gather(shift, expert, 0)
        tl.store(inverse + i, back, mask=i < S * TOP_K)
    else:
        tl.store(inverse + slot, row, mask=row < S * TOP_K)
    if block == 0:
        tl.store(offsets + e, first, mask=e <= E)
        tl.store(counts + e, total, mask=e < E)
    if TILE > 0:
        needed = tl.where(e < E, (total + TILE - 1) // TILE, 0)
        past = tl.cumsum(needed, 0)
        for start in range(block * TILES, num_tiles, tl.num_programs(0) * TILES):
            t = start + tl.arange(0, TILES)
            # The expert of a tile: as many as have all their tiles before it; E at most.
            owner = tl.sum(((past[None, :] <= t[:, None]) & (e < E)[None, :]).to(tl.int32), 1)
            mine = e[None, :] == owner[:, None]
            begin = tl.sum(tl.where(mine, first[None, :], 0), 1)
            step = tl.sum(tl.where(mine & (e < E)[None, :], t[:, None] - (past - needed)[None, :], 0), 1)
            both = tl.join(owner, begin + step * TILE)
            tl.store(tiles + tl.join(2 * t, 2 * t + 1), both, mask=tl.join(t < num_tiles, t < num_tiles))


def moe_routing(a: Routing) -> Routed:
    S, E = a.logits.shape
    result = empty_routed(a)
    bias = None if a.bias is None else a.bias.contiguous()
    if S:
        width = max(16, next_power_of_2(E))
        rows = max(1, 512 // width)
        moe_routing_kernel[(cdiv(S, rows),)](
            a.logits.contiguous(), bias, *result, S, E=E, TOP_K=a.top_k, TOPK_FIRST=a.scoring == "topk_then_softmax",
            RENORMALIZE=a.renormalize, K_POW2=next_power_of_2(a.top_k), E_POW2=width, BS=rows, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return result


def moe_routing_backward(a: RoutingBackward) -> Tensor:
    S, E = a.logits.shape
    top_k = a.ids.shape[1]
    out = a.logits.new_empty(S, E)
    bias = None if a.bias is None else a.bias.contiguous()
    if S:
        width = max(16, next_power_of_2(E))
        choices = next_power_of_2(top_k)
        rows = max(1, 512 // width, 128 // choices)  # choices for every thread, so that none is loaded twice
        moe_routing_backward_kernel[(cdiv(S, rows),)](
            a.grad.contiguous(), a.logits.contiguous(), bias, a.ids.contiguous(), out, S, E=E, TOP_K=top_k,
            OVER_ALL=a.scoring == "softmax_then_topk" and not a.renormalize, K_POW2=choices,
            E_POW2=width, BS=rows, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def moe_dispatch(a: Sorting) -> Dispatch:
    S, top_k = a.ids.shape
    result = empty_dispatch(a)
    ids, slots = a.ids.contiguous(), S * top_k
    block = min(SLOTS, max(128, next_power_of_2(slots)))
    blocks = max(1, cdiv(slots, block))
    width = next_power_of_2(a.num_experts + 1)
    row = (a.num_experts + 8) // 8 * 8  # whole sectors
    common = dict(
        TOP_K=top_k, E=a.num_experts, E_POW2=width, ROW=row, BLOCK=block, num_warps=max(4, min(8, block // 128)),
        enable_fp_fusion=True,
    )  # fmt: skip
    block_counts = None
    if blocks > 1:
        block_counts = ids.new_empty(blocks, row, dtype=torch.int32)
        moe_dispatch_count_kernel[(blocks,)](ids, block_counts, S, **common)
    # On AMD the masks of two sorts do not fit into scalar registers.
    moe_dispatch_place_kernel[(blocks,)](
        ids, block_counts, *result, S, result.tiles.shape[0], TILE=a.tile,
        TILES=max(4, 4096 // width), SORT_BACK=torch.version.hip is None, **common,
    )  # fmt: skip
    return result
