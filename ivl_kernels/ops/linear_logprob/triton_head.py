"""What the kernels of one head and of two share: a tile of logits, tile shapes, and the products with its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gpu import capability, float32_precision, interpreting
from ..._targets import limits
from ..common.matmul import operands

LOWEST = tl.constexpr(-3.402823466e38)


@triton.jit
def _tanh(x):
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    square = size * size
    near = size + size * square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315)))  # where 1 - e loses digits
    value = tl.where(size < 0.15, near, far)
    return tl.where(x < 0, -value, value)


@triton.jit
def logits(x, w, bias, row, column, M, V, x_row, w_row, softcap, scale, H: tl.constexpr, BK: tl.constexpr,
            SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Of rows `row` and words `column`; those past the end are of the last row and word."""
    row_in = tl.minimum(row, M - 1).to(tl.int64)
    column_in = tl.minimum(column, V - 1).to(tl.int64)
    x_rows = x + row_in[:, None] * x_row
    w_rows = w + column_in[None, :] * w_row
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for k in range(0, H, BK):
        lanes = k + tl.arange(0, BK)
        if H % BK == 0:
            a = tl.load(x_rows + lanes[None, :])
            b = tl.load(w_rows + lanes[:, None])
        else:
            inside = lanes < H
            a = tl.load(x_rows + lanes[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(w_rows + lanes[:, None], mask=inside[:, None], other=0.0)
        b = b.to(a.dtype)
        a, b = operands(a, b, PRECISION, UPCAST)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + column_in).to(tl.float32)[None, :]
    if SOFTCAP:
        acc = softcap * _tanh(acc / softcap)
    return acc * scale


@triton.jit
def expm1_series(x):
    """e^x - 1 with all its digits for |x| < 0.5."""
    tail = 1 + x * (1.0 / 5) * (1 + x * (1.0 / 6) * (1 + x * (1.0 / 7) * (1 + x / 8)))
    return x * (1 + x * (1.0 / 2) * (1 + x * (1.0 / 3) * (1 + x * (1.0 / 4) * tail)))


@triton.jit
def expm1(x):
    """Of x <= 0."""
    return tl.where(x > -0.5, expm1_series(x), tl.exp(x) - 1.0)


RUN = 8  # tiles of the vocabulary that a program of the forward adds up
WORDS = 8192  # of a tile of the backward


def config(width: int, itemsize: int, target: int) -> dict[str, Any]:
    """By the width and the dtype only: the sums of a row do not depend on how many rows there are."""
    BM, BN = (64, 64) if itemsize == 4 else (128, 128)
    BK = 128 // itemsize
    while BK > 16 and 2 * width <= BK:
        BK //= 2
    limit = limits(target).pipeline
    while BK > 16 and limit // ((BM + BN) * BK * itemsize) < 2:
        BK //= 2
    stages = 2 if target == 0 else max(2, min(4, limit // ((BM + BN) * BK * itemsize)))
    return dict(BM=BM, BN=BN, BK=BK, num_warps=8 if itemsize == 2 else 4, num_stages=stages)


def options_of(x: Tensor, softcap: float) -> dict[str, Any]:
    target, upcast = capability(x), interpreting()
    precision = float32_precision() if x.element_size() == 4 and target and not upcast else "ieee"
    return dict(
        H=x.shape[1], SOFTCAP=softcap != 0, PRECISION=precision, UPCAST=upcast, enable_fp_fusion=True,
        **config(x.shape[1], x.element_size(), target),
    )  # fmt: skip


def gathered(hidden: Tensor, rows: Tensor | None) -> Tensor:
    x = hidden if rows is None else hidden.index_select(0, rows)
    return x if x.stride(1) == 1 else x.contiguous()


def rows_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        total.copy_(torch.addmm(total, a, b, out_dtype=torch.float32))
    else:
        torch.addmm(total, a.float(), b.float(), out=total)


def head_gradients(
    hidden: Tensor, rows: Tensor | None, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool],
    launch: Callable[[Tensor, int, int], None],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias, a tile of the vocabulary at a time; empty where not needed.

    `launch(dz, first, words)` fills dz [N, words], the gradients of the products with words [first, first + words).
    """
    need_hidden, need_weight, need_bias = needs
    count, vocabulary = x.shape[0], weight.shape[0]
    dx = x.new_zeros(count if need_hidden else 0, x.shape[1], dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    dbias = x.new_empty(vocabulary if need_bias else 0, dtype=torch.float32)
    if count == 0:
        dweight.zero_()
        dbias.zero_()
    tile = x.new_empty(count * min(WORDS, vocabulary))
    for first in range(0, vocabulary if count else 0, WORDS):
        last = min(first + WORDS, vocabulary)
        dz = tile[: count * (last - first)].view(count, last - first)
        launch(dz, first, last - first)
        words = weight[first:last]
        if need_weight:
            if weight.dtype == x.dtype:
                torch.mm(dz.t(), x, out=dweight[first:last])
            else:  # a float32 weight beside 16-bit rows
                dweight[first:last].zero_()
                _add_product(dweight[first:last], dz.t(), x)
        if need_hidden:
            _add_product(dx, dz, words.to(x.dtype))
        if need_bias:
            dbias[first:last] = dz.sum(0, dtype=torch.float32)
    dhidden = hidden.new_empty(0)
    if need_hidden:
        dhidden = dx.to(hidden.dtype)
        if rows is not None:
            dhidden = hidden.new_zeros(hidden.shape).index_add_(0, rows, dhidden)
    return dhidden, dweight, dbias
