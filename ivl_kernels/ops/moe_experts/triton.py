"""MoE experts on GPUs.

Forward, four launches: dispatch (in `moe_routing`), gate_up GEMM with the activation in its epilogue, down GEMM,
weighted gather-sum. Backward, four launches: down GEMM transposed with the activation's backward in its epilogue,
both weight gradients, gate_up GEMM transposed, gather-sum.

Rows are assignments (token, choice) in expert order; they are never copied: `permutation` is followed in the operand
loads. A tile is up to BM rows of one expert, listed by the dispatch. The grid is the largest number of tiles that the
shapes allow, so nothing is read back to the host; the programs of tiles that do not exist leave at once. A tile that
is at most half or a quarter full is computed at that height: an expert's tiles are tall while its rows last, however
unevenly tokens chose, and the last one is as short as they leave it.

In the accumulator gate and up are interleaved (gate in even columns), whatever the layout of the weights: a pair then
sits in one thread, and one GEMM serves both.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gpu import capability
from ..._targets import limits
from ..._triton import Kernel, cdiv, next_power_of_2
from ..common.activations import gated, gated_backward
from ..common.matmul import flags, operands
from .op import Experts, ExpertsBackward, Gradients, Output, empty_gradients, empty_output, tile_rows
from .triton_formats import of_expert, stored_tile


@triton.jit
def _tile(tiles, offsets, num_tiles, E: tl.constexpr, NUM_N: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr):
    """This program's expert (E: nothing to do), first row, end row and column tile.

    GROUP row tiles go through the column tiles together: neighbours in time read the same weights. The grid is padded
    to whole groups.
    """
    pid = tl.program_id(0)
    inside = pid % (GROUP * NUM_N)
    t = pid // (GROUP * NUM_N) * GROUP + inside % GROUP
    expert = tl.load(tiles + 2 * t, mask=t < num_tiles, other=E)
    first = tl.load(tiles + 2 * t + 1, mask=t < num_tiles, other=0)
    end = tl.minimum(tl.load(offsets + tl.minimum(expert + 1, E)), first + BM)
    return expert, first, end, inside // GROUP


@triton.jit
def _mma(a, b, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b; transposed when SWAP, which puts the weights on the tensor core's tall side (64 rows on Hopper)."""
    a, b = operands(a, b, PRECISION, UPCAST)
    if SWAP:
        return tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _product(
    a_rows, a_mask, w, scales, expert, column, w_mask, EVEN: tl.constexpr, STEP_N: tl.constexpr, STEP_K: tl.constexpr,
    COLUMNS: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr,
    TALL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BM, N] = a [BM, K] times some columns of an expert's w [K, COLUMNS], in float32.

    a_rows: pointers to the first of each K. Element (k, n) of w is at k * STEP_K + n * STEP_N; of stored values the
    step along their rows is 1. EVEN: w_mask is all true.
    """
    if FORMAT != "":
        return _stored_product(
            a_rows, a_mask, w, scales, expert, column, w_mask, STEP_K == 1, COLUMNS, K, BM, N, BK, FORMAT == "mxfp4",
            TALL, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        w += expert.to(tl.int64) * (K * COLUMNS)
        return _plain_product(
            a_rows, a_mask, w + column * STEP_N, w_mask, EVEN, STEP_K, K, BM, N, BK, TALL, PRECISION, UPCAST
        )


@triton.jit
def _plain_product(
    a_rows, a_mask, w_columns, w_mask, EVEN: tl.constexpr, STEP_K: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    N: tl.constexpr, BK: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Hopper's tf32 operands lie along K: others would be copied 4 bytes at a time.
    SWAP: tl.constexpr = TALL and BM < 64 and (STEP_K == 1 or a_rows.dtype.element_ty.primitive_bitwidth == 16)
    acc = tl.zeros([N, BM] if SWAP else [BM, N], dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = a_rows[:, None] + k[None, :]
        w = w_columns[None, :] + k[:, None] * STEP_K
        if K % BK == 0:
            left = tl.load(a, mask=a_mask[:, None], other=0.0)
            right = tl.load(w) if EVEN else tl.load(w, mask=w_mask[None, :], other=0.0)
        else:
            left = tl.load(a, mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
            right = tl.load(w, mask=w_mask[None, :] & (k < K)[:, None], other=0.0)
        acc = _mma(left, right, acc, SWAP, PRECISION, UPCAST)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _stored_product(
    a_rows, a_mask, w, scales, expert, column, w_mask, ALONG_K: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, MXFP4: tl.constexpr, TALL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As `_product`; ALONG_K: the columns of w are rows in memory, else the rows are and `column` are neighbours."""
    SWAP: tl.constexpr = TALL and BM < 64
    dtype: tl.constexpr = a_rows.dtype.element_ty
    WIDTH: tl.constexpr = K if ALONG_K else COLUMNS
    w, scales = of_expert(w, scales, expert, COLUMNS if ALONG_K else K, WIDTH, MXFP4)
    acc = tl.zeros([N, BM] if SWAP else [BM, N], dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(a_rows[:, None] + k[None, :], mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
        if ALONG_K:
            right = tl.trans(stored_tile(w, scales, column, w_mask, start, WIDTH, BK, MXFP4, dtype))
        else:
            right = stored_tile(w, scales, k, k < K, tl.min(column, 0), WIDTH, N, MXFP4, dtype)
        acc = _mma(left, right, acc, SWAP, PRECISION, UPCAST)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _halves(acc):
    """The left and right half of the columns: an epilogue on half a tile at a time needs half the registers."""
    HALF: tl.constexpr = acc.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, HALF]), [0, 2, 1]))


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
        left, right = _halves(acc)
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
    FORMAT: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BM)
    live = row < end
    token = tl.load(permutation + row, mask=live, other=0) // TOP_K
    j = tl.arange(0, 2 * BN)
    both = n * (2 * BN) + j < 2 * I
    column = (j % 2) * I + n * BN + j // 2 if CONCATENATED else n * (2 * BN) + j
    ROWS: tl.constexpr = CONCATENATED or FORMAT != ""
    acc = _product(
        x + token.to(tl.int64) * H, live, w, scales, expert, column, both, I % BN == 0, H if ROWS else 1,
        1 if ROWS else 2 * I, 2 * I, H, BM, 2 * BN, BK, FORMAT, TALL, PRECISION, UPCAST,
    )  # fmt: skip
    if bias is not None:
        bias += expert * (2 * I)
    PART: tl.constexpr = 64 * 32 if acc.shape[0] * BN >= 64 * 128 and H >= 1024 else 64 * 64
    _gate_up_store(acc, bias, act, pre, row, live, n * BN, I, CONCATENATED, GPT_OSS, ALPHA, LIMIT, PART)


