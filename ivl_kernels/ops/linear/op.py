"""Schemas, fakes, backends, gradients and argument checks of the linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..._checks import (
    FLOATS,
    KERNEL_DTYPES,
    autocast_dtype,
    check_dtype,
    check_same,
    check_shape,
    check_tensor,
    describe,
)
from ..._positional import Implementation, Op


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


_linear = Op(
    "linear(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    package=__package__,
    key="x",
    implementations=(
        Implementation("native", "native:linear", ("cpu",), KERNEL_DTYPES),
        Implementation("reference", "reference:linear"),
    ),
    fake=lambda x, weight, bias, backend: x.new_empty(x.shape[0], weight.shape[0]),
)

_linear_backward = Op(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias, str backend)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    package=__package__,
    key="x",
    implementations=(
        Implementation("native", "native:linear_backward", ("cpu",), KERNEL_DTYPES),
        Implementation("reference", "reference:linear_backward"),
    ),
    fake=_fake_backward,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backend: str
    ) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.backend = backend
        return _linear(x, weight, bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        x, weight = ctx.saved_tensors
        if x is None:  # only its shape counts then
            x = weight.new_empty(1, 1).expand(grads[0].shape[0], weight.shape[1])
        found = _linear_backward(grads[0], x, weight, *needs, ctx.backend)
        return *(value if need else None for value, need in zip(found, needs)), None


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_dtype("x", x, FLOATS)
    check_tensor("weight", weight)
    if x.dim() == 0:
        raise ValueError(f"x: got {describe(x)}, expected shape [..., K]")
    check_shape("weight", weight, ("N", x.shape[-1]))
    check_same("weight", weight, "x", x)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        check_same("bias", bias, "x", x)


def _plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """The usual case, asked at once: a call for one token is mostly checks."""
    tensors = isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor)
    fits = tensors and x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    return fits and x.dtype == weight.dtype and x.dtype in FLOATS and x.device == weight.device


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backend: str) -> torch.Tensor:
    if bias is not None or not _plain(x, weight):
        _check(x, weight, bias)
    if dtype := autocast_dtype(x):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    grad = x.requires_grad or weight.requires_grad or bias is not None and bias.requires_grad
    if torch.is_grad_enabled() and grad:
        out = _Linear.apply(rows, weight, bias, backend)
    else:
        out = _linear(rows, weight, bias, backend)
    # As torch's own: no view, so that what was made without gradients may be written to with them.
    return out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.shape[0]])
