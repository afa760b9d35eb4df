"""Kernels of the backward: `down` transposed through the activation, weight gradients, the sum over the choices."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton import Kernel
from ..common.activations import gated_backward
from .triton_forward import combine_tile
from .triton_tiles import halves, mma, product, runs_at, tile


@triton.jit
def _down_backward_store(
    acc, weight, pre, weighted, grad_pre, row, live, first, I: tl.constexpr, CONCATENATED: tl.constexpr,
    GPT_OSS: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """From the gradient of the activation without the weight; returns these columns' share of the weight's gradient."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    if BM * BN >= 64 * 64:
        left, right = halves(acc)
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
    acc = product(
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
    expert, first, end, n = tile(tl.program_id(0), tiles, offsets, num_tiles, E, tl.cdiv(I, BN), BM, GROUP)
    if expert == E:
        return
    for part in tl.static_range(3):
        if runs_at(part, end - first, BM):
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
        acc = mma(left, right, acc, False, PRECISION, UPCAST)
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
        combine_tile(y, None, inverse, offsets, out, S, E, H, TOP_K, BT, BH)
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
