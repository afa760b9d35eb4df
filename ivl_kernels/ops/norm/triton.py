"""Norms on GPUs: a program holds whole rows in registers, so every byte of x and residual is read once.

The backward gives each program a run of rows and keeps its partial gradients of the vectors in registers; the partial
sums are added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import Kernel, cdiv, lanes, next_power_of_2
from .op import Gradients, Norm, NormBackward, Normed, empty_normed


@triton.jit
def _through(x, dtype: tl.constexpr):
    """The value after a trip through `dtype`."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _normalised(s, mask, eps, WIDTH: tl.constexpr, CENTER: tl.constexpr):
    """s [BLOCK], zero outside the mask, normalised, and one over its standard deviation. Anything outside the mask."""
    if CENTER:
        s -= tl.sum(s, 0) / WIDTH
        if s.shape[0] > WIDTH:
            s = tl.where(mask, s, 0.0)
        rest, squares = tl.reduce((s, s * s), 0, _add_both)
        rest /= WIDTH  # what rounding left of the mean
        rstd = 1.0 / tl.sqrt_rn(squares / WIDTH - rest * rest + eps)
        return s * rstd - rest * rstd, rstd
    rstd = 1.0 / tl.sqrt_rn(tl.sum(s * s, 0) / WIDTH + eps)
    return s * rstd, rstd


