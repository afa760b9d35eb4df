"""A linear layer on the CPU: the products of csrc/include/ivl/gemm/."""

from __future__ import annotations

import torch

from ... import _native


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b + bias; a of any strides, b of one stride 1."""
    out = a.new_empty(a.shape[0], b.shape[1])
    if a.shape[1] == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    _native.op("matmul_into")(a, b, a.new_empty(0) if bias is None else bias.contiguous(), out, False, False)
    return out


def _row_or_column(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if 1 in tensor.stride() else tensor.contiguous()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _product(x, _row_or_column(weight).t(), bias)


def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nothing = x.new_empty(0)
    return (
        _product(grad, _row_or_column(weight)) if need_x else nothing,
        _product(grad.t(), _row_or_column(x)) if need_weight else nothing,
        grad.sum(0, dtype=torch.float32).to(x.dtype) if need_bias else nothing,
    )
