"""Kernels of the forward: gate and up with the activation, rows times an expert's weights, the weighted sum."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton import Kernel
from ..common.activations import gated
from .triton_tiles import described_product, gates_and_ups, halves, product, runs_at, tile


@triton.jit
def _gate_up_store(
    acc, bias, act, pre, row, live, first, I: tl.constexpr, CONCATENATED: tl.constexpr, GPT_OSS: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The activation of interleaved (gate, up) columns, the first of which belongs to column `first` of I.

    Done on at most PART results at a time: large tiles of long, deeply pipelined products leave few registers for it.
    """
    BN: tl.constexpr = acc.shape[1] // 2
    if acc.shape[0] * BN > PART:
        left, right = halves(acc)
        middle = first + BN // 2
        _gate_up_store(left, bias, act, pre, row, live, first, I, CONCATENATED, GPT_OSS, ALPHA, LIMIT, PART)
        _gate_up_store(right, bias, act, pre, row, live, middle, I, CONCATENATED, GPT_OSS, ALPHA, LIMIT, PART)
    else:
        j = tl.arange(0, 2 * BN)
        both = 2 * first + j < 2 * I
        if bias is not None:
            column = (j % 2) * I + first + j // 2 if CONCATENATED else 2 * first + j
            acc += tl.load(bias + column, mask=both, other=0.0).to(tl.float32)[None, :]
        gate, up = tl.split(tl.reshape(acc, [acc.shape[0], BN, 2]))
        i = first + tl.arange(0, BN)
        mask = live[:, None] & (i < I)[None, :]
        if pre is not None:
            rows = pre + row.to(tl.int64)[:, None] * (2 * I)
            if CONCATENATED:
                tl.store(rows + i[None, :], gate.to(pre.dtype.element_ty), mask=mask)
                tl.store(rows + I + i[None, :], up.to(pre.dtype.element_ty), mask=mask)
            else:
                at = rows + (2 * first + j)[None, :]
                tl.store(at, acc.to(pre.dtype.element_ty), mask=live[:, None] & both[None, :])
        value = gated(gate, up, GPT_OSS, ALPHA, LIMIT)
        tl.store(act + row.to(tl.int64)[:, None] * I + i[None, :], value.to(act.dtype.element_ty), mask=mask)


@triton.jit
def _gate_up_tile(
    x, w, scales, bias, act, pre, permutation, expert, first, end, n,
    H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, CONCATENATED: tl.constexpr, GPT_OSS: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FORMAT: tl.constexpr, TALL: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BM)
    live = row < end
    token = tl.load(permutation + row, mask=live, other=-TOP_K if DESCRIBED == "all" else 0) // TOP_K
    acc, _, _ = gates_and_ups(
        x, token, live, w, scales, expert, n, H, I, CONCATENATED, BM, BN, BK, FORMAT, TALL,
        DESCRIBED, PRECISION, UPCAST,
    )  # fmt: skip
    if bias is not None:
        bias += expert * (2 * I)
    PART: tl.constexpr = 64 * 32 if acc.shape[0] * BN >= 64 * 128 and H >= 1024 else 64 * 64
    _gate_up_store(acc, bias, act, pre, row, live, n * BN, I, CONCATENATED, GPT_OSS, ALPHA, LIMIT, PART)


