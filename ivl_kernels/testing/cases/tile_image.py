"""Photographs to tiles; the comparison with Pillow's pipeline is bench/bench_tile_image.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import ops
from . import Case, Cost, Numbers
from ._case import Inputs


def case(width: int, height: int, tile: int) -> Case:
    def make(n: Numbers) -> Inputs:
        levels = n.uniform(height, width, 3, dtype=torch.float32) * 256
        # Only its dtype counts: that of the tiles.
        return {"photo": levels.to(torch.uint8), "like": n.normal(1)}

    def call(v: Inputs, backend: str) -> torch.Tensor:
        return ops.tile_image(v["photo"], dtype=v["like"].dtype, tile=tile, backend=backend)

    def cost(v: Inputs) -> tuple[Cost, Cost]:
        columns, rows = ops.choose_grid(width, height, tile=tile)
        elements = (columns * rows + (columns * rows > 1)) * 3 * tile**2
        return Cost(v["photo"].nbytes + elements * v["like"].itemsize, 0, elements), Cost(0)

    return Case("tile_image_", f"a photograph of {width} x {height}", make, call, cost=cost)


def cases(large: bool) -> Iterator[Case]:
    yield case(1600, 1200, 448) if large else case(60, 41, 18)
