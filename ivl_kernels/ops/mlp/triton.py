"""The MLPs on GPUs: the vendor's products, and for SwiGLU one kernel between them in each direction.

Gates and ups are the halves of one matrix, which the two products write, so that the activation and its gradient each
read and write every number once; the backward computes the activation again beside its gradient.
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
def gated_kernel(
    pre,  # [R, 2 * INNER]: gates, ups
    active,  # [R, INNER]
    INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < INNER
    gate = tl.load(pre + row * 2 * INNER + i, mask, 0.0).to(tl.float32)
    up = tl.load(pre + row * 2 * INNER + INNER + i, mask, 0.0).to(tl.float32)
    tl.store(active + row * INNER + i, (gate * tl.sigmoid(gate) * up).to(active.dtype.element_ty), mask)


@Kernel
@triton.jit
def gated_backward_kernel(
    pre,  # [R, 2 * INNER]: gates, ups
    grad,  # [R, INNER], of `active`; `active` takes its place
    change,  # [R, 2 * INNER], the gradient of `pre`
    INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block of columns)."""
    dtype: tl.constexpr = grad.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < INNER
    gate = tl.load(pre + row * 2 * INNER + i, mask, 0.0).to(tl.float32)
    up = tl.load(pre + row * 2 * INNER + INNER + i, mask, 0.0).to(tl.float32)
    g = tl.load(grad + row * INNER + i, mask, 0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    tl.store(grad + row * INNER + i, (silu * up).to(dtype), mask)
    tl.store(change + row * 2 * INNER + i, (g * up * s * (1.0 + gate * (1.0 - s))).to(dtype), mask)
    tl.store(change + row * 2 * INNER + INNER + i, (g * silu).to(dtype), mask)


def _grid(rows: int, inner: int) -> tuple[int, int]:
    return rows, cdiv(inner, BLOCK)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def mlp(a: Mlp) -> MlpResult:
    rows, inner = a.x.shape[0], a.up.shape[0]
    if a.gate is None:
        pre = _linear(a.x, a.up, a.up_bias)
        active = functional.gelu(pre)
    else:
        pre, active = a.x.new_empty(rows, 2 * inner), a.x.new_empty(rows, inner)
        torch.mm(a.x, a.gate.t(), out=pre[:, :inner])
        torch.mm(a.x, a.up.t(), out=pre[:, inner:])
        if active.numel():
            gated_kernel[_grid(rows, inner)](pre, active, INNER=inner, BLOCK=BLOCK, enable_fp_fusion=False)
    return MlpResult(_linear(active, a.down, a.down_bias), pre if a.keep else a.x.new_empty(0, 0))


def mlp_backward(b: MlpBackward) -> MlpGradients:
    rows, inner = b.x.shape[0], b.up.shape[0]
    nothing = b.x.new_empty(0)
    active = b.grad @ b.down  # its gradient first
    if b.gate is None:
        ups = gates = torch.ops.aten.gelu_backward(active, b.pre)
        active = functional.gelu(b.pre) if b.need_down else active
    else:
        change = torch.empty_like(b.pre, memory_format=torch.contiguous_format)
        if active.numel():
            gated_backward_kernel[_grid(rows, inner)](
                b.pre.contiguous(), active, change, INNER=inner, BLOCK=BLOCK, enable_fp_fusion=False
            )
        gates, ups = change.tensor_split(2, 1)
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
