"""The MLPs on GPUs: the vendor's products, and one kernel between them in each direction.

SwiGLU's gates and ups are the halves of one matrix, which the two products write, so that the activation and its
gradient each read and write every number once; the backward computes the activation again beside its gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ..._triton import Kernel, cdiv
from .op import Mlp, MlpBackward, MlpGradients, MlpResult

BLOCK = 1024  # columns of a program


@Kernel
@triton.jit
def mlp_active_kernel(
    pre,  # [R, INNER], or GATED [R, 2 * INNER]: gates, ups
    active,  # [R, INNER]
    INNER: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < INNER
    pre += row * (2 * INNER if GATED else INNER) + i
    z = tl.load(pre, mask, 0.0).to(tl.float32)
    if GATED:
        value = z * tl.sigmoid(z) * tl.load(pre + INNER, mask, 0.0).to(tl.float32)
    else:
        value = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    tl.store(active + row * INNER + i, value.to(active.dtype.element_ty), mask)


@Kernel
@triton.jit
def mlp_active_backward_kernel(
    pre,  # as above
    grad,  # [R, INNER], of `active`; `active` takes its place
    change,  # like `pre`: its gradient
    INNER: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block of columns)."""
    dtype: tl.constexpr = grad.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < INNER
    first = row * (2 * INNER if GATED else INNER) + i
    grad += row * INNER + i
    z = tl.load(pre + first, mask, 0.0).to(tl.float32)
    g = tl.load(grad, mask, 0.0).to(tl.float32)
    if GATED:
        up = tl.load(pre + first + INNER, mask, 0.0).to(tl.float32)
        s = tl.sigmoid(z)
        silu = z * s
        tl.store(grad, (silu * up).to(dtype), mask)
        tl.store(change + first, (g * up * s * (1.0 + z * (1.0 - s))).to(dtype), mask)
        tl.store(change + first + INNER, (g * silu).to(dtype), mask)
    else:
        area = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        tl.store(grad, (z * area).to(dtype), mask)
        tl.store(change + first, (g * (area + z * tl.exp(-0.5 * z * z) * 0.3989422804014327)).to(dtype), mask)


def _grid(rows: int, inner: int) -> tuple[int, int]:
    return rows, cdiv(inner, BLOCK)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def mlp(a: Mlp) -> MlpResult:
    rows, inner, gated = a.x.shape[0], a.up.shape[0], a.gate is not None
    active = a.x.new_empty(rows, inner)
    if a.gate is None:
        pre = functional.linear(a.x, a.up, a.up_bias)
    else:
        pre = a.x.new_empty(rows, 2 * inner)
        torch.mm(a.x, a.gate.t(), out=pre[:, :inner])
        torch.mm(a.x, a.up.t(), out=pre[:, inner:])
    if active.numel():
        mlp_active_kernel[_grid(rows, inner)](
            pre, active, INNER=inner, GATED=gated, BLOCK=BLOCK, enable_fp_fusion=False
        )  # fmt: skip
    out = functional.linear(active, a.down, a.down_bias)
    return MlpResult(out, pre if a.keep else a.x.new_empty(0, 0))


def mlp_backward(b: MlpBackward) -> MlpGradients:
    rows, inner, gated = b.x.shape[0], b.up.shape[0], b.gate is not None
    nothing = b.x.new_empty(0)
    active = b.grad @ b.down  # its gradient first
    change = torch.empty_like(b.pre, memory_format=torch.contiguous_format)
    if active.numel():
        mlp_active_backward_kernel[_grid(rows, inner)](
            b.pre.contiguous(), active, change, INNER=inner, GATED=gated, BLOCK=BLOCK, enable_fp_fusion=False
        )  # fmt: skip
    gates, ups = change.tensor_split(2, 1) if gated else (change, change)
    dx = nothing
    if b.need_x:
        dx = ups @ b.up if b.gate is None else torch.addmm(ups @ b.up, gates, b.gate)
    return MlpGradients(
        dx,
        gates.t() @ b.x if b.need_gate else nothing,
        ups.t() @ b.x if b.need_up else nothing,
        ups.sum(0) if b.need_up_bias else nothing,
        b.grad.t() @ active if b.need_down else nothing,
        b.grad.sum(0) if b.need_down_bias else nothing,
    )
