"""Schemas, fakes, backends, gradients and argument checks of the MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
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
from ..._dispatch import Implementation
from ..._library import Op


def _implementations(function: str) -> tuple[Implementation, ...]:
    return (
        Implementation("native", f"native:{function}", ("cpu",), KERNEL_DTYPES),
        Implementation("reference", f"reference:{function}"),
    )


def _fake(
    x: Tensor, gate: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    save: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kept = (x.shape[0], up.shape[0] * (1 if gate is None else 2)) if save else (0, 0)
    return x.new_empty(x.shape[0], down.shape[0]), x.new_empty(kept)


def _fake_backward(
    grad: Tensor, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, pre: Tensor, needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:  # fmt: skip
    shapes = (x.shape, up.shape, up.shape, up.shape[:1], down.shape, down.shape[:1])
    return [x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs)]


_mlp = Op(
    "mlp(Tensor x, Tensor? gate, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, bool save, str backend)"
    " -> (Tensor out, Tensor pre)",
    package=__package__,
    key="x",
    implementations=_implementations("mlp"),
    fake=_fake,
)

_backward = Op(
    "mlp_backward(Tensor grad, Tensor x, Tensor? gate, Tensor up, Tensor down, Tensor pre, bool[] needs, str backend)"
    " -> Tensor[]",
    package=__package__,
    key="x",
    implementations=_implementations("mlp_backward"),
    fake=_fake_backward,
)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, gate: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor,
        down_bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, pre = _mlp(x, gate, up, up_bias, down, down_bias, True, backend)
        ctx.save_for_backward(x, gate, up, down, pre)
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[1:])
        found = _backward(grads[0], *ctx.saved_tensors, needs, ctx.backend)
        return None, *(value if need else None for value, need in zip(found, needs))


def mlp(
    x: Tensor, gate: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    backend: str,
) -> Tensor:  # fmt: skip
    check_dtype("x", x, FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got {describe(x)}, expected [..., C] with C > 0")
    check_tensor("up", up)
    check_shape("up", up, ("F", x.shape[-1]))
    check_tensor("down", down)
    check_shape("down", down, ("H", up.shape[0]))
    for name, tensor, shape in (
        ("gate", gate, up.shape), ("up", up, up.shape), ("up_bias", up_bias, up.shape[:1]),
        ("down", down, down.shape), ("down_bias", down_bias, down.shape[:1]),
    ):  # fmt: skip
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_same(name, tensor, "x", x)
    tensors = [x, gate, up, up_bias, down, down_bias]
    if dtype := autocast_dtype(x):
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    rows = tensors[0].reshape(-1, x.shape[-1])  # type: ignore[union-attr]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out = _Mlp.apply(backend, rows, *tensors[1:])
    else:
        out = _mlp(rows, *tensors[1:], False, backend)[0]
    # As a linear layer's: no view.
    return out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, [*x.shape[:-1], down.shape[0]])
