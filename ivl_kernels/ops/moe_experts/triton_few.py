"""Experts of a few tokens on GPUs, as in decoding: two launches and nothing sorted.

The rows of a tile are the tokens. The first slot of an expert is its leader: the programs of the leader's column tiles
serve every token that chose the expert, those of other slots leave at once, so each weight is read once. The routing
weight is multiplied into the activation, so that the second product is one long sum over experts and columns, which a
program runs through for its own columns of the result.

The first launch leaves a plan for the second, [slots, PLAN] int32: the leaders' rows first, in the order of slots, with
each token's row of `act` (-1: the token did not choose the expert) and the expert; then rows with expert E.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gpu import capability
from ..._triton import Kernel, cdiv, next_power_of_2
from ..common.activations import gated
from ..common.matmul import flags
from .op import FEW_TOKENS, FewTokens
from .triton import _contiguous, _pipeline
from .triton_formats import of_expert, stored_tile
from .triton_tiles import gates_and_ups, mma

ROWS = tl.constexpr(16)  # of a tile, the least that tensor cores take
TOKENS = tl.constexpr(FEW_TOKENS)
PLAN = tl.constexpr(16)  # TOKENS rows of `act`, then the expert


@triton.jit
def _of_tokens(tensor, S, TOP_K: tl.constexpr, K_POW2: tl.constexpr, other: tl.constexpr):
    """[ROWS, K_POW2] of a [S, TOP_K] tensor."""
    t, choice = tl.arange(0, ROWS)[:, None], tl.arange(0, K_POW2)[None, :]
    return tl.load(tensor + t * TOP_K + choice, mask=(t < S) & (choice < TOP_K), other=other)


@triton.jit
def _write_plan(
    ids, plan, S, E: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, K_POW2: tl.constexpr
):  # fmt: skip
    s = tl.arange(0, SLOTS)
    inside = s < S * TOP_K
    expert = tl.load(ids + s, mask=inside, other=-1)
    again = tl.sum(((expert[None, :] == expert[:, None]) & (s[None, :] < s[:, None])).to(tl.int32), 1)
    leads = (expert >= 0) & (expert < E) & (again == 0)
    before = tl.cumsum(leads.to(tl.int32), 0) - leads.to(tl.int32)
    entry = plan + tl.where(leads, before, S * TOP_K - 1 - (s - before)) * PLAN
    tl.store(entry + TOKENS, tl.where(leads, expert, E).to(tl.int32), mask=inside)
    for t in tl.static_range(TOKENS):
        here = t * TOP_K + tl.arange(0, K_POW2)
        chosen = (
            tl.load(ids + here, mask=(here < (t + 1) * TOP_K) & (here < S * TOP_K), other=-1)[None, :]
            == expert[:, None]
        )
        row = tl.min(tl.where(chosen, here[None, :], TOKENS * TOP_K), 1)
        tl.store(entry + t, tl.where(row < S * TOP_K, row, -1), mask=inside)


@Kernel
@triton.jit(do_not_specialize=["S"])
def moe_experts_few_gate_up_kernel(
    hidden,  # [S, H]
    ids, weights,  # [S, TOP_K]
    w,  # [E, 2I, H] or [E, H, 2I], or bytes of values
    scales,  # None, or those of the values
    bias,  # [E, 2I] or None
    act,  # [slots, I]; a row that the plan names is written: weight times activation
    plan,  # [slots, PLAN], written
    S, E: tl.constexpr, H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    K_POW2: tl.constexpr, CONCATENATED: tl.constexpr, GPT_OSS: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Program 0 writes the plan; each of the others has a column tile of a slot."""
    if tl.program_id(0) == 0:
        _write_plan(ids, plan, S, E, TOP_K, SLOTS, K_POW2)
        return
    NUM_N: tl.constexpr = (I + BN - 1) // BN
    n, slot = (tl.program_id(0) - 1) % NUM_N, (tl.program_id(0) - 1) // NUM_N
    expert = tl.load(ids + slot)
    t = tl.arange(0, ROWS)
    chosen = _of_tokens(ids, S, TOP_K, K_POW2, -1) == expert
    row = tl.min(tl.where(chosen, t[:, None] * TOP_K + tl.arange(0, K_POW2)[None, :], ROWS * TOP_K), 1)
    if (expert < 0) | (expert >= E) | (tl.min(row, 0) < slot):
        return

    live = row < ROWS * TOP_K
    weight = tl.sum(tl.where(chosen, _of_tokens(weights, S, TOP_K, K_POW2, 0.0).to(tl.float32), 0.0), 1)
    acc, column, both = gates_and_ups(
        hidden, t, live, w, scales, expert, n, H, I, CONCATENATED, ROWS, BN, BK, FORMAT, TALL, "", PRECISION, UPCAST
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + expert * (2 * I) + column, mask=both, other=0.0).to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(acc, [ROWS, BN, 2]))
    value = gated(gate, up, GPT_OSS, ALPHA, LIMIT) * weight[:, None]
    i = n * BN + tl.arange(0, BN)
    at = act + row.to(tl.int64)[:, None] * I + i[None, :]
    tl.store(at, value.to(act.dtype.element_ty), mask=live[:, None] & (i < I)[None, :])


