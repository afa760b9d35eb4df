"""The router of Flash: four poolings of a tile's tokens, residual blocks and a gate. Eager is the shipped one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from ... import ops
from ...ops.tile_router import Attention, Block, Gate
from . import Case, Cost, Numbers, Shape, Subject, scaled
from ._case import Inputs

HEADS = 16


def inputs(n: Numbers, tiles: int, tokens: int, width: int) -> Inputs:
    def norm() -> tuple[torch.Tensor, torch.Tensor]:
        return n.normal(width, scale=0.1, shift=1.0), n.normal(width, scale=0.1)

    return {
        "z": n.normal(tiles, 1 + tokens, width),
        "query": n.normal(1, width),
        "attentions": [Attention(*n.linear(3 * width, width), *n.linear(width, width), *norm()) for _ in range(2)],
        "blocks": [Block(*n.linear(4 * width, width), *n.linear(width, 4 * width), *norm()) for _ in range(4)],
        "gate": Gate(*norm(), *n.linear(2, width)),
    }


def shipped(v: Inputs) -> Any:
    """The shipped router of the same widths, whose weights are its own: for what it launches, not for its numbers."""
    from ..shipped import ShippedRouter

    with mock.patch("ivl_kernels.testing.shipped.checkpoint", lambda f, *rest, **_: f(*rest)):
        return ShippedRouter(v["z"].shape[2], HEADS).eval().to(v["z"].dtype)(v["z"])


def least(tiles: int, tokens: int, width: int, size: int) -> tuple[int, int]:
    """Bytes, forward and backward with gradients of the tokens and of all parameters."""
    weights = (4 + 4 + 4 * 8) * width * width  # both attentions and the gating blocks
    z = tiles * tokens * width
    return size * (z + weights), size * (2 * z + 2 * weights)


def flops(tiles: int, tokens: int, width: int) -> int:
    """Four poolings, and each weight used once for a tile (the second attention's three times)."""
    return 2 * tiles * (4 * 2 * HEADS * tokens * width + (4 * 4 + 8 * 4) * width * width)


def cost(v: Inputs, heads: int) -> tuple[Cost, Cost]:
    from ...ops.tile_router import triton as kernels

    tiles, tokens, width = v["z"].shape[0], v["z"].shape[1] - 1, v["z"].shape[2]
    size = v["z"].itemsize
    # Four rounds of attention, each after the one before: z and the weights of an attention once a round, then the
    # blocks. In float32: the queries in, a partial sum from each program out and in, the pooled rows out and in.
    weights = (4 * 4 + 4 * 8) * width * width * size
    splits = -(-tokens // kernels.pool_config(tokens, width, tiles)["split_rows"])
    between = 4 * heads * width * 4 * tiles * (2 + 2 * splits + 2)
    planned = 4 * tiles * tokens * width * size + weights + between
    work, elements = flops(tiles, tokens, width), tiles * tokens * width
    forward, backward = least(tiles, tokens, width, size)
    return Cost(forward, work, elements, planned), Cost(backward, 2 * work, elements, planned)


def case(tiles: int, tokens: int, width: int, heads: int) -> Case:
    return Case(
        "tile_pool",
        f"router of {tiles} tiles of {tokens} tokens",
        lambda n: inputs(n, tiles, tokens, width),
        lambda v, backend: ops.tile_router(*v.values(), skip=1, heads=heads, backend=backend),
        ("z", "query"),
        cost=lambda v: cost(v, heads),
        graph=True,
    )


def cases(large: bool) -> Iterator[Case]:
    yield case(5, 1024, 1024, HEADS) if large else case(3, 37, 64, 4)


def _at(s: Shape) -> Case:
    # At real shapes, where nothing runs, parameters keep still: their gradients are the vendor's products.
    return Case(
        "tile_pool",
        s.name,
        lambda n: inputs(n, s.tiles, s.side**2, s.model.vision),
        lambda v, backend: ops.tile_router(*v.values(), skip=1, heads=HEADS, backend=backend),
        ("z",) if s.real else ("z", "query", "attentions", "blocks", "gate"),
        shipped,
        lambda v: cost(v, HEADS),
    )


def _pooling(s: Shape) -> Case:
    """The pooling of one round: what the router's time goes into."""
    from ...ops.tile_router import triton as kernels
    from ...ops.tile_router.op import _Pool

    tiles, tokens, width = s.tiles, s.side**2, s.model.vision

    def cost(v: Inputs) -> tuple[Cost, Cost]:
        count, size = v["z"].numel(), v["z"].itemsize
        splits = -(-tokens // kernels.pool_config(tokens, width, tiles)["split_rows"])
        parts = -(-width // kernels.scores_config(tokens, width, tiles, size, 80)["part_width"])
        pieces = -(-tokens // kernels.sum_config(tokens, width, tiles, size, 80)["split_rows"])
        # In float32 numbers for each head of a tile. Fused: z once, queries in, a program's partial sum, largest and
        # total out and in, pooled and lse out.
        planned, passes = width + 2 * splits * (width + 2) + width + 1, 1
        if not kernels.fused(width, HEADS, size, 80):
            # z twice, queries in, partial scores out and in, weights out and in, lse and partial sums out.
            planned, passes = width + 2 * (parts + 1) * tokens + 1 + pieces * width, 2
        # z twice, queries, gradients, lse and a mean in, both partial scores out and in, weights and slopes out, slopes
        # in, partial sums out.
        planned_backward = 2 * width + 2 + (4 * parts + 3) * tokens + pieces * width
        rows, work = 4 * tiles * HEADS, 4 * HEADS * count
        planned, planned_backward = passes * count * size + rows * planned, 2 * count * size + rows * planned_backward
        forward = Cost(count * size + rows * (2 * width + 1), work, count, planned)
        return forward, Cost(2 * count * size + rows * (4 * width + 1), 2 * work, count, planned_backward)

    return Case(
        "tile_pool",
        s.name,
        lambda n: {"z": n.normal(tiles, tokens, width), "u": n.normal(tiles, HEADS, width, dtype=torch.float32)},
        lambda v, backend: _Pool.apply(v["z"], v["u"], backend),
        ("u", "z"),
        cost=cost,
    )


_A8 = "InternVL3.5-8B"
SUBJECTS = {
    "tile_router": Subject(
        _at,
        ("triton",),
        (scaled(_A8, widths=dict(vision=256), tiles=2, side=16), scaled(_A8, widths=dict(vision=272), tiles=1, side=8)),
        ("flash", "vision"),
        memory_bound=False,
    ),
    "tile_router pooling": Subject(
        _pooling,
        ("triton",),
        (scaled(_A8, tiles=2, side=16), scaled("InternVL3.5-38B", tiles=1, side=12)),
        ("flash", "vision"),
    ),
}
