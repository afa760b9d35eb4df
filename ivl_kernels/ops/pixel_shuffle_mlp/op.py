"""Schemas, fakes, backends, gradients and argument checks of the projector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._checks import FLOAT_NAMES, FLOATS, KERNEL_DTYPES, autocast_dtype, check_dtype, check_same, check_shape
from ..._positional import Implementation, Op

_PARAMETERS = "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor[] weights, Tensor[] biases"
_GEOMETRY = "int merge, int height, int width, int skip, bool transposed, float eps, Tensor? tiles"


def _implementations(function: str) -> tuple[Implementation, ...]:
    return (
        Implementation("native", f"native:{function}", ("cpu",), FLOAT_NAMES),
        Implementation("triton", f"triton:{function}", ("cuda", "hip"), KERNEL_DTYPES),
        Implementation("reference", f"reference:{function}"),
    )


def _kept(x: Tensor, rows: int, weights: Sequence[Tensor], save: bool) -> Tensor:
    if not save or len(weights) < 2:
        return x.new_empty(0, 0)
    return x.new_empty(rows, sum(w.shape[0] for w in weights[:-1]))


def _fake_forward(x, norm_weight, norm_bias, weights, biases, merge, height, width, skip, transposed, eps, tiles, save,
                  backend):  # fmt: skip
    count, cells = (x if tiles is None else tiles).shape[0], height * width // merge**2
    return x.new_empty(count, cells, weights[-1].shape[0]), _kept(x, count * cells, weights, save)


def _fake_into(out, x, norm_weight, norm_bias, weights, biases, merge, height, width, skip, transposed, eps, tiles,
               starts, save, backend):  # fmt: skip
    return _kept(x, starts.shape[0] * (height * width // merge**2), weights, save)


def _fake_backward(grad, x, norm_weight, norm_bias, weights, biases, pre, merge, height, width, skip, transposed, eps,
                   tiles, needs, backend):  # fmt: skip
    inputs = [x, norm_weight, norm_bias, *weights, *biases]
    return [x.new_empty(t.shape if need else 0) for t, need in zip(inputs, needs)]


_forward = Op(
    f"pixel_shuffle_mlp({_PARAMETERS}, {_GEOMETRY}, bool save, str backend) -> (Tensor, Tensor)",
    package=__package__,
    key="x",
    implementations=_implementations("forward"),
    fake=_fake_forward,
)

_forward_into = Op(
    f"pixel_shuffle_mlp_into_(Tensor(a!) out, {_PARAMETERS}, {_GEOMETRY}, Tensor starts, bool save, str backend) "
    "-> Tensor",
    package=__package__,
    key="x",
    implementations=_implementations("forward_into"),
    fake=_fake_into,
)

_backward = Op(
    f"pixel_shuffle_mlp_backward(Tensor grad, {_PARAMETERS}, Tensor pre, {_GEOMETRY}, bool[] needs, str backend) "
    "-> Tensor[]",
    package=__package__,
    key="x",
    implementations=_implementations("backward"),
    fake=_fake_backward,
)


class _PixelShuffleMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, geometry: tuple, backend: str, tiles: Tensor | None, out: Tensor | None, starts: Tensor | None,
        x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *linears: Tensor,
    ) -> Tensor:  # fmt: skip
        count = len(linears) // 2
        weights, biases = list(linears[:count]), list(linears[count:])
        if out is None:
            result, pre = _forward(x, norm_weight, norm_bias, weights, biases, *geometry, tiles, True, backend)
        else:
            ctx.mark_dirty(out)
            args = (out, x, norm_weight, norm_bias, weights, biases, *geometry, tiles, starts, True, backend)
            result, pre = out, _forward_into(*args)
        ctx.save_for_backward(tiles, starts, pre, x, norm_weight, norm_bias, *linears)
        ctx.geometry, ctx.backend = geometry, backend
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        tiles, starts, pre, x, norm_weight, norm_bias, *linears = ctx.saved_tensors
        count = len(linears) // 2
        grad_out = None
        if starts is not None:
            merge, height, width = ctx.geometry[:3]
            cells = torch.arange(height * width // merge**2, device=grad.device)
            rows = (starts[:, None] + cells).flatten()
            if ctx.needs_input_grad[3]:
                grad_out = grad.index_fill(0, rows, 0)
            grad = grad.index_select(0, rows)
        needs = list(ctx.needs_input_grad[5:])
        found: list[Tensor | None] = [None] * len(needs)
        if any(needs):
            args = (norm_weight, norm_bias, linears[:count], linears[count:], pre)
            found = _backward(grad, x, *args, *ctx.geometry, tiles, needs, ctx.backend)
        return None, None, None, grad_out, None, *(g if need else None for g, need in zip(found, needs))


def _check_indices(name: str, indices: Tensor, limit: int, what: str) -> None:
    """On the CPU only: elsewhere it would wait for the device."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or indices.numel() == 0:
        return
    low, high = (int(v) for v in indices.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: got values from {low} to {high}, expected 0 to {limit - 1} ({what})")


def pixel_shuffle_mlp(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], merge: int,
    grid: tuple[int, int] | None, skip: int, order: str, eps: float, tile_indices: Tensor | None, out: Tensor | None,
    out_rows: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    check_shape("x", x, ("T", "skip + h * w", "C"))
    check_dtype("x", x, FLOATS)
    if merge < 1:
        raise ValueError(f"merge: got {merge}, expected at least 1")
    weights, biases = list(weights), list(biases)
    dtype = autocast_dtype(x)
    if dtype is not None and (out is None or out.dtype == dtype):
        x, norm_weight, norm_bias = (t.to(dtype) for t in (x, norm_weight, norm_bias))
        weights, biases = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    patches = x.shape[1] - skip
    if skip < 0 or patches < 0:
        raise ValueError(f"skip: got {skip}, expected 0 to {x.shape[1]}, the tokens of a tile")
    height, width = (math.isqrt(patches),) * 2 if grid is None else grid
    if height * width != patches or height < 1 or width < 1:
        wanted = "a square number of" if grid is None else f"{height} x {width}"
        raise ValueError(f"x: got {x.shape[1]} tokens a tile, expected {wanted} patches after the {skip} skipped")
    if height % merge or width % merge:
        raise ValueError(f"grid: got {height} x {width}, expected multiples of merge ({merge})")
    if order not in ("v1", "v2"):
        raise ValueError(f"order: got {order!r}, expected 'v1' or 'v2'")
    features = x.shape[2] * merge * merge
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_shape(name, tensor, (features,))
        check_same(name, tensor, "x", x)
    if not weights or len(weights) != len(biases):
        raise ValueError(f"biases: got {len(biases)} for {len(weights)} weights, expected as many, and at least one")
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        check_shape(f"weights[{i}]", weight, ("F", features))
        check_same(f"weights[{i}]", weight, "x", x)
        features = weight.shape[0]
        check_shape(f"biases[{i}]", bias, (features,))
        check_same(f"biases[{i}]", bias, "x", x)
    count, cells = x.shape[0], height * width // merge**2
    if tile_indices is not None:
        check_shape("tile_indices", tile_indices, ("K",))
        check_dtype("tile_indices", tile_indices, (torch.int64,))
        check_same("tile_indices", tile_indices, "x", x, dtype=False)
        _check_indices("tile_indices", tile_indices, count, "the tiles of x")
        count = tile_indices.shape[0]
    if (out is None) != (out_rows is None):
        raise ValueError("out_rows: expected together with out, and only then")
    if out is not None and out_rows is not None:
        check_shape("out", out, ("M", features))
        check_same("out", out, "x", x)
        check_shape("out_rows", out_rows, (count,))
        check_dtype("out_rows", out_rows, (torch.int64,))
        check_same("out_rows", out_rows, "x", x, dtype=False)
        _check_indices("out_rows", out_rows, out.shape[0] - cells + 1, f"{cells} rows a tile in out")
    geometry = (merge, height, width, skip, order == "v1", eps)
    parameters = (x, norm_weight, norm_bias, *weights, *biases)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*parameters, *(() if out is None else (out,)))):
        return _PixelShuffleMlp.apply(geometry, backend, tile_indices, out, out_rows, *parameters)
    if out is None:
        return _forward(x, norm_weight, norm_bias, weights, biases, *geometry, tile_indices, False, backend)[0]
    args = (x, norm_weight, norm_bias, weights, biases, *geometry, tile_indices, out_rows, False, backend)
    _forward_into(out, *args)
    return out
