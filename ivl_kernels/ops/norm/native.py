"""Norms on the CPU: thin calls into csrc/cpu/norm.cpp."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import _native


@functools.cache
def _kernel(name: str) -> Any:
    return _native.op(name)


def _rows(x: Tensor) -> Tensor:
    """Contiguous as it is, or [R, C] with adjacent columns; a copy only where the strides leave no other way."""
    if x.is_contiguous():
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def norm(
    x: Tensor,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    round: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty(0, dtype=x.dtype) if residual is None else torch.empty_like(y)
    _kernel("norm")(
        _rows(x), None if residual is None else _rows(residual), _vector(layer_scale), _vector(weight), _vector(bias),
        eps, center, round, y, total,
    )  # fmt: skip
    return y, total


def norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    x: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor,
    bias: bool,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width = total.shape[-1]
    ds = torch.empty(total.shape, dtype=total.dtype)
    dx = torch.empty(total.shape if layer_scale is not None else 0, dtype=total.dtype)
    dscale, dweight, dbias = (torch.empty(width if given else 0) for given in (x is not None, True, bias))
    _kernel("norm_backward")(
        _rows(grad), None if grad_total is None else _rows(grad_total), _rows(total), None if x is None else _rows(x),
        _vector(layer_scale), _vector(weight), eps, center,
        ds, dx, dscale, dweight, dbias,
    )  # fmt: skip
    return ds, dx, dscale, dweight, dbias