@Kernel
@triton.jit(do_not_specialize=["S"])
def moe_experts_few_down_kernel(
    act, plan,  # of the first launch
    ids, weights,  # [S, TOP_K]
    w,  # [E, H, I] or [E, I, H], or bytes of values
    scales,  # None, or those of the values
    bias,  # [E, H] or None
    out,  # [S, H], written
    S, E: tl.constexpr, H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    IN_ROWS: tl.constexpr, ONE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    FORMAT: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (column tile): out[t] = sum over the plan's experts of act[row of t] down, and the weighted biases."""
    dtype: tl.constexpr = act.dtype.element_ty
    MXFP4: tl.constexpr = FORMAT == "mxfp4"
    STEPS: tl.constexpr = (I + BK - 1) // BK
    t, s = tl.arange(0, ROWS), tl.arange(0, SLOTS)
    h = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = h < H
    experts = tl.load(plan + s * PLAN + TOKENS, mask=s < S * TOP_K, other=E)
    count = tl.sum((experts < E).to(tl.int32), 0)
    acc = tl.zeros([BK, BN] if ONE else [BN, ROWS] if TALL else [ROWS, BN], dtype=tl.float32)
    # One loop, so that loads run ahead from an expert into the next.
    for step in tl.range(0, count * STEPS, num_stages=STAGES):
        entry = plan + step // STEPS * PLAN
        expert = tl.load(entry + TOKENS)
        first = step % STEPS * BK
        i = first + tl.arange(0, BK)
        if FORMAT != "":
            values, factors = of_expert(w, scales, expert, H, I, MXFP4)
            right = tl.trans(stored_tile(values, factors, h, inside, first, I, BK, MXFP4, dtype))
        else:
            matrix = w + expert.to(tl.int64) * (H * I)
            at = h[None, :] * I + i[:, None] if IN_ROWS else i[:, None] * H + h[None, :]
            right = tl.load(matrix + at, mask=inside[None, :] & (i < I)[:, None], other=0.0)
        if ONE:
            left = tl.load(act + tl.load(entry).to(tl.int64) * I + i, mask=i < I, other=0.0)
            acc += right.to(tl.float32) * left.to(tl.float32)[:, None]
        else:
            row = tl.load(entry + t, mask=t < S, other=-1)
            from_row = act + row.to(tl.int64)[:, None] * I + i[None, :]
            left = tl.load(from_row, mask=(row >= 0)[:, None] & (i < I)[None, :], other=0.0)
            acc = mma(left, right, acc, TALL, PRECISION, UPCAST)
    if ONE:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [ROWS, BN])
    elif TALL:
        acc = tl.trans(acc)
    if bias is not None:
        for choice in tl.static_range(TOP_K):
            expert = tl.load(ids + t * TOP_K + choice, mask=t < S, other=-1)
            served = (expert >= 0) & (expert < E)
            weight = tl.load(weights + t * TOP_K + choice, mask=served, other=0.0).to(tl.float32)
            vector = tl.load(
                bias + expert[:, None] * H + h[None, :], mask=served[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            acc += weight[:, None] * vector
    at = out + t.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(t < S)[:, None] & inside[None, :])


def gate_up_config(slots: int, columns: int, inner: int, itemsize: int, target: int, stored: bool) -> dict[str, int]:
    """Columns of gates, and as many of ups: 64 where that leaves a program for every multiprocessor."""
    width = 64 if slots * cdiv(columns, 64) >= 128 else 32
    # Three tf32 products take registers.
    depth = min(128 if itemsize == 2 and target else 128 // itemsize, max(32 if stored else 16, next_power_of_2(inner)))
    depth, stages = _pipeline(ROWS.value, 2 * width, inner, depth, itemsize, target)
    return dict(BN=width, BK=depth, num_warps=width // 16, num_stages=stages)


def down_config(columns: int, inner: int, itemsize: int, target: int, stored: bool) -> dict[str, int]:
    """Long steps, since a program streams its columns of all experts; 16 columns where 32 leave too few programs."""
    width = 16 if 1024 <= columns < 32 * 128 else 32
    # Three tf32 products take registers.
    longest = 64 if itemsize > 2 else 128 if stored and not target else 256
    depth = min(longest, max(32 if stored else 16, next_power_of_2(inner)))
    depth, stages = _pipeline(ROWS.value, width, 4 * inner, depth, itemsize, target)
    return dict(BN=width, BK=depth, STAGES=stages, num_warps=2)


def moe_experts_few(a: FewTokens) -> Tensor:
    b = a.placed(a.ids, a.ids, a.ids, a.ids)  # asked only about its matrices
    E, H, I = b.gate_up.shape[0], b.hidden.shape[1], b.inner
    S, K = a.ids.shape
    ids = a.ids.contiguous()
    hidden, weights, gate_up, down, gate_up_scales, down_scales, gate_up_bias, down_bias = _contiguous(b)
    target, size = capability(hidden), hidden.element_size()
    common = flags(size, target) | dict(
        E=E, H=H, I=I, TOP_K=K, SLOTS=next_power_of_2(S * K), FORMAT=b.format, TALL=target >= 90
    )  # fmt: skip
    out = hidden.new_empty(S, H)
    act = hidden.new_empty(S * K, I)
    plan = ids.new_empty(S * K, PLAN.value, dtype=torch.int32)
    config = gate_up_config(S * K, I, H, size, target, bool(b.format))
    moe_experts_few_gate_up_kernel[(1 + cdiv(I, config["BN"]) * S * K,)](
        hidden, ids, weights, gate_up, gate_up_scales, gate_up_bias, act, plan, S, K_POW2=next_power_of_2(K),
        CONCATENATED=not b.interleaved, GPT_OSS=b.activation == "gpt_oss", ALPHA=b.alpha, LIMIT=b.limit,
        **config, **common,
    )  # fmt: skip
    config = down_config(H, I, size, target, bool(b.format))
    moe_experts_few_down_kernel[(cdiv(H, config["BN"]),)](
        act, plan, ids, weights, down, down_scales, down_bias, out, S, IN_ROWS=b.in_rows, ONE=S == 1,
        **config, **common,
    )  # fmt: skip
    return out
