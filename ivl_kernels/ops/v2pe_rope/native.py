"""Positions and rotary embedding on the CPU: thin calls into csrc/cpu/v2pe_rope.cpp."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ... import _native

Pair = tuple[torch.Tensor, torch.Tensor]


@functools.cache
def _kernel(name: str) -> Any:
    return _native.op(name)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rope(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Pair:
    out = torch.empty_like(q), torch.empty_like(k)
    into = _rows(out[0]), _rows(out[1])
    _kernel("v2pe_rope")(_rows(q), _rows(k), *into, *rest)
    for result, written in zip(out, into):
        if result is not written:
            result.copy_(written)
    return out


def rope_(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> None:
    wide = _rows(q), _rows(k)
    _kernel("v2pe_rope")(*wide, *wide, *rest, False)
    for tensor, written in zip((q, k), wide):
        if tensor is not written:
            tensor.copy_(written)


def norm_backward(
    grad_q: torch.Tensor, grad_k: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = _rows(q), _rows(k)
    out = torch.empty_like(q), torch.empty_like(k)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = q.new_empty(q.shape[3], dtype=wide), q.new_empty(q.shape[3], dtype=wide)
    _kernel("v2pe_rope_norm_backward")(_rows(grad_q), _rows(grad_k), q, k, *out, *weights, *rest)
    return *out, *weights


def position_ids(
    input_ids: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None, *rest: Any
) -> Pair:
    positions = torch.empty(input_ids.shape, dtype=torch.float32)
    info = torch.empty(5, dtype=torch.float64)
    mask = None if mask is None else mask.contiguous()
    _kernel("v2pe_position_ids")(_rows(input_ids), mask, cu_seqlens, *rest, positions, info)
    return positions, info
