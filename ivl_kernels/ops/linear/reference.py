"""A linear layer in plain torch."""

from __future__ import annotations

import torch


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = _wide(x) @ _wide(weight).t()
    return (out if bias is None else out + _wide(bias)).to(x.dtype)


def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias; empty where not needed."""
    grad, nothing = _wide(grad), x.new_empty(0)
    return (
        (grad @ _wide(weight)).to(x.dtype) if need_x else nothing,
        (grad.t() @ _wide(x)).to(x.dtype) if need_weight else nothing,
        grad.sum(0).to(x.dtype) if need_bias else nothing,
    )
