"""Records, fakes, backends and gradients of the two kinds of work of the tile router."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import FLOAT_NAMES, KERNEL_DTYPES
from ..._dispatch import Implementation
from ..._library import Op, differentiable


class Pool(NamedTuple):
    z: Tensor
    u: Tensor


class Pooled(NamedTuple):
    pooled: Tensor
    lse: Tensor  # [T, H], the logarithms of the softmax's denominators


class PoolBackward(NamedTuple):
    forward: Pool
    pooled: Tensor
    lse: Tensor
    grad: Tensor
    need_z: bool


class PoolGradients(NamedTuple):
    z: Tensor  # empty unless needed
    u: Tensor


class FewRows(NamedTuple):
    x: Tensor
    w: Tensor
    bias: Tensor | None


class FewRowsTransposed(NamedTuple):
    x: Tensor
    w: Tensor


class Route(NamedTuple):
    """The whole router, without dropout."""

    z: Tensor
    query: Tensor
    parameters: list[Tensor]  # of two attentions and any number of blocks, six each, then the gate's four
    heads: int
    eps: float


class Routed(NamedTuple):
    probabilities: Tensor
    logits: Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for the rest: what the router computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_pool_backward(b: PoolBackward) -> PoolGradients:
    z, u = b.forward
    return PoolGradients(z.new_empty(z.shape if b.need_z else (0,)), u.new_empty(u.shape))


_BACKENDS = (
    Implementation("cpu", FLOAT_NAMES),
    Implementation("triton", KERNEL_DTYPES),
    Implementation("reference"),
)

_pool = Op(
    "tile_pool",
    Pool,
    Pooled,
    key="z",
    implementations=_BACKENDS,
    fake=lambda a: (a.u.new_empty(a.u.shape), a.u.new_empty(a.u.shape[:2])),
)

_pool_backward = Op(
    "tile_pool_backward", PoolBackward, PoolGradients, key="z", implementations=_BACKENDS, fake=_fake_pool_backward
)

_linear = Op(
    "few_rows_linear",
    FewRows,
    Tensor,
    key="w",
    implementations=_BACKENDS,
    fake=lambda a: a.x.new_empty(a.x.shape[0], a.w.shape[0]),
)

_linear_transposed = Op(
    "few_rows_linear_transposed",
    FewRowsTransposed,
    Tensor,
    key="w",
    implementations=_BACKENDS,
    fake=lambda a: a.x.new_empty(a.x.shape[0], a.x.shape[1], a.w.shape[1]),
)


def _pool_gradients(saved: tuple[Pool, Tensor, Tensor], needs: Any, backend: str, grad: Tensor, _: None) -> Any:
    return _pool_backward(PoolBackward(*saved, grad, needs.z), backend)._asdict()


def _weight_gradient(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum over M of rows [M, G, N / G] times columns [M, G, K]: [N, K]."""
    return (rows.permute(1, 2, 0) @ columns.transpose(0, 1)).flatten(0, 1)


def _linear_gradients(saved: tuple[Tensor, Tensor], needs: Any, backend: str, grad: Tensor) -> dict[str, Tensor | None]:
    x, w = saved
    rows = grad.unflatten(1, (x.shape[1], -1)).contiguous()
    return {
        "x": _linear_transposed(FewRowsTransposed(rows, w), backend) if needs.x else None,
        "w": _weight_gradient(rows, x) if needs.w else None,
        "bias": grad.sum(0) if needs.bias else None,
    }


def _transposed_gradients(
    saved: tuple[FewRowsTransposed], needs: Any, backend: str, grad: Tensor
) -> dict[str, Tensor | None]:
    x, w = saved[0]
    grad = grad.contiguous()
    return {
        "x": _linear(FewRows(grad, w, None), backend).view(x.shape) if needs.x else None,
        "w": _weight_gradient(x, grad) if needs.w else None,
    }


pool = differentiable(_pool, lambda a, result: (a, *result), _pool_gradients)
linear = differentiable(_linear, lambda a, _: (a.x, a.w), _linear_gradients)
linear_transposed = differentiable(_linear_transposed, lambda a, _: (a,), _transposed_gradients)
