"""The tile router on the CPU: thin calls into csrc/cpu/tile_router.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import _cpu
from . import reference
from .op import FewRows, FewRowsTransposed, Pool, PoolBackward, Pooled, PoolGradients

# From this many rows on a library product, which packs the weights, beats streaming them.
MANY_ROWS = 128


def _inputs(a: Pool) -> Pool:
    u = a.u if a.u[0:1].is_contiguous() else a.u.contiguous()
    return Pool(a.z if a.z.stride(2) == 1 else a.z.contiguous(), u)


def _rows(w: Tensor) -> Tensor:
    return w if w.stride(1) == 1 else w.contiguous()


def tile_pool(a: Pool) -> Pooled:
    z, u = _inputs(a)
    result = Pooled(u.new_empty(u.shape), u.new_empty(u.shape[:2]))
    _cpu.op("tile_pool")(z, u, *result)
    return result


def tile_pool_backward(b: PoolBackward) -> PoolGradients:
    z, u = _inputs(b.forward)
    result = PoolGradients(z.new_empty(z.shape if b.need_z else 0), u.new_empty(u.shape))
    _cpu.op("tile_pool_backward")(z, u, b.pooled.contiguous(), b.lse.contiguous(), b.grad.contiguous(), *result)
    return result


def few_rows_linear(a: FewRows) -> Tensor:
    if a.x.shape[0] >= MANY_ROWS:
        return reference.few_rows_linear(a)
    out = a.x.new_empty(a.x.shape[0], a.w.shape[0])
    bias = None if a.bias is None else a.bias.contiguous()
    _cpu.op("few_rows_linear")(a.x.contiguous(), _rows(a.w), bias, out)
    return out


def few_rows_linear_transposed(a: FewRowsTransposed) -> Tensor:
    if a.x.shape[0] >= MANY_ROWS:
        return reference.few_rows_linear_transposed(a)
    out = a.x.new_empty(a.x.shape[0], a.x.shape[1], a.w.shape[1])
    _cpu.op("few_rows_linear_transposed")(a.x.contiguous(), _rows(a.w), out)
    return out
