"""Schemas, fakes, backends, gradients and argument checks of the MLPs."""

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
from ..._plan import planned


class Mlp(NamedTuple):
    """With a gate the activation is SwiGLU, without the exact GELU. `keep`: also return the input of the activation."""

    x: Tensor
    gate: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    keep: bool


class MlpResult(NamedTuple):
    """`pre` is [rows, F], with a gate [rows, 2 F], gates before ups; [0, 0] unless it was kept."""

    out: Tensor
    pre: Tensor


class MlpBackward(NamedTuple):
    grad: Tensor
    x: Tensor
    gate: Tensor | None
    up: Tensor
    down: Tensor
    pre: Tensor
    need_x: bool
    need_gate: bool
    need_up: bool
    need_up_bias: bool
    need_down: bool
    need_down_bias: bool


class MlpGradients(NamedTuple):
    """Empty where not needed."""

    x: Tensor
    gate: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


def empty_result(a: Mlp) -> MlpResult:
    """The results of `mlp`, to be written."""
    kept = (a.x.shape[0], a.up.shape[0] * (1 if a.gate is None else 2)) if a.keep else (0, 0)
    return MlpResult(a.x.new_empty(a.x.shape[0], a.down.shape[0]), a.x.new_empty(kept))


def empty_gradients(b: MlpBackward) -> MlpGradients:
    shapes = (b.x.shape, b.up.shape, b.up.shape, b.up.shape[:1], b.down.shape, b.down.shape[:1])
    return MlpGradients(*(b.x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, b[6:])))


_BACKENDS = (
    Implementation("cpu", KERNEL_DTYPES),
    Implementation("triton", KERNEL_DTYPES),
    Implementation("reference"),
)

_mlp = Op("mlp", Mlp, MlpResult, key="x", implementations=_BACKENDS, fake=empty_result)

_mlp_backward = Op("mlp_backward", MlpBackward, MlpGradients, key="x", implementations=_BACKENDS, fake=empty_gradients)


def _save(a: Mlp, result: MlpResult) -> Any:
    """What is not needed may be written to before the backward, as with torch's linear layers."""
    before = a.up.requires_grad or a.gate is not None and a.gate.requires_grad
    inside = before or a.x.requires_grad or a.up_bias is not None and a.up_bias.requires_grad
    first = (a.gate, a.up) if a.x.requires_grad else (None, None)
    return a.x if before else None, *first, a.down if inside else None, result.pre


def _gradients(saved: Any, needs: Any, backend: str, grad: Tensor, _: None) -> dict[str, Tensor]:
    x, gate, up, down, pre = saved
    # Of what is missing only the shape counts.
    nothing, width = grad.new_zeros(1, 1), next((t.shape[1] for t in (x, up) if t is not None), 0)
    inner = pre.shape[1] // (1 if needs.gate is None else 2)
    if x is None:
        x = nothing.expand(grad.shape[0], width)
    if up is None:
        up = nothing.expand(inner, width)
        gate = None if needs.gate is None else up
    if down is None:
        down = nothing.expand(grad.shape[1], inner)
    wanted = (needs.x, bool(needs.gate), needs.up, bool(needs.up_bias), needs.down, bool(needs.down_bias))
    return _mlp_backward(MlpBackward(grad, x, gate, up, down, pre, *wanted), backend)._asdict()


_differentiable = differentiable(_mlp, _save, _gradients, prepare=lambda a: a._replace(keep=True))


@planned
def mlp(a: Mlp, backend: str) -> Tensor:
    check_dtype("x", a.x, FLOATS)
    if a.x.dim() == 0 or a.x.shape[-1] == 0:
        raise ValueError(f"x: got {describe(a.x)}, expected [..., C] with C > 0")
    check_tensor("up", a.up)
    check_shape("up", a.up, ("F", a.x.shape[-1]))
    inner = a.up.shape[0]
    check_shape("down", a.down, ("H", inner))
    shapes = {"gate": a.up.shape, "up": a.up.shape, "up_bias": (inner,), "down": a.down.shape}
    for name, shape in (shapes | {"down_bias": a.down.shape[:1]}).items():
        tensor = getattr(a, name)
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_same(name, tensor, "x", a.x)
    shape, outputs = a.x.shape, a.down.shape[0]
    if dtype := autocast_dtype(a.x):
        a = a._replace(**{n: t.to(dtype) for n, t in zip(a._fields, a) if isinstance(t, Tensor)})
    out = _differentiable(a._replace(x=a.x.reshape(-1, shape[-1])), backend).out
    # As a linear layer's: no view.
    return out if len(shape) == 2 else torch.ops.aten._unsafe_view(out, [*shape[:-1], outputs])
