"""Records, fakes, backends, gradients and argument checks of the linear layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

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
from ..._dispatch import Implementation
from ..._library import Op, differentiable


class Linear(NamedTuple):
    x: Tensor  # [M, K]
    weight: Tensor
    bias: Tensor | None


class LinearBackward(NamedTuple):
    grad: Tensor
    x: Tensor
    weight: Tensor
    need_x: bool
    need_weight: bool
    need_bias: bool


class Gradients(NamedTuple):
    """Empty where not needed."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def _fake_backward(b: LinearBackward) -> Gradients:
    return Gradients(
        b.x.new_empty(b.x.shape if b.need_x else (0,)),
        b.x.new_empty(b.weight.shape if b.need_weight else (0,)),
        b.x.new_empty(b.weight.shape[0] if b.need_bias else 0),
    )


_BACKENDS = (Implementation("cpu", KERNEL_DTYPES), Implementation("reference"))

_linear = Op(
    "linear",
    Linear,
    Tensor,
    key="x",
    implementations=_BACKENDS,
    fake=lambda a: a.x.new_empty(a.x.shape[0], a.weight.shape[0]),
)

_linear_backward = Op(
    "linear_backward", LinearBackward, Gradients, key="x", implementations=_BACKENDS, fake=_fake_backward
)


def _save(a: Linear, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """As torch: what is not needed may be written to before the backward."""
    return a.x if a.weight.requires_grad else None, a.weight if a.x.requires_grad else None


def _gradients(saved: Any, needs: Any, backend: str, grad: Tensor) -> dict[str, Tensor]:
    # Of what is missing only the shape counts.
    depth = next((t.shape[1] for t in saved if t is not None), 0)
    x, weight = (grad.new_zeros(1, 1).expand(rows, depth) if t is None else t for t, rows in zip(saved, grad.shape))
    return _linear_backward(LinearBackward(grad, x, weight, needs.x, needs.weight, bool(needs.bias)), backend)._asdict()


_differentiable = differentiable(_linear, _save, _gradients)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dtype("x", x, FLOATS)
    check_tensor("weight", weight)
    if x.dim() == 0:
        raise ValueError(f"x: got {describe(x)}, expected shape [..., K]")
    check_shape("weight", weight, ("N", x.shape[-1]))
    check_same("weight", weight, "x", x)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        check_same("bias", bias, "x", x)


def _plain(x: Tensor, weight: Tensor) -> bool:
    """The usual case, asked at once: a call for one token is mostly checks."""
    tensors = isinstance(x, Tensor) and isinstance(weight, Tensor)
    fits = tensors and x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    return fits and x.dtype == weight.dtype and x.dtype in FLOATS and x.device == weight.device


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    if bias is not None or not _plain(x, weight):
        _check(x, weight, bias)
    if dtype := autocast_dtype(x):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    out = _differentiable(Linear(rows, weight, bias), backend)
    # As torch's own: no view, so that what was made without gradients may be written to with them.
    return out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.shape[0]])
