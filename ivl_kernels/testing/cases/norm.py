"""Norms after residual add and layer scale, as the vision and the language layers have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional

from ... import ops
from . import Case, Cost, Numbers, Timed
from ._case import Inputs, dtype_name


def _inputs(n: Numbers, rows: int, width: int, *vectors: str) -> Inputs:
    values = {"x": n.normal(rows, width), "residual": n.normal(rows, width)}
    return values | {name: n.normal(width, scale=0.1, shift=1.0) for name in vectors}


def layer_norm(rows: int, width: int) -> Case:
    """Of a sum with layer scale: the vision transformer's."""

    def plain(v: Inputs) -> Any:
        s = v["residual"] + v["layer_scale"] * v["x"]
        return functional.layer_norm(s, s.shape[-1:], v["weight"], v["bias"], 1e-6), s

    def cost(v: Inputs) -> tuple[Cost, Cost]:
        size = v["x"].itemsize * width
        # Backward: gradients of both results, the sum and x in; gradients of residual and x out.
        return Cost(size * (4 * rows + 3), 0, rows * width), Cost(size * (6 * rows + 5), 0, rows * width)

    return Case(
        "norm",
        f"LayerNorm of a layer-scaled sum, {rows} rows of {width}",
        lambda n: _inputs(n, rows, width, "weight", "bias", "layer_scale"),
        lambda v, backend: ops.layer_norm(**v, backend=backend),
        ("x", "residual", "layer_scale", "weight", "bias"),
        plain,
        cost,
        graph=True,
    )


def rms_norm(rows: int, width: int, rounding: str = "before_weight") -> Case:
    """Of a sum: Qwen's (rounded before the weight) or GPT-OSS's."""

    def plain(v: Inputs) -> Any:
        s = v["residual"] + v["x"]
        y = s.float() if s.itemsize < 4 else s
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (v["weight"] * (y.to(s.dtype) if rounding == "before_weight" else y)).to(s.dtype), s

    def cost(v: Inputs) -> tuple[Cost, Cost]:
        size = v["x"].itemsize * width
        # Backward: gradients of both results and the sum in; the gradient of x, which is that of residual, out.
        return Cost(size * (4 * rows + 1), 0, rows * width), Cost(size * (4 * rows + 2), 0, rows * width)

    return Case(
        "norm",
        f"RMSNorm of a sum, rounded {rounding.replace('_', ' ')}, {rows} rows of {width}",
        lambda n: _inputs(n, rows, width, "weight"),
        lambda v, backend: ops.rms_norm(**v, rounding=rounding, backend=backend),
        ("x", "residual", "weight"),
        plain,
        cost,
        graph=True,
    )


def cases(large: bool) -> Iterator[Case]:
    rows, width = (1025, 1024) if large else (13, 72)
    yield layer_norm(rows, width)
    for rounding in ("before_weight", "after_weight"):
        yield rms_norm(rows, width, rounding)


def timed(quick: bool) -> Iterator[Timed]:
    shapes = [("layer norm", 5 * 1025, 1024), ("rms norm", 1344, 1024)]
    if not quick:
        shapes += [("layer norm", 1025, 1024)]
        shapes += [("rms norm", 3392, 1024), ("rms norm", 1344, 4096), ("rms norm", 1, 1024)]
    for kind, rows, width in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for training in (False, True) if rows > 1 else (False,):
                name = dtype_name(dtype)
                yield Timed(
                    "norm",
                    f"{'forward + backward ' if training else ''}{kind} {rows} x {width} {name}",
                    (layer_norm if kind == "layer norm" else rms_norm)(rows, width),
                    dtype,
                    dict(kind=kind, rows=rows, width=width, dtype=name, training=training),
                    training,
                    seconds=2.0,
                )
