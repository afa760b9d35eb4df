"""A linear layer on the CPU: the products of csrc/include/ivl/gemm/."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu
from .op import Gradients, Linear, LinearBackward


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias; a of any strides, b of one stride 1."""
    out = a.new_empty(a.shape[0], b.shape[1])
    if a.shape[1] == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    _cpu.op("matmul_into")(a, b, a.new_empty(0) if bias is None else bias.contiguous(), out, False, False)
    return out


def _row_or_column(tensor: Tensor) -> Tensor:
    return tensor if 1 in tensor.stride() else tensor.contiguous()


def linear(a: Linear) -> Tensor:
    return _product(a.x, _row_or_column(a.weight).t(), a.bias)


def linear_backward(b: LinearBackward) -> Gradients:
    nothing = b.x.new_empty(0)
    return Gradients(
        _product(b.grad, _row_or_column(b.weight)) if b.need_x else nothing,
        _product(b.grad.t(), _row_or_column(b.x)) if b.need_weight else nothing,
        b.grad.sum(0, dtype=torch.float32).to(b.x.dtype) if b.need_bias else nothing,
    )
