"""MoE routing and dispatch on GPUs without CUDA C++ (AMD): one program a few tokens, one program an expert."""

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
    S, E: tl.constexpr, TOP_K: tl.constexpr, OVER_ALL: tl.constexpr, E_POW2: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """OVER_ALL: the softmax ran over all experts; otherwise over the picked ones."""
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    e = tl.arange(0, E_POW2)
    score = _scores(logits, bias, s, S, E, E_POW2)
    picked = tl.zeros([BS, E_POW2], dtype=tl.int1)
    from_out = tl.zeros([BS, E_POW2], dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        at = s.to(tl.int64) * TOP_K + j
        here = e[None, :] == tl.load(ids + at, mask=s < S, other=0)[:, None]
        picked = picked | here
        from_out += tl.where(here, tl.load(grad + at, mask=s < S, other=0.0).to(tl.float32)[:, None], 0.0)
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


@triton.jit(do_not_specialize=["slots", "num_tiles"])
def moe_dispatch_kernel(
    ids,  # [slots]
    permutation, inverse, counts, offsets, tiles,  # as in `Dispatch`, written
    slots, num_tiles, E: tl.constexpr, TILE: tl.constexpr, E_POW2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program e places the slots of expert e; program E those without an expert. Each reads all ids, twice."""
    me = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    count = tl.zeros([E_POW2], dtype=tl.int32)
    for start in range(0, slots, BLOCK):
        i = start + tl.arange(0, BLOCK)
        expert = _expert(ids, i, slots, E)
        count += tl.histogram(expert, E_POW2)
    count = tl.where(e < E, count, 0)
    first = tl.sum(tl.where(e < me, count, 0))
    mine = tl.sum(tl.where(e == me, count, 0))
    tl.store(offsets + me, first)
    if me < E:
        tl.store(counts + me, mine)
    if TILE > 0:
        needed = (count + TILE - 1) // TILE
        first_tile = tl.sum(tl.where(e < me, needed, 0))
        last_tile = tl.where(me == E, num_tiles, first_tile + tl.sum(tl.where(e == me, needed, 0)))
        for start in range(first_tile, last_tile, BLOCK):
            t = start + tl.arange(0, BLOCK)
            step = tl.where(me == E, 0, TILE)
            tl.store(tiles + 2 * t, tl.zeros([BLOCK], tl.int32) + me, mask=t < last_tile)
            tl.store(tiles + 2 * t + 1, first + (t - first_tile) * step, mask=t < last_tile)
    row = first
    for start in range(0, slots, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = (_expert(ids, i, slots, E) == me) & (i < slots)
        at = row + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(permutation + at, i, mask=here)
        tl.store(inverse + i, at, mask=here)
        row += tl.sum(here.to(tl.int32))


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
        rows = max(1, 512 // width)
        moe_routing_backward_kernel[(triton.cdiv(S, rows),)](
            grad.contiguous(), logits.contiguous(), bias, ids.contiguous(), out, S, E=E, TOP_K=ids.shape[1],
            OVER_ALL=scoring == "softmax_then_topk" and not renormalize, E_POW2=width, BS=rows, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def moe_dispatch(ids: torch.Tensor, num_experts: int, tile: int) -> tuple[torch.Tensor, ...]:
    slots = ids.numel()
    num_tiles = slots // tile + num_experts if tile else 0
    sizes = ((slots,), (slots,), (num_experts,), (num_experts + 1,), (num_tiles, 2))
    permutation, inverse, counts, offsets, tiles = (ids.new_empty(size, dtype=torch.int32) for size in sizes)
    moe_dispatch_kernel[(num_experts + 1,)](
        ids.contiguous(), permutation, inverse, counts, offsets, tiles, slots, num_tiles, E=num_experts, TILE=tile,
        E_POW2=triton.next_power_of_2(num_experts + 1), BLOCK=min(1024, max(128, triton.next_power_of_2(slots))),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return permutation, inverse, counts, offsets, tiles
