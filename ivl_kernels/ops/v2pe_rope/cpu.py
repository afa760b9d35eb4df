"""Positions and rotary embedding on the CPU: thin calls into csrc/cpu/v2pe_rope.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import _cpu
from .op import (
    Gradients,
    Located,
    NormBackward,
    Positions,
    Rope,
    Rotated,
    empty_gradients,
    empty_located,
    empty_rotated,
)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotate(a: Rope, out: Rotated) -> None:
    """Into `out`, by way of tensors whose heads' elements are adjacent."""
    into = Rotated(_rows(out.q), _rows(out.k))
    q, k = into if out.q is a.q else (_rows(a.q), _rows(a.k))
    _cpu.op("v2pe_rope")(q, k, *into, *a[2:])
    for result, written in zip(out, into):
        if result is not written:
            result.copy_(written)


def v2pe_rope(a: Rope) -> Rotated:
    out = empty_rotated(a)
    _rotate(a, out)
    return out


def v2pe_rope_(a: Rope) -> None:
    _rotate(a, Rotated(a.q, a.k))


def v2pe_rope_norm_backward(b: NormBackward) -> Gradients:
    a = b.forward._replace(q=_rows(b.forward.q), k=_rows(b.forward.k))
    result = empty_gradients(b._replace(forward=a))
    _cpu.op("v2pe_rope_norm_backward")(_rows(b.grad_q), _rows(b.grad_k), a.q, a.k, *result, *a[2:])
    return result


def v2pe_position_ids(a: Positions) -> Located:
    result = empty_located(a)
    mask = None if a.mask is None else a.mask.contiguous()
    _cpu.op("v2pe_position_ids")(_rows(a.input_ids), mask, *a[2:], *result)
    return result