@Kernel
@triton.jit(do_not_specialize=["num_tiles"])
def moe_experts_gate_up_kernel(
    x,  # [S, H]
    w,  # [E, 2I, H] or [E, H, 2I], or bytes of values
    scales,  # None, or those of the values
    bias,  # [E, 2I] or None
    act,  # [rows, I], written
    pre,  # [rows, 2I], written, or None
    permutation, offsets, tiles, num_tiles,
    E: tl.constexpr, H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, CONCATENATED: tl.constexpr,
    GPT_OSS: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, TALL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    expert, first, end, n = _tile(tiles, offsets, num_tiles, E, tl.cdiv(I, BN), BM, GROUP)
    if expert == E:
        return
    for part in tl.static_range(3):
        if (end - first <= BM // 4 * 2**part) & ((part == 0) | (end - first > BM // 8 * 2**part)):
            _gate_up_tile(
                x, w, scales, bias, act, pre, permutation, expert, first, end, n, H, I, TOP_K, CONCATENATED, GPT_OSS,
                ALPHA, LIMIT, BM // 4 * 2**part, BN, BK, FORMAT, TALL, PRECISION, UPCAST,
            )  # fmt: skip


@triton.jit
def _rows_tile(
    a, w, scales, bias, out, expert, first, end, n,
    K: tl.constexpr, N: tl.constexpr, STEP_K: tl.constexpr, STEP_N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, FORMAT: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BM)
    live = row < end
    column = n * BN + tl.arange(0, BN)
    inside = column < N
    acc = _product(
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
    a,  # [rows, K]
    w,  # [E, ...]: element (k, n) of an expert at k * STEP_K + n * STEP_N; one of the steps is 1
    scales,  # None, or those of the values
    bias,  # [E, N] or None
    out,  # [rows, N], written
    offsets, tiles, num_tiles,
    E: tl.constexpr, K: tl.constexpr, N: tl.constexpr, STEP_K: tl.constexpr, STEP_N: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, TALL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    expert, first, end, n = _tile(tiles, offsets, num_tiles, E, tl.cdiv(N, BN), BM, GROUP)
    if expert == E:
        return
    for part in tl.static_range(3):
        if (end - first <= BM // 4 * 2**part) & ((part == 0) | (end - first > BM // 8 * 2**part)):
            _rows_tile(
                a, w, scales, bias, out, expert, first, end, n, K, N, STEP_K, STEP_N,
                BM // 4 * 2**part, BN, BK, FORMAT, TALL, PRECISION, UPCAST,
            )  # fmt: skip


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
    _combine_tile(y, weights, inverse, offsets, out, S, E, H, TOP_K, BT, BH)


@triton.jit
def _combine_tile(
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


@triton.jit
def _down_backward_store(
    acc, weight, pre, weighted, grad_pre, row, live, first, I: tl.constexpr, CONCATENATED: tl.constexpr,
    GPT_OSS: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """From the gradient of the activation without the weight; returns these columns' share of the weight's gradient."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    if BM * BN >= 64 * 64:
        left, right = _halves(acc)
        middle = first + BN // 2
        share = _down_backward_store(
            left, weight, pre, weighted, grad_pre, row, live, first, I, CONCATENATED, GPT_OSS, ALPHA, LIMIT
        )
        share += _down_backward_store(
            right, weight, pre, weighted, grad_pre, row, live, middle, I, CONCATENATED, GPT_OSS, ALPHA, LIMIT
        )
    else:
        kind = grad_pre.dtype.element_ty
        i = first + tl.arange(0, BN)
        mask = live[:, None] & (i < I)[None, :]
        j = 2 * first + tl.arange(0, 2 * BN)
        both = live[:, None] & (j < 2 * I)[None, :]
        at = row.to(tl.int64)[:, None] * (2 * I)
        if CONCATENATED:
            gate = tl.load(pre + at + i[None, :], mask=mask, other=0.0).to(tl.float32)
            up = tl.load(pre + at + I + i[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            pair = tl.load(pre + at + j[None, :], mask=both, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(pair, [BM, BN, 2]))
        value, grad_gate, grad_up = gated_backward(gate, up, acc * weight[:, None], GPT_OSS, ALPHA, LIMIT)
        if CONCATENATED:
            tl.store(grad_pre + at + i[None, :], grad_gate.to(kind), mask=mask)
            tl.store(grad_pre + at + I + i[None, :], grad_up.to(kind), mask=mask)
        else:
            pair = tl.reshape(tl.join(grad_gate, grad_up), [BM, 2 * BN])
            tl.store(grad_pre + at + j[None, :], pair.to(kind), mask=both)
        if weighted is not None:
            at = weighted + row.to(tl.int64)[:, None] * I + i[None, :]
            tl.store(at, (value * weight[:, None]).to(kind), mask=mask)
        share = tl.sum(acc * value, 1)
    return share


@triton.jit
def _down_backward_tile(
    grad, w, scales, bias, weights, pre, weighted, grad_pre, partial, permutation, rows, expert, first, end, n,
    H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, CONCATENATED: tl.constexpr, GPT_OSS: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FORMAT: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BM)
    live = row < end
    flat = tl.load(permutation + row, mask=live, other=0)
    token = flat // TOP_K
    i = n * BN + tl.arange(0, BN)
    inside = i < I
    ROWS: tl.constexpr = CONCATENATED or FORMAT != ""
    acc = _product(
        grad + token.to(tl.int64) * H, live, w, scales, expert, i, inside, I % BN == 0, 1 if ROWS else H,
        I if ROWS else 1, I, H, BM, BN, BK, FORMAT, TALL, PRECISION, UPCAST,
    )  # fmt: skip
    weight = tl.load(weights + flat, mask=live, other=0.0).to(tl.float32)
    share = _down_backward_store(
        acc, weight, pre, weighted, grad_pre, row, live, n * BN, I, CONCATENATED, GPT_OSS, ALPHA, LIMIT
    )
    if bias is not None and n == 0:
        rows_in = grad + token.to(tl.int64)[:, None] * H
        for start in range(0, H, BK):
            h = start + tl.arange(0, BK)
            from_out = tl.load(rows_in + h[None, :], mask=live[:, None] & (h < H)[None, :], other=0.0)
            column = tl.load(bias + expert * H + h, mask=h < H, other=0.0)
            share += tl.sum(from_out.to(tl.float32) * column.to(tl.float32)[None, :], 1)
    tl.store(partial + n.to(tl.int64) * rows + flat, share.to(partial.dtype.element_ty), mask=live)


@Kernel
@triton.jit(do_not_specialize=["rows", "num_tiles"])
def moe_experts_down_backward_kernel(
    grad,  # [S, H]
    w,  # [E, H, I] or [E, I, H], or bytes of values
    scales,  # None, or those of the values
    bias,  # [E, H] or None
    weights,  # [S, TOP_K]
    pre,  # [rows, 2I]
    weighted,  # [rows, I], written: weight times activation; or None
    grad_pre,  # [rows, 2I], written
    partial,  # [column tiles, rows] by slot, written: each tile's share of the gradient of the weights
    permutation, offsets, tiles, rows, num_tiles,
    E: tl.constexpr, H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, CONCATENATED: tl.constexpr,
    GPT_OSS: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, TALL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    expert, first, end, n = _tile(tiles, offsets, num_tiles, E, tl.cdiv(I, BN), BM, GROUP)
    if expert == E:
        return
    for part in tl.static_range(3):
        if (end - first <= BM // 4 * 2**part) & ((part == 0) | (end - first > BM // 8 * 2**part)):
            _down_backward_tile(
                grad, w, scales, bias, weights, pre, weighted, grad_pre, partial, permutation, rows, expert, first, end,
                n, H, I, TOP_K, CONCATENATED, GPT_OSS, ALPHA, LIMIT, BM // 4 * 2**part, BN, BK, FORMAT, TALL, PRECISION,
                UPCAST,
            )  # fmt: skip


@triton.jit
def _outer_tile(
    p, g, out, bias, weights, permutation, expert, first, end, n,
    P: tl.constexpr, G: tl.constexpr, TOP_K: tl.constexpr, STEP_P: tl.constexpr,
    STEP_G: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out[p, g] = sum over an expert's rows of p[row, p] g[token(row), g].

    bias: with `weights`, the sum of weight times g; without, the sum of p.
    """
    NUM_G: tl.constexpr = (G + BG - 1) // BG
    i = n // NUM_G * BP + tl.arange(0, BP)
    h = n % NUM_G * BG + tl.arange(0, BG)
    r = tl.arange(0, BR)
    acc = tl.zeros([BP, BG], dtype=tl.float32)
    extra = tl.zeros([BG if weights is not None else BP], dtype=tl.float32)
    for start in range(first, end, BR):
        row = start + r
        live = row < end
        flat = tl.load(permutation + row, mask=live, other=0)
        left = tl.load(p + row.to(tl.int64)[None, :] * P + i[:, None], mask=live[None, :] & (i < P)[:, None], other=0.0)
        token = (flat // TOP_K).to(tl.int64)
        right = tl.load(g + token[:, None] * G + h[None, :], mask=live[:, None] & (h < G)[None, :], other=0.0)
        acc = _mma(left, right, acc, False, PRECISION, UPCAST)
        if bias is not None:
            if weights is not None:
                weight = tl.load(weights + flat, mask=live, other=0.0).to(tl.float32)
                extra += tl.sum(right.to(tl.float32) * weight[:, None], 0)
            else:
                extra += tl.sum(left.to(tl.float32), 1)
    if out is not None:
        at = out + expert.to(tl.int64) * (P * G) + i[:, None] * STEP_P + h[None, :] * STEP_G
        tl.store(at, acc.to(out.dtype.element_ty), mask=(i < P)[:, None] & (h < G)[None, :])
    if bias is not None:
        if weights is not None:
            if n // NUM_G == 0:
                tl.store(bias + expert * G + h, extra.to(bias.dtype.element_ty), mask=h < G)
        else:
            if n % NUM_G == 0:
                tl.store(bias + expert * P + i, extra.to(bias.dtype.element_ty), mask=i < P)


@Kernel
@triton.jit
def moe_experts_weight_grad_kernel(
    grad_pre, x, grad_gate_up, grad_gate_up_bias, weighted, grad, grad_down, grad_down_bias, weights, permutation,
    offsets, H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, CONCATENATED: tl.constexpr, NUM_UP: tl.constexpr,
    BR: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles of both weight gradients of one expert (second grid dimension); experts without rows get zeros."""
    expert = tl.program_id(1)
    first = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    n = tl.program_id(0)
    if n < NUM_UP:
        _outer_tile(
            grad_pre, x, grad_gate_up, grad_gate_up_bias, None, permutation, expert, first, end, n, 2 * I, H, TOP_K,
            H if CONCATENATED else 1, 1 if CONCATENATED else 2 * I, BR, BP, BG, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        _outer_tile(
            weighted, grad, grad_down, grad_down_bias, weights, permutation, expert, first, end, n - NUM_UP, I, H,
            TOP_K, 1 if CONCATENATED else H, I if CONCATENATED else 1, BR, BP, BG, PRECISION, UPCAST,
        )  # fmt: skip


@Kernel
@triton.jit(do_not_specialize=["S"])
def moe_experts_combine_backward_kernel(
    y,  # [rows, H]: gradient of each row's token; or None
    inverse, offsets,
    out,  # [S, H], written
    partial,  # [NUM_PARTIAL, S * TOP_K]; NUM_PARTIAL 0: the gradients of rows with an expert are already written
    grad_weights,  # [S, TOP_K], written, or None
    S, E: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, NUM_PARTIAL: tl.constexpr, BT: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    if y is not None:
        _combine_tile(y, None, inverse, offsets, out, S, E, H, TOP_K, BT, BH)
    if grad_weights is not None and tl.program_id(1) == 0:
        s = tl.program_id(0) * BT + tl.arange(0, BT)
        rows = tl.load(offsets + E)
        for j in tl.static_range(TOP_K):
            at = s.to(tl.int64) * TOP_K + j
            served = (s < S) & (tl.load(inverse + at, mask=s < S, other=0) < rows)
            total = tl.zeros([BT], dtype=tl.float32)
            for n in range(NUM_PARTIAL):
                total += tl.load(partial + n * (S.to(tl.int64) * TOP_K) + at, mask=served, other=0.0)
            mask = (s < S) & ((NUM_PARTIAL > 0) | (served == 0))
            tl.store(grad_weights + at, total.to(grad_weights.dtype.element_ty), mask=mask)


def _pipeline(rows: int, columns: int, steps: int, depth: int, itemsize: int, target: int) -> tuple[int, int]:
    """Depth of a step along K, at most `depth`, and number of stages: as many as shared memory and K's length allow."""
    limit = limits(target).pipeline
    while depth > 16 and 2 * (rows + columns) * depth * itemsize > limit:
        depth //= 2
    stages = limit // ((rows + columns) * depth * itemsize)
    return depth, 2 if target == 0 else max(1, min(4, stages, max(2, steps // depth // 2)))


def gemm_config(
    rows: int, columns: int, inner: int, itemsize: int, target: int, *, pairs: bool = False, epilogue: bool = False,
    stored: bool = False,
) -> dict:  # fmt: skip
    """Tile sizes of a grouped GEMM.

    Args:
        rows: rows of a tile.
        columns: columns of the result; gate and up count as one column when `pairs`.
        inner: length of the sums.
        itemsize: bytes of an element.
        target: `capability`.
        epilogue: pairs are in the epilogue only; the product has one column for both.
        stored: weights are in blocks of 32, whole ones of which are expanded.
    """
    wide = 2 if pairs else 1
    width = 256 if target and itemsize < 4 else 128
    while width > 32 and width // 2 >= columns * wide:
        width //= 2
    if itemsize < 4:
        # On 100 accumulators are not in registers; stored values are expanded in registers.
        large = rows * width > (64 * 128 if target == 100 or stored else 64 * 256)
        # Small ones: registers spill before stages fit.
        depth = 128 // itemsize if limits(target).large else 64 // itemsize
    else:
        # Three tf32 products, and below Hopper their operands, in two parts each, are in registers.
        if target not in (0, 90, 100) and not epilogue:
            width = min(width, 64 * 128 // rows)
        large = rows * width >= 64 * 128 and target != 0
        depth = 128 // itemsize
    depth, stages = _pipeline(rows, width, inner, depth, itemsize, target)
    columns, least = width // wide, 32 if stored else 16
    columns = max(columns, least) if epilogue else columns
    return dict(BM=rows, BN=columns, BK=max(depth, least), GROUP=8, num_warps=8 if large else 4, num_stages=stages)


def weight_grad_config(slots: int, experts: int, itemsize: int, target: int) -> dict:
    """Tile sizes of the weight gradients: BR rows a step, and no pipeline where an expert has only a few."""
    mean = slots / experts
    side = 128 if itemsize < 4 else 64
    depth = 16 if mean <= 16 else 32 if mean <= 128 or itemsize == 4 else 64
    limit = limits(target).pipeline
    stages = 1 if mean <= 128 else 2 if target == 0 else min(3, limit // (2 * side * depth * itemsize))
    return dict(BR=depth, BP=side, BG=side, num_warps=4 if stages == 1 and target else 8, num_stages=stages)


def combine_config(tokens: int, columns: int) -> dict:
    """Few tokens: one warp a program, so that there are enough programs."""
    few = tokens * columns < 64 * 2048
    width = min(next_power_of_2(columns), 256 if few else 1024)
    return dict(BT=(256 if few else 2048) // width, BH=width, num_warps=1 if few else 4, enable_fp_fusion=True)


def _plan(slots: int, experts: int) -> tuple[int, int]:
    """Rows of a tile, and the most tiles that can have work."""
    rows = tile_rows(slots, experts)
    return rows, (slots + (rows - 1) * min(experts, slots)) // rows


def _contiguous(a: Experts) -> tuple[Any, ...]:
    matrices = (t.view(torch.uint8) if a.format else t for t in (a.gate_up, a.down))
    tensors = (a.hidden, a.weights, *matrices, a.gate_up_scales, a.down_scales, a.gate_up_bias, a.down_bias)
    return tuple(t if t is None else t.contiguous() for t in tensors)


def _grid(num_tiles: int, columns: int, config: dict) -> tuple[int]:
    return (cdiv(num_tiles, config["GROUP"]) * config["GROUP"] * cdiv(columns, config["BN"]),)


def moe_experts(a: Experts) -> Output:
    concatenated, in_rows = not a.interleaved, a.in_rows
    E, H, I = a.gate_up.shape[0], a.hidden.shape[1], a.inner
    S, K = a.weights.shape
    result = empty_output(a)
    if S * K == 0:
        result.out.zero_()
        return result
    hidden, weights, gate_up, down, gate_up_scales, down_scales, gate_up_bias, down_bias = _contiguous(a)
    target, size = capability(hidden), hidden.element_size()
    rows, num_tiles = _plan(S * K, E)
    common = flags(size, target) | dict(E=E, FORMAT=a.format, TALL=target >= 90)
    act = hidden.new_empty(S * K, I)
    config = gemm_config(rows, I, H, size, target, pairs=True, stored=bool(a.format))
    moe_experts_gate_up_kernel[_grid(num_tiles, I, config)](
        hidden, gate_up, gate_up_scales, gate_up_bias, act, result.pre if a.keep else None, a.permutation, a.offsets,
        a.tiles, num_tiles, H=H, I=I, TOP_K=K, CONCATENATED=concatenated, GPT_OSS=a.activation == "gpt_oss",
        ALPHA=a.alpha, LIMIT=a.limit, **config, **common,
    )  # fmt: skip
    y = hidden.new_empty(S * K, H)
    config = gemm_config(rows, H, I, size, target, stored=bool(a.format))
    moe_experts_rows_kernel[_grid(num_tiles, H, config)](
        act, down, down_scales, down_bias, y, a.offsets, a.tiles, num_tiles, K=I, N=H, STEP_K=1 if in_rows else H,
        STEP_N=I if in_rows else 1, **config, **common,
    )  # fmt: skip
    config = combine_config(S, H)
    moe_experts_combine_kernel[(cdiv(S, config["BT"]), cdiv(H, config["BH"]))](
        y, weights, a.inverse, a.offsets, result.out, S, E=E, H=H, TOP_K=K, **config
    )
    return result


def moe_experts_backward(b: ExpertsBackward) -> Gradients:
    a, pre, needs = b.forward, b.pre, b.need
    concatenated, in_rows = not a.interleaved, a.in_rows
    E, H, I = a.gate_up.shape[0], a.hidden.shape[1], a.inner
    S, K = a.weights.shape
    result = empty_gradients(b)
    if S * K == 0:
        for gradient in result:
            gradient.zero_()
        return result
    grad = b.grad.contiguous()
    hidden, weights, gate_up, down, gate_up_scales, down_scales, _, down_bias = _contiguous(a)
    target, size = capability(hidden), hidden.element_size()
    rows, num_tiles = _plan(S * K, E)
    common = flags(size, target)
    gemm = common | dict(E=E, FORMAT=a.format, TALL=target >= 90)

    def wanted(name: str) -> Tensor | None:
        return getattr(result, name) if getattr(needs, name) else None

    need_up, need_down = needs.gate_up or needs.gate_up_bias, needs.down or needs.down_bias

    config = gemm_config(rows, I, H, size, target, pairs=True, epilogue=True, stored=bool(a.format))
    # With more warps or stages ptxas takes so few registers that it spills.
    few_registers = target == 120 and common["PRECISION"] == "tf32"
    if few_registers:
        config |= dict(num_warps=4, num_stages=2)
    column_tiles = cdiv(I, config["BN"])
    grad_pre = torch.empty_like(pre)
    weighted = pre.new_empty(S * K, I) if need_down else None
    direct = column_tiles == 1 and needs.weights
    partial = result.weights if direct else weights.new_empty(column_tiles, S * K, dtype=torch.float32)
    moe_experts_down_backward_kernel[_grid(num_tiles, I, config)](
        grad, down, down_scales, down_bias, weights, pre, weighted, grad_pre, partial, a.permutation, a.offsets,
        a.tiles, S * K, num_tiles, H=H, I=I, TOP_K=K, CONCATENATED=concatenated, GPT_OSS=a.activation == "gpt_oss",
        ALPHA=a.alpha, LIMIT=a.limit, **config, **gemm,
    )  # fmt: skip
    if need_up or need_down:
        config = weight_grad_config(S * K, E, size, target)
        up = cdiv(2 * I, config["BP"]) * cdiv(H, config["BG"]) if need_up else 0
        both = up + (cdiv(I, config["BP"]) * cdiv(H, config["BG"]) if need_down else 0)
        moe_experts_weight_grad_kernel[(both, E)](
            grad_pre, hidden, wanted("gate_up"), wanted("gate_up_bias"), weighted, grad, wanted("down"),
            wanted("down_bias"), weights, a.permutation, a.offsets,
            H=H, I=I, TOP_K=K, CONCATENATED=concatenated, NUM_UP=up, **config, **common,
        )  # fmt: skip
    if needs.hidden or needs.weights:
        expanded = None
        if needs.hidden:
            expanded = hidden.new_empty(S * K, H)
            config = gemm_config(rows, H, 2 * I, size, target, stored=bool(a.format))
            if few_registers and rows == 64:
                config |= dict(num_warps=4)
            moe_experts_rows_kernel[_grid(num_tiles, H, config)](
                grad_pre, gate_up, gate_up_scales, None, expanded, a.offsets, a.tiles, num_tiles, K=2 * I, N=H,
                STEP_K=H if in_rows else 1, STEP_N=1 if in_rows else 2 * I, **config, **gemm,
            )  # fmt: skip
        config = combine_config(S, H)
        moe_experts_combine_backward_kernel[(cdiv(S, config["BT"]), cdiv(H, config["BH"]))](
            expanded, a.inverse, a.offsets, result.hidden, partial, wanted("weights"), S, E=E, H=H, TOP_K=K,
            NUM_PARTIAL=0 if direct else column_tiles, **config,
        )  # fmt: skip
    return result
