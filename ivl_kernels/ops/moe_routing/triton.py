"""MoE routing and dispatch on GPUs without CUDA C++ (AMD): one program a few tokens, or a block of slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _scores(logits, bias, s, S, E: tl.constexpr, E_POW2: tl.constexpr):
    e = tl.arange(0, E_POW2)
    live = (s < S)[:, None] & (e < E)[None, :]
    score = tl.load(logits + s.to(tl.int64)[:, None] * E + e[None, :], mask=live, other=-float("inf"))
    if bias is not None:
        score += tl.load(bias + e, mask=e < E, other=0.0)[None, :]
    score = score.to(tl.float32)
    return tl.where((s < S)[:, None], score, 0.0)


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
def _expert(ids, i, slots, E: tl.constexpr):
    expert = tl.load(ids + i, mask=i < slots, other=E)
    return tl.where((expert < 0) | (expert > E), E, expert).to(tl.int32)


@triton.jit(do_not_specialize=["slots"])
def moe_dispatch_count_kernel(
    ids, block_counts, slots, E: tl.constexpr, E_POW2: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """block_counts [blocks, E + 1]: slots of each expert, and without one, among BLOCK slots."""
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    count = tl.histogram(_expert(ids, i, slots, E), E_POW2)
    e = tl.arange(0, E_POW2)
    # Slots past the end were counted as slots without an expert.
    count -= tl.where(e == E, tl.maximum((block + 1) * BLOCK - slots, 0), 0)
    tl.store(block_counts + block * (E + 1) + e, count, mask=e <= E)


@triton.jit(do_not_specialize=["blocks", "num_tiles"])
def moe_dispatch_scan_kernel(
    block_counts, counts, offsets, tiles, blocks, num_tiles, E: tl.constexpr, TILE: tl.constexpr, E_POW2: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """One program. block_counts becomes, for a slot of a block, row minus place among the block's in expert order."""
    e = tl.arange(0, E_POW2)
    total = tl.zeros([E_POW2], dtype=tl.int32)
    for block in range(0, blocks):
        total += tl.load(block_counts + block * (E + 1) + e, mask=e <= E, other=0)
    first = tl.cumsum(total, 0) - total
    tl.store(offsets + e, first, mask=e <= E)
    tl.store(counts + e, total, mask=e < E)
    row = first
    for block in range(0, blocks):
        at = block_counts + block * (E + 1) + e
        here = tl.load(at, mask=e <= E, other=0)
        tl.store(at, row - (tl.cumsum(here, 0) - here), mask=e <= E)
        row += here
    if TILE > 0:
        needed = tl.where(e < E, (total + TILE - 1) // TILE, 0)
        past = tl.cumsum(needed, 0)
        for start in range(0, num_tiles, TILES):
            t = start + tl.arange(0, TILES)
            # The expert of a tile: as many as have all their tiles before it; E at most.
            expert = tl.sum(((past[None, :] <= t[:, None]) & (e < E)[None, :]).to(tl.int32), 1)
            mine = e[None, :] == expert[:, None]
            begin = tl.sum(tl.where(mine, first[None, :], 0), 1)
            step = tl.sum(tl.where(mine & (e < E)[None, :], t[:, None] - (past - needed)[None, :], 0), 1)
            both = tl.join(expert, begin + step * TILE)
            at = tl.join(2 * t, 2 * t + 1)
            tl.store(tiles + at, both, mask=tl.join(t < num_tiles, t < num_tiles))


@triton.jit(do_not_specialize=["slots"])
def moe_dispatch_place_kernel(
    ids, shift, permutation, inverse, slots, E: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """shift: what the scan left. Sorted by expert and back, so that both results are written in runs."""
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    i = block * BLOCK + place
    expert = tl.where(i < slots, _expert(ids, i, slots, E), E + 1)
    order = tl.sort(expert * BLOCK + place)
    expert, at = order // BLOCK, order % BLOCK
    live = expert <= E
    row = place + tl.load(shift + block * (E + 1) + expert, mask=live, other=0)
    tl.store(permutation + row, block * BLOCK + at, mask=live)
    back = tl.sort(at.to(tl.int64) * 4294967296 + row)
    tl.store(inverse + i, (back & 0x7FFFFFFF).to(tl.int32), mask=i < slots)


def moe_routing(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, scoring: str, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    S, E = logits.shape
    ids = logits.new_empty(S, top_k, dtype=torch.int64)
    weights = logits.new_empty(S, top_k)
    bias = None if bias is None else bias.contiguous()
    if S:
        width = max(16, triton.next_power_of_2(E))
        rows = max(1, 512 // width)
        moe_routing_kernel[(triton.cdiv(S, rows),)](
            logits.contiguous(), bias, ids, weights, S, E=E, TOP_K=top_k, TOPK_FIRST=scoring == "topk_then_softmax",
            RENORMALIZE=renormalize, K_POW2=triton.next_power_of_2(top_k), E_POW2=width, BS=rows, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return ids, weights


def moe_routing_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    scoring: str,
    renormalize: bool,
) -> torch.Tensor:
    S, E = logits.shape
    out = torch.empty(S, E, dtype=logits.dtype, device=logits.device)
    bias = None if bias is None else bias.contiguous()
    if S:
        width = max(16, triton.next_power_of_2(E))
        choices = triton.next_power_of_2(ids.shape[1])
        rows = max(1, 512 // width, 128 // choices)  # choices for every thread, so that none is loaded twice
        moe_routing_backward_kernel[(triton.cdiv(S, rows),)](
            grad.contiguous(), logits.contiguous(), bias, ids.contiguous(), out, S, E=E, TOP_K=ids.shape[1],
            OVER_ALL=scoring == "softmax_then_topk" and not renormalize, K_POW2=choices,
            E_POW2=width, BS=rows, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def moe_dispatch(ids: torch.Tensor, num_experts: int, tile: int) -> tuple[torch.Tensor, ...]:
    slots = ids.numel()
    num_tiles = slots // tile + num_experts if tile else 0
    sizes = ((slots,), (slots,), (num_experts,), (num_experts + 1,), (num_tiles, 2))
    permutation, inverse, counts, offsets, tiles = (ids.new_empty(size, dtype=torch.int32) for size in sizes)
    ids = ids.contiguous()
    # A slot a thread: neighbours in a warp then read and write neighbours, masked or not.
    block = min(256 if torch.version.hip else 1024, max(128, triton.next_power_of_2(slots)))  # AMD: scalar registers
    warps = block // (64 if torch.version.hip else 32)
    blocks = triton.cdiv(slots, block)
    shift = permutation.new_empty(blocks, num_experts + 1)
    width = triton.next_power_of_2(num_experts + 1)
    common = dict(E=num_experts, enable_fp_fusion=True)
    if blocks:
        moe_dispatch_count_kernel[(blocks,)](
            ids, shift, slots, E_POW2=width, BLOCK=block, num_warps=warps, **common
        )  # fmt: skip
    moe_dispatch_scan_kernel[(1,)](
        shift, counts, offsets, tiles, blocks, num_tiles, TILE=tile, E_POW2=width, TILES=max(16, 4096 // width),
        num_warps=4, **common,
    )  # fmt: skip
    if blocks:
        moe_dispatch_place_kernel[(blocks,)](
            ids, shift, permutation, inverse, slots, BLOCK=block, num_warps=warps, **common
        )  # fmt: skip
    return permutation, inverse, counts, offsets, tiles
