"""Records, fakes, backends, gradients and argument checks of the projector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _gpu
from ..._checks import FLOAT_NAMES, FLOATS, KERNEL_DTYPES, autocast_dtype, check_dtype, check_same, check_shape
from ..._dispatch import Implementation
from ..._library import Op, differentiable
from ..._plan import planned


class Projector(NamedTuple):
    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    merge: int
    height: int
    width: int
    skip: int
    transposed: bool
    eps: float
    tiles: Tensor | None
    keep: bool = False

    @property
    def geometry(self) -> tuple[Any, ...]:
        """merge, height, width, skip, transposed and eps."""
        return self[5:11]

    @property
    def selected(self) -> int:
        """How many tiles."""
        return (self.x if self.tiles is None else self.tiles).shape[0]

    @property
    def cells(self) -> int:
        """Rows a tile."""
        return self.height * self.width // self.merge**2

    @property
    def features(self) -> int:
        """Columns of a shuffled row."""
        return self.norm_weight.shape[0]


class Projected(NamedTuple):
    out: Tensor
    pre: Tensor  # the inputs of the GELUs side by side [rows, sum of widths] when `keep`, or [0, 0]


class ProjectorInto(NamedTuple):
    out: Tensor
    starts: Tensor  # tile k goes to the rows of `out` from starts[k] on
    forward: Projector


class ProjectorBackward(NamedTuple):
    grad: Tensor
    forward: Projector
    pre: Tensor
    needs: list[bool]  # x, norm_weight, norm_bias, the weights, the biases: as the results, which are empty where not


def empty_pre(a: Projector) -> Tensor:
    if not a.keep or len(a.weights) < 2:
        return a.x.new_empty(0, 0)
    return a.x.new_empty(a.selected * a.cells, sum(w.shape[0] for w in a.weights[:-1]))


def inputs_of(a: Projector) -> list[Tensor]:
    """The tensors that may need gradients, in their order."""
    return [a.x, a.norm_weight, a.norm_bias, *a.weights, *a.biases]


def _fake_forward(a: Projector) -> Projected:
    return Projected(a.x.new_empty(a.selected, a.cells, a.weights[-1].shape[0]), empty_pre(a))


def _fake_backward(b: ProjectorBackward) -> list[Tensor]:
    return [t.new_empty(t.shape if need else 0) for t, need in zip(inputs_of(b.forward), b.needs)]


_BACKENDS = (
    Implementation("cpu", FLOAT_NAMES),
    Implementation("triton", KERNEL_DTYPES),
    Implementation("reference"),
)

_forward = Op("pixel_shuffle_mlp", Projector, Projected, key="x", implementations=_BACKENDS, fake=_fake_forward)

_forward_into = Op(
    "pixel_shuffle_mlp_into_",
    ProjectorInto,
    Tensor,
    key="x",
    implementations=_BACKENDS,
    fake=lambda a: empty_pre(a.forward),
    written=("out",),
)

_backward = Op(
    "pixel_shuffle_mlp_backward",
    ProjectorBackward,
    list[Tensor],
    key="x",
    implementations=_BACKENDS,
    fake=_fake_backward,
)


def _gradients(saved: tuple[Projector, Tensor], needs: Any, backend: str, grad: Tensor, _: None) -> dict[str, Any]:
    wanted = [needs.x, needs.norm_weight, needs.norm_bias, *needs.weights, *needs.biases]
    if not any(wanted):
        return {}
    found, layers = _backward(ProjectorBackward(grad, *saved, wanted), backend), len(needs.weights)
    named = dict(zip(("x", "norm_weight", "norm_bias"), found))
    return {**named, "weights": found[3 : 3 + layers], "biases": found[3 + layers :]}


def _into_gradients(saved: tuple[Any, ...], needs: Any, backend: str, grad: Tensor, _: None) -> dict[str, Any]:
    starts, *rest = saved
    rows = (starts[:, None] + torch.arange(rest[0].cells, device=grad.device)).flatten()
    out = grad.index_fill(0, rows, 0) if needs.out else None
    return {**_gradients((rest[0], rest[1]), needs.forward, backend, grad.index_select(0, rows), None), "out": out}


_differentiable = differentiable(
    _forward, lambda a, projected: (a, projected.pre), _gradients, prepare=lambda a: a._replace(keep=True)
)
_differentiable_into = differentiable(
    _forward_into,
    lambda a, pre: (a.starts, a.forward, pre),
    _into_gradients,
    prepare=lambda a: a._replace(forward=a.forward._replace(keep=True)),
)


def _check_indices(name: str, indices: Tensor, limit: int, what: str) -> None:
    """On the CPU only: elsewhere it would wait for the device."""
    if not _gpu.on_host(indices) or torch.compiler.is_compiling() or indices.numel() == 0:
        return
    low, high = (int(v) for v in indices.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: got values from {low} to {high}, expected 0 to {limit - 1} ({what})")


@planned
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
    a = Projector(
        x, norm_weight, norm_bias, weights, biases, merge, height, width, skip, order == "v1", eps, tile_indices
    )
    if out is None or out_rows is None:
        return _differentiable(a, backend).out
    _differentiable_into(ProjectorInto(out, out_rows, a), backend)
    return out
