"""The projector: class token dropped, pixel shuffle as transformers does it, LayerNorm and linear layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as functional

from ... import ops
from ..catalogue import MODELS
from . import Case, Cost, Numbers, Shape, Subject, Timed, scaled
from ._case import Inputs, dtype_name

GRADIENTS = ("x", "norm_weight", "norm_bias", "weights", "biases")


@functools.cache
def _integers(values: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """Copied to a device once: a copy from the host cannot be captured in a CUDA graph."""
    return torch.tensor(values, device=device)


def inputs(n: Numbers, merge: int, tiles: int, side: int, widths: tuple[int, ...]) -> Inputs:
    linears = [n.linear(o, i) for i, o in zip(widths, widths[1:])]
    return {
        "x": n.normal(tiles, 1 + side * side, widths[0] // merge**2),
        "norm_weight": n.normal(widths[0], scale=0.1, shift=1.0),
        "norm_bias": n.normal(widths[0], scale=0.1),
        "weights": [w for w, _ in linears],
        "biases": [b for _, b in linears],
    }


def plain(v: Inputs, merge: int) -> torch.Tensor:
    x = v["x"]
    tiles, tokens, width = x.shape
    side = math.isqrt(tokens - 1)
    y = x[:, 1:].reshape(tiles, side, side // merge, width * merge).permute(0, 2, 1, 3).contiguous()
    y = y.view(tiles, side // merge, side // merge, -1).permute(0, 2, 1, 3).contiguous()
    y = y.view(tiles, -1, width * merge**2)
    y = functional.layer_norm(y, y.shape[-1:], v["norm_weight"], v["norm_bias"], 1e-5)
    for index, (weight, bias) in enumerate(zip(v["weights"], v["biases"])):
        y = functional.linear(functional.gelu(y) if index else y, weight, bias)
    return y


def _products(v: Inputs) -> torch.Tensor:
    """The matrix products alone, in warm buffers."""
    y = v["_rows"]
    for weight, out in zip(v["weights"], v["_buffers"]):
        y = torch.mm(y, weight.t(), out=out)
    return y


def row_pass_and_products(v: Inputs, merge: int) -> torch.Tensor:
    """On a GPU: our pass over the rows, then torch's products, with its GELU between them in place."""
    from ...ops.pixel_shuffle_mlp import op
    from ...ops.pixel_shuffle_mlp import triton as kernels

    side = math.isqrt(v["x"].shape[1] - 1)
    a = op.Projector(
        v["x"], v["norm_weight"], v["norm_bias"], v["weights"], v["biases"], merge, side, side, skip=1,
        transposed=False, eps=1e-5, tiles=None,
    )  # fmt: skip
    y = kernels.shuffled_rows(a)
    for index, (weight, bias) in enumerate(zip(v["weights"], v["biases"])):
        y = torch.addmm(bias, torch.ops.aten.gelu_(y) if index else y, weight.t())
    return y.view(len(v["x"]), -1, y.shape[1])


