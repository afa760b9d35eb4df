"""Records, fakes, backends, gradients and argument checks of the norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape, describe
from ..._dispatch import Implementation
from ..._library import Op, differentiable
from ..._plan import planned

# Width of a row that a GPU program holds in registers.
MAX_GPU_WIDTH = 16384


class Norm(NamedTuple):
    x: Tensor
    residual: Tensor | None
    layer_scale: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float
    center: bool  # LayerNorm
    round: bool  # the normalised rows are rounded to the dtype of x before the weight


class Normed(NamedTuple):
    y: Tensor
    total: Tensor  # residual + layer_scale * x, or empty


class NormBackward(NamedTuple):
    grad: Tensor
    grad_total: Tensor | None
    total: Tensor  # what was normalised
    x: Tensor | None  # when layer scale needs a gradient
    layer_scale: Tensor | None
    weight: Tensor
    bias: bool
    eps: float
    center: bool


class Gradients(NamedTuple):
    """Of the sum, of x (empty without layer scale), and in the arithmetic type of the vectors (empty without each)."""

    total: Tensor
    x: Tensor
    layer_scale: Tensor
    weight: Tensor
    bias: Tensor


def _too_wide(a: Norm | NormBackward) -> str | None:
    width = a.weight.shape[0]
    return f"rows of {width} do not fit a program's registers" if width > MAX_GPU_WIDTH else None


_BACKENDS = (
    Implementation("cpu", KERNEL_DTYPES),
    Implementation("triton", KERNEL_DTYPES, _too_wide),
    Implementation("reference"),
)


def empty_normed(a: Norm) -> Normed:
    """The results of the forward, to be written."""
    y = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    total = torch.empty(0, dtype=y.dtype, device=y.device) if a.residual is None else torch.empty_like(y)
    return Normed(y, total)


def empty_gradients(b: NormBackward) -> Gradients:
    """The results of the backward, to be written."""
    wide = torch.float64 if b.total.dtype == torch.float64 else torch.float32
    vectors = (b.weight.new_empty(len(b.weight) if on else 0, dtype=wide) for on in (b.x is not None, True, b.bias))
    dx = b.total.new_empty(0 if b.layer_scale is None else b.total.shape)
    return Gradients(b.total.new_empty(b.total.shape), dx, *vectors)


_norm = Op("norm", Norm, Normed, key="x", implementations=_BACKENDS, fake=empty_normed)
_norm_backward = Op(
    "norm_backward", NormBackward, Gradients, key="total", implementations=_BACKENDS, fake=empty_gradients
)


def _save(a: Norm, normed: Normed) -> tuple[Any, ...]:
    """The fields of `NormBackward` after the gradients of the results."""
    x = a.x if a.layer_scale is not None and a.layer_scale.requires_grad else None
    total = a.x if a.residual is None else normed.total
    return total, x, a.layer_scale, a.weight, a.bias is not None, a.eps, a.center


def _gradients(
    saved: tuple[Any, ...], needs: Any, backend: str, grad: Tensor | None, grad_total: Tensor | None
) -> dict[str, Tensor | None]:
    if needs.residual is None:  # the sum is then no result; compiled graphs have a gradient of it all the same
        grad_total = None
    b = NormBackward(torch.zeros_like(saved[0]) if grad is None else grad, grad_total, *saved)
    found = _norm_backward(b, backend)
    x = found.total if b.layer_scale is None else found.x
    layer_scale = None if b.x is None else found.layer_scale
    return found._asdict() | {"x": x, "residual": found.total, "layer_scale": layer_scale}


_differentiable = differentiable(_norm, _save, _gradients)


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


def rounds(rounding: str) -> bool:
    """`Norm.round`."""
    if rounding not in ("before_weight", "after_weight"):
        raise ValueError(f"rounding: got {rounding!r}, expected 'before_weight' or 'after_weight'")
    return rounding == "before_weight"


@planned
def norm(a: Norm, backend: str) -> Tensor | tuple[Tensor, Tensor]:
    x, residual = a.x, a.residual
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        check_dtype("x", x, FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got {describe(x)}, expected [..., C] with C > 0")
    _check_vector("weight", a.weight, x, not a.round)
    if a.bias is not None:
        _check_vector("bias", a.bias, x, True)
    if a.layer_scale is not None:
        _check_vector("layer_scale", a.layer_scale, x, False)
        if residual is None:
            raise ValueError("layer_scale: got one without residual, expected both (residual + layer_scale * x)")
    if residual is not None and not _alike(residual, x, x.shape):
        check_shape("residual", residual, x.shape)
        check_same("residual", residual, "x", x)
    normed = _differentiable(a, backend)
    return normed.y if residual is None else normed