@Kernel
@triton.jit(do_not_specialize=["num_tiles"])
def moe_experts_gate_up_kernel(
    x,  # [S, H]; tensor descriptors of it and the weights as DESCRIBED tells (`gates_and_ups`)
    w,  # [E, 2I, H] or [E, H, 2I], or bytes of values
    scales,  # None, or those of the values
    bias,  # [E, 2I] or None
    act,  # [rows, I], written
    pre,  # [rows, 2I], written, or None
    permutation, offsets, tiles, num_tiles,
    E: tl.constexpr, H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, CONCATENATED: tl.constexpr,
    GPT_OSS: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, TALL: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    expert, first, end, n = tile(tl.program_id(0), tiles, offsets, num_tiles, E, tl.cdiv(I, BN), BM, GROUP)
    if expert == E:
        return
    for part in tl.static_range(3):
        if runs_at(part, end - first, BM):
            _gate_up_tile(
                x, w, scales, bias, act, pre, permutation, expert, first, end, n, H, I, TOP_K, CONCATENATED, GPT_OSS,
                ALPHA, LIMIT, BM // 4 * 2**part, BN, BK, FORMAT, TALL, DESCRIBED, PRECISION, UPCAST,
            )  # fmt: skip


@triton.jit
def _rows_tile(
    a, w, scales, bias, out, expert, first, end, n,
    K: tl.constexpr, N: tl.constexpr, STEP_K: tl.constexpr, STEP_N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, FORMAT: tl.constexpr, TALL: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BM)
    live = row < end
    column = n * BN + tl.arange(0, BN)
    inside = column < N
    if DESCRIBED:
        acc = described_product(
            a, first, None, w, expert, n, N, K, BM, BN, BK, STEP_K == 1, False, "box", PRECISION, UPCAST
        )
    else:
        acc = product(
            a + row.to(tl.int64) * K, live, w, scales, expert, column, inside, N % BN == 0, STEP_N, STEP_K, N, K,
            BM, BN, BK, FORMAT, TALL, PRECISION, UPCAST,
        )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + expert * N + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@Kernel
@triton.jit(do_not_specialize=["num_tiles"])
def moe_experts_rows_kernel(
    a,  # [rows, K]; DESCRIBED: its tensor descriptors by all, half and a quarter of a tile's rows
    a_half, a_quarter,
    w,  # [E, ...]: element (k, n) of an expert at k * STEP_K + n * STEP_N; one of the steps is 1; or its descriptor
    scales,  # None, or those of the values
    bias,  # [E, N] or None
    out,  # [rows, N], written
    offsets, tiles, num_tiles,
    E: tl.constexpr, K: tl.constexpr, N: tl.constexpr, STEP_K: tl.constexpr, STEP_N: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, TALL: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    expert, first, end, n = tile(tl.program_id(0), tiles, offsets, num_tiles, E, tl.cdiv(N, BN), BM, GROUP)
    if expert == E:
        return
    for part in tl.static_range(3):
        if runs_at(part, end - first, BM):
            if part == 0 and DESCRIBED:
                rows = a_quarter
            elif part == 1 and DESCRIBED:
                rows = a_half
            else:
                rows = a
            _rows_tile(
                rows, w, scales, bias, out, expert, first, end, n, K, N, STEP_K, STEP_N,
                BM // 4 * 2**part, BN, BK, FORMAT, TALL, DESCRIBED, PRECISION, UPCAST,
            )  # fmt: skip


@Kernel
@triton.jit(do_not_specialize=["num_tiles"])
def moe_experts_rows_persistent_kernel(
    a, w,  # tensor descriptors as of `moe_experts_rows_kernel`, of rows only by all of a tile's
    bias, out, offsets, tiles, num_tiles,
    E: tl.constexpr, E_POW2: tl.constexpr, K: tl.constexpr, N: tl.constexpr, ALONG_K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program computes tile after tile, all at full height: copies for the next begin before the last is stored."""
    each = tl.arange(0, E_POW2)
    begins = tl.load(offsets + each, mask=each < E, other=0)
    listed = tl.sum(tl.cdiv(tl.load(offsets + each + 1, mask=each < E, other=0) - begins, BM))
    NUM_N: tl.constexpr = (N + BN - 1) // BN
    for pid in tl.range(tl.program_id(0), tl.cdiv(listed, GROUP) * GROUP * NUM_N, tl.num_programs(0), flatten=True):
        expert, first, end, n = tile(pid, tiles, offsets, num_tiles, E, NUM_N, BM, GROUP)
        acc = described_product(
            a, first, None, w, expert, n, N, K, BM, BN, BK, ALONG_K, False, "box", PRECISION, UPCAST
        )
        row = first + tl.arange(0, BM)
        column = n * BN + tl.arange(0, BN)
        inside = column < N
        if bias is not None:
            acc += tl.load(bias + expert * N + column, mask=inside & (expert < E), other=0.0).to(tl.float32)[None, :]
        live = (row < end) & (expert < E)
        at = out + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@Kernel
@triton.jit(do_not_specialize=["S"])
def moe_experts_combine_kernel(
    y,  # [rows, H]
    weights,  # [S, TOP_K], or None: 1
    inverse, offsets,
    out,  # [S, H], written
    S, E: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out[s] = sum over j of weights[s, j] y[inverse[s, j]], in the order of j; rows past the last expert are zero."""
    combine_tile(y, weights, inverse, offsets, out, S, E, H, TOP_K, BT, BH)


@triton.jit
def combine_tile(
    y, weights, inverse, offsets, out, S, E: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, BT: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BT + tl.arange(0, BT)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    rows = tl.load(offsets + E)
    live = s < S
    inside = h < H
    total = tl.zeros([BT, BH], dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        at = s.to(tl.int64) * TOP_K + j
        row = tl.load(inverse + at, mask=live, other=0)
        served = live & (row < rows)
        value = tl.load(
            y + row.to(tl.int64)[:, None] * H + h[None, :], mask=served[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + at, mask=served, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(
        out + s.to(tl.int64)[:, None] * H + h[None, :], total.to(out.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )  # fmt: skip
