"""Norms on the CPU: thin calls into csrc/cpu/norm.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import _cpu
from .op import Gradients, Norm, NormBackward, Normed, empty_gradients, empty_normed


def _rows(x: Tensor | None) -> Tensor | None:
    """Contiguous as it is, or [R, C] with adjacent columns; a copy only where the strides leave no other way."""
    if x is None or x.is_contiguous():
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def norm(a: Norm) -> Normed:
    result = empty_normed(a)
    _cpu.op("norm")(
        _rows(a.x), _rows(a.residual), _vector(a.layer_scale), _vector(a.weight), _vector(a.bias), a.eps, a.center,
        a.round, *result,
    )  # fmt: skip
    return result


def norm_backward(b: NormBackward) -> Gradients:
    result = empty_gradients(b)
    _cpu.op("norm_backward")(
        _rows(b.grad), _rows(b.grad_total), _rows(b.total), _rows(b.x), _vector(b.layer_scale), _vector(b.weight),
        b.eps, b.center, *result,
    )  # fmt: skip
    return result
