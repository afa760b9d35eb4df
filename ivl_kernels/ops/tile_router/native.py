"""The tile router on the CPU: thin calls into csrc/cpu/tile_router.cpp."""

from __future__ import annotations

import torch

from ... import _native
from . import reference

# From this many rows on a library product, which packs the weights, beats streaming them.
MANY_ROWS = 128


def tile_pool(z: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = z if z.stride(2) == 1 else z.contiguous()
    u = u if u[0:1].is_contiguous() else u.contiguous()
    pooled, lse = u.new_empty(u.shape), u.new_empty(u.shape[:2])
    _native.op("tile_pool")(z, u, pooled, lse)
    return pooled, lse


def tile_pool_backward(
    z: torch.Tensor, u: torch.Tensor, pooled: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor, need_z: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    z = z if z.stride(2) == 1 else z.contiguous()
    u = u if u[0:1].is_contiguous() else u.contiguous()
    grad_u = u.new_empty(u.shape)
    grad_z = z.new_empty(z.shape if need_z else 0)
    pooled, lse, grad = pooled.contiguous(), lse.contiguous(), grad.contiguous()
    _native.op("tile_pool_backward")(z, u, pooled, lse, grad, grad_u, grad_z)
    return grad_z, grad_u


def few_rows_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.shape[0] >= MANY_ROWS:
        return reference.few_rows_linear(x, w, bias)
    w = w if w.stride(1) == 1 else w.contiguous()
    out = x.new_empty(x.shape[0], w.shape[0])
    bias = w.new_empty(0) if bias is None else bias.contiguous()
    _native.op("few_rows_linear")(x.contiguous(), w, bias, out)
    return out


def few_rows_linear_transposed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    if x.shape[0] >= MANY_ROWS:
        return reference.few_rows_linear_transposed(x, w)
    w = w if w.stride(1) == 1 else w.contiguous()
    out = x.new_empty(x.shape[0], x.shape[1], w.shape[1])
    _native.op("few_rows_linear_transposed")(x.contiguous(), w, out)
    return out
