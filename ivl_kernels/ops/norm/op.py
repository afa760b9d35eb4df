"""Schemas, fakes, backends, gradients and argument checks of the norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._checks import FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape, describe
from ..._positional import Implementation, Op

# Width of a row that a GPU program holds in registers.
MAX_GPU_WIDTH = 16384


def _too_wide(x: Tensor, *_: Any) -> str | None:
    return f"rows of {x.shape[-1]} do not fit a program's registers" if x.shape[-1] > MAX_GPU_WIDTH else None


def _implementations(function: str) -> tuple[Implementation, ...]:
    return (
        Implementation("native", f"native:{function}", ("cpu",), KERNEL_DTYPES),
        Implementation("triton", f"triton:{function}", ("cuda", "hip"), KERNEL_DTYPES, _too_wide),
        Implementation("reference", f"reference:{function}"),
    )


def _fake_norm(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


_norm = Op(
    "norm(Tensor x, Tensor? residual, Tensor? layer_scale, Tensor weight, Tensor? bias, float eps, bool center, "
    "bool round, str backend) -> (Tensor, Tensor)",
    package=__package__,
    key="x",
    implementations=_implementations("norm"),
    fake=_fake_norm,
)


def _fake_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    x: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor,
    bias: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if total.dtype == torch.float64 else torch.float32
    width = total.shape[-1]

    def vector(given: bool) -> Tensor:
        return total.new_empty(width if given else 0, dtype=wide)

    dx = total.new_empty(0 if layer_scale is None else total.shape)
    return total.new_empty(total.shape), dx, vector(x is not None), vector(True), vector(bias)


_norm_backward = Op(
    "norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor? x, Tensor? layer_scale, Tensor weight, "
    "bool bias, float eps, bool center, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    package=__package__,
    key="total",
    implementations=_implementations("norm_backward"),
    fake=_fake_norm_backward,
)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        layer_scale: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        eps, center, round, backend = options
        y, total = _norm(x, residual, layer_scale, weight, bias, eps, center, round, backend)
        ctx.options = options
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        keeps_x = layer_scale is not None and layer_scale.requires_grad
        ctx.save_for_backward(x if residual is None else total, x if keeps_x else None, layer_scale, weight)
        if residual is None:
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, x, layer_scale, weight = ctx.saved_tensors
        eps, center, _, backend = ctx.options
        if grad is None:
            grad = torch.zeros_like(total)
        has_bias = ctx.bias_dtype is not None
        ds, dx, dscale, dweight, dbias = _norm_backward(
            grad, grad_total, total, x, layer_scale, weight, has_bias, eps, center, backend
        )
        return (
            ds if layer_scale is None else dx,
            ds if ctx.needs_input_grad[1] else None,
            None if x is None else dscale.to(total.dtype),
            dweight.to(weight.dtype),
            dbias.to(ctx.bias_dtype) if has_bias else None,
            None,
        )


def _alike(tensor: Tensor, x: Tensor, shape: torch.Size) -> bool:
    """The usual case, asked at once: a call for one token is mostly checks."""
    fits = isinstance(tensor, Tensor) and tensor.dtype == x.dtype
    return fits and tensor.shape == shape and tensor.device == x.device


def _check_vector(name: str, vector: Tensor, x: Tensor, wide: bool) -> None:
    """[C], in the dtype of x, or where `wide` in float32."""
    if not _alike(vector, x, x.shape[-1:]):
        check_shape(name, vector, x.shape[-1:])
        check_same(name, vector, "x", x, dtype=False)
        check_dtype(name, vector, (x.dtype, torch.float32) if wide else (x.dtype,))


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    center: bool,
    rounding: str,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        check_dtype("x", x, FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got {describe(x)}, expected [..., C] with C > 0")
    if rounding not in ("before_weight", "after_weight"):
        raise ValueError(f"rounding: got {rounding!r}, expected 'before_weight' or 'after_weight'")
    round = rounding == "before_weight"
    _check_vector("weight", weight, x, not round)
    if bias is not None:
        _check_vector("bias", bias, x, True)
    if layer_scale is not None:
        _check_vector("layer_scale", layer_scale, x, False)
        if residual is None:
            raise ValueError("layer_scale: got one without residual, expected both (residual + layer_scale * x)")
    if residual is not None and not _alike(residual, x, x.shape):
        check_shape("residual", residual, x.shape)
        check_same("residual", residual, "x", x)
    tensors = [t for t in (x, residual, layer_scale, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y, total = _Norm.apply(x, residual, layer_scale, weight, bias, (eps, center, round, backend))
    else:
        y, total = _norm(x, residual, layer_scale, weight, bias, eps, center, round, backend)
    return y if residual is None else (y, total)