@Kernel
@triton.jit
def norm_kernel(
    x, residual, layer_scale, weight, bias,  # [R, WIDTH] by rows, [R, WIDTH] by rows, [WIDTH], [WIDTH], [WIDTH]
    y, total,  # [R, WIDTH] contiguous
    rows, x_row, residual_row, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CENTER: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Program (block of ROWS rows)."""
    dtype: tl.constexpr = x.dtype.element_ty
    i = tl.arange(0, BLOCK)
    mask = i < WIDTH
    w = tl.load(weight + i, mask, 0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + i, mask, 0.0).to(tl.float32)
    if layer_scale is not None:
        scale = tl.load(layer_scale + i, mask, 0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for r in range(first, tl.minimum(first + ROWS, rows)):
        s = tl.load(x + r * x_row + i, mask, 0.0).to(tl.float32)
        if residual is not None:
            if layer_scale is not None:
                s = _through(s * scale, dtype)
            s = _through(tl.load(residual + r * residual_row + i, mask, 0.0).to(tl.float32) + s, dtype)
            tl.store(total + r * WIDTH + i, s.to(dtype), mask)
        n, _ = _normalised(s, mask, eps, WIDTH, CENTER)
        if ROUND:
            n = _through(n, dtype)
        n = n * w
        if bias is not None:
            n = n + b
        tl.store(y + r * WIDTH + i, n.to(dtype), mask)


@Kernel
@triton.jit
def norm_backward_kernel(
    grad, grad_total, total, x, layer_scale, weight,  # [R, WIDTH] by rows x 4, [WIDTH], [WIDTH]
    ds, dx,  # [R, WIDTH] contiguous
    partial,  # [programs, 3, WIDTH]: gradients of weight, bias and layer scale
    rows, grad_row, grad_total_row, total_row, x_row, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CENTER: tl.constexpr, BIAS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Program (block of ROWS rows). KEEP: registers have room for layer scale; else it is read again for each row."""
    dtype: tl.constexpr = total.dtype.element_ty
    i = tl.arange(0, BLOCK)
    mask = i < WIDTH
    w = tl.load(weight + i, mask, 0.0).to(tl.float32)
    if KEEP and layer_scale is not None:
        scale = tl.load(layer_scale + i, mask, 0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        dbias = tl.zeros([BLOCK], tl.float32)
    if x is not None:
        dscale = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for r in range(first, tl.minimum(first + ROWS, rows)):
        g = tl.load(grad + r * grad_row + i, mask, 0.0).to(tl.float32)
        n, rstd = _normalised(
            tl.load(total + r * total_row + i, mask, 0.0).to(tl.float32), mask, eps, WIDTH, CENTER
        )  # fmt: skip
        dweight += g * n
        if BIAS:
            dbias += g
        g = g * w
        if CENTER:
            along, offset = tl.reduce((g * n, g), 0, _add_both)
            d = (g - n * (along / WIDTH) - offset / WIDTH) * rstd
        else:
            d = (g - n * (tl.sum(g * n, 0) / WIDTH)) * rstd
        if grad_total is not None:
            d = d + tl.load(grad_total + r * grad_total_row + i, mask, 0.0).to(tl.float32)
        tl.store(ds + r * WIDTH + i, d.to(dtype), mask)
        if layer_scale is not None:
            if not KEEP:
                scale = tl.load(layer_scale + i, mask, 0.0).to(tl.float32)
            tl.store(dx + r * WIDTH + i, (d * scale).to(dtype), mask)
        if x is not None:
            dscale += d * tl.load(x + r * x_row + i, mask, 0.0).to(tl.float32)
    partial += tl.program_id(0).to(tl.int64) * 3 * WIDTH + i
    tl.store(partial, dweight, mask)
    if BIAS:
        tl.store(partial + WIDTH, dbias, mask)
    if x is not None:
        tl.store(partial + 2 * WIDTH, dscale, mask)


PROGRAMS = 264  # of the backward: two for each multiprocessor of the largest GPUs


def _warps(threads: int) -> int:
    return max(1, min(512, threads) // lanes())


def config(rows: int, width: int) -> dict[str, int]:
    """A row a program; a thread holds 16 elements of it."""
    block = next_power_of_2(width)
    return dict(BLOCK=block, ROWS=1, num_warps=_warps(block // 16), num_stages=1)


def backward_config(rows: int, width: int) -> dict[str, int]:
    """As many rows a program as leave PROGRAMS of them, and at least 4: each writes sums as long as three rows.

    A thread holds 8 or 16 elements of up to seven vectors.
    """
    block = next_power_of_2(width)
    rows = max(4, cdiv(rows, PROGRAMS))
    return dict(BLOCK=block, ROWS=rows, KEEP=block <= 4096, num_warps=_warps(block // 8), num_stages=1)


def _rows(x: Tensor | None) -> Any:
    """[R, C] with adjacent columns; a copy only where the strides leave no other way."""
    if x is None:
        return None
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def norm(a: Norm) -> Normed:
    result = empty_normed(a)
    x, residual = _rows(a.x), _rows(a.residual)
    vectors = [None if v is None else v.contiguous() for v in (a.layer_scale, a.weight, a.bias)]
    rows, width = x.shape
    if rows:
        options = config(rows, width)
        fusion = a.layer_scale is None  # else s has the bits of a product and a sum
        norm_kernel[(cdiv(rows, options["ROWS"]),)](
            x, residual, *vectors, *result, rows, x.stride(0), _row_stride(residual), a.eps, WIDTH=width,
            CENTER=a.center, ROUND=a.round, **options, enable_fp_fusion=fusion,
        )  # fmt: skip
    return result


def norm_backward(b: NormBackward) -> Gradients:
    ds = b.total.new_empty(b.total.shape)
    dx = b.total.new_empty(0 if b.layer_scale is None else b.total.shape)
    grad, grad_total, total, x = (_rows(t) for t in (b.grad, b.grad_total, b.total, b.x))
    layer_scale = None if b.layer_scale is None else b.layer_scale.contiguous()
    rows, width = total.shape
    options = backward_config(rows, width)
    programs = cdiv(rows, options["ROWS"])
    partial = total.new_empty(programs, 3, width, dtype=torch.float32)
    if rows:
        norm_backward_kernel[(programs,)](
            grad, grad_total, total, x, layer_scale, b.weight.contiguous(), ds, dx, partial, rows, grad.stride(0),
            _row_stride(grad_total), total.stride(0), _row_stride(x), b.eps, WIDTH=width, CENTER=b.center,
            BIAS=b.bias, **options, enable_fp_fusion=True,
        )  # fmt: skip
    wanted = (True, b.bias, x is not None)
    dweight, dbias, dscale = (partial[:, k].sum(0) if wanted[k] else partial.new_empty(0) for k in range(3))
    return Gradients(ds, dx, dscale, dweight, dbias)