def cost(v: Inputs, merge: int, tiles: int) -> tuple[Cost, Cost]:
    from ...ops.pixel_shuffle_mlp import triton as kernels

    size, widths = v["x"].itemsize, (v["weights"][0].shape[1], *(w.shape[0] for w in v["weights"]))
    rows = tiles * (v["x"].shape[1] - 1) // merge**2
    products, hidden = sum(w.numel() for w in v["weights"]), sum(widths[1:-1])
    parameters = products + 2 * widths[0] + sum(widths[1:])
    least = size * (rows * (widths[0] + widths[-1]) + parameters)
    least_backward = size * (rows * (2 * widths[0] + widths[-1]) + 2 * parameters)
    # The tokens twice: a row's statistics need all of it before its first product. Then hidden rows out and in.
    planned = least + size * rows * (widths[0] + 2 * hidden)
    # Our passes between the vendor's products. GELU: pre and gradient in, gradient and activation out. Rows again: x
    # in, rows out. LayerNorm: x and gradient in, gradient out, then both in again for its parameters, sums over rows.
    # The parameters in, and for sums over rows a partial one in float32 from each slab.
    slabs = -(-rows // kernels.slab_config(rows, 1)[0]["SLAB"])
    planned_backward = size * (rows * (4 * hidden + 7 * widths[0]) + 3 * widths[0])
    planned_backward += 4 * slabs * (2 * widths[0] + hidden) + 4 * 2 * 3 * rows
    flops, elements = 2 * rows * products, rows * widths[-1]
    return Cost(least, flops, elements, planned), Cost(least_backward, 2 * flops, elements, planned_backward)


def case(merge: int, tiles: int, side: int, widths: tuple[int, ...]) -> Case:
    return Case(
        "pixel_shuffle_mlp",
        f"ratio 1/{merge**2}, class token in place, {tiles} tiles",
        lambda n: inputs(n, merge, tiles, side, widths),
        lambda v, backend: ops.pixel_shuffle_mlp(**v, merge=merge, skip=1, backend=backend),
        GRADIENTS,
        lambda v: plain(v, merge),
        lambda v: cost(v, merge, tiles),
        graph=True,
    )


def into(tiles: int, side: int, widths: tuple[int, ...]) -> Case:
    """Two of the tiles, to their rows of a buffer."""

    def call(v: Inputs, backend: str) -> torch.Tensor:
        tokens = (v["x"].shape[1] - 1) // 4
        out = v["x"].new_zeros(2 * tokens + 5, v["weights"][-1].shape[0])
        which, rows = _integers(((2, 0), (tokens + 3, 1)), out.device)
        return ops.pixel_shuffle_mlp(**v, skip=1, tile_indices=which, out=out, out_rows=rows, backend=backend)

    def plain_into(v: Inputs) -> torch.Tensor:
        each = plain(v, 2)
        pad = each.new_zeros(3, each.shape[-1])
        return torch.cat([pad[:1], each[0], pad[:2], each[2], pad[:2]])

    return Case(
        "pixel_shuffle_mlp_into_",
        "two of the tiles, to their rows of a buffer",
        lambda n: inputs(n, 2, tiles, side, widths),
        call,
        plain=plain_into,
        cost=lambda v: cost(v, 2, 2),
        graph=True,
    )


def cases(large: bool) -> Iterator[Case]:
    tiles, side = (5, 32) if large else (3, 8)
    for merge in (2, 4):
        widths = MODELS["InternVL3.5-1B"].projector(merge) if large else ((12 * merge**2,) + (20,) * merge + (28,))
        yield case(merge, tiles, side, widths)
    yield into(tiles, side, MODELS["InternVL3.5-1B"].projector(2) if large else (48, 20, 28))


def _timed(model: str, merge: int, tiles: int, dtype: torch.dtype, training: bool) -> Timed:
    widths = MODELS[model].projector(merge)
    rows = tiles * (32 // merge) ** 2
    name = dtype_name(dtype)
    one = case(merge, tiles, 32, widths)
    if not training:

        def make(n: Numbers) -> Inputs:
            buffers = [n.normal(rows, width) for width in widths]
            return one.inputs(n) | {"_rows": buffers[0], "_buffers": buffers[1:]}

        def call(v: Inputs, backend: str) -> torch.Tensor:
            own = {key: value for key, value in v.items() if not key.startswith("_")}
            return one.call(own, backend)

        peers: dict[str, Callable[[Inputs], torch.Tensor]] = {"gemms": _products}
        if torch.cuda.is_available():
            peers["row pass, addmm"] = functools.partial(row_pass_and_products, merge=merge)
        one = Case(one.op, one.name, make, call, GRADIENTS, one.plain, one.cost, peers=peers)
    params = {"model": model, "merge": merge, "tiles": tiles, "dtype": name}
    return Timed(
        "pixel_shuffle_mlp",
        f"{'forward + backward ' if training else ''}{model} 1/{merge**2} tiles={tiles} {name}",
        one,
        dtype,
        params | ({"training": True} if training else {}),
        training,
        compile=not training,
        unchecked=("gemms",),
    )


def timed(quick: bool) -> Iterator[Timed]:
    runs = [("InternVL3.5-1B", 2, 5)]
    if not quick:
        runs = [("InternVL3.5-1B", merge, tiles) for merge in (2, 4) for tiles in (1, 5, 13)]
        runs += [("InternVL3.5-8B", merge, tiles) for merge in (2, 4) for tiles in (1, 5)]
    for dtype in (torch.float32, torch.bfloat16):
        for model, merge, tiles in runs:
            yield _timed(model, merge, tiles, dtype, False)
            if model == "InternVL3.5-1B" and tiles < 13:
                yield _timed(model, merge, tiles, dtype, True)


def _at(merge: int, s: Shape) -> Case:
    """Into the rows of a buffer, as the patched model has it."""
    rows, cells = s.tiles * (s.side // merge) ** 2, (s.side // merge) ** 2
    starts = torch.arange(s.tiles) * cells

    def make(n: Numbers) -> Inputs:
        values = inputs(n, merge, s.tiles, s.side, s.model.projector(merge))
        return values | {"out": n.normal(rows, s.model.hidden)}

    def call(v: Inputs, backend: str) -> torch.Tensor:
        target = v | {"out": v["out"].detach()}
        return ops.pixel_shuffle_mlp(**target, out_rows=starts, merge=merge, skip=1, backend=backend)

    return Case(
        "pixel_shuffle_mlp", s.name, make, call, GRADIENTS, lambda v: plain(v, merge), lambda v: cost(v, merge, s.tiles)
    )


_NARROW = dict(hidden=256)
_SMALL = (
    scaled("InternVL3.5-8B", widths=_NARROW, tiles=2, side=16),
    scaled("InternVL3.5-38B", widths=_NARROW, tiles=3, side=4),
    scaled("InternVL3-1B", widths=dict(hidden=200), tiles=3, side=8),
)
SUBJECTS = {
    f"pixel_shuffle_mlp 1/{merge**2}": Subject(
        functools.partial(_at, merge), ("triton",), _SMALL, ("vision", "hidden"), memory_bound=False
    )
    for merge in (2, 4)
}
