"""A linear layer in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Gradients, Linear, LinearBackward


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def linear(a: Linear) -> Tensor:
    out = _wide(a.x) @ _wide(a.weight).t()
    return (out if a.bias is None else out + _wide(a.bias)).to(a.x.dtype)


def linear_backward(b: LinearBackward) -> Gradients:
    grad, nothing, dtype = _wide(b.grad), b.x.new_empty(0), b.x.dtype
    return Gradients(
        (grad @ _wide(b.weight)).to(dtype) if b.need_x else nothing,
        (grad.t() @ _wide(b.x)).to(dtype) if b.need_weight else nothing,
        grad.sum(0).to(dtype) if b.need_bias else nothing,
    )
