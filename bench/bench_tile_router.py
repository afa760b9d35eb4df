"""The tile router against the shipped one: eager, under torch.compile, and folded in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from bench.runner import Case, Work, compiled, device
from ivl_kernels.nn import TileRouter
from ivl_kernels.testing.shipped import ShippedRouter

TOKENS = 1024


def make(width: int, tiles: int, dtype: torch.dtype) -> Work:
    torch.manual_seed(0)
    shipped = ShippedRouter(width).eval().requires_grad_(False).to(device(), dtype)
    router = TileRouter.from_modules(shipped.pooling_before_gating, shipped.gating)
    plain = TileRouter.from_modules(shipped.pooling_before_gating, shipped.gating, backend="reference")
    vit = torch.randn(tiles, TOKENS + 1, width, device=device()).to(dtype)
    return Work(
        {
            "ours": lambda: router(vit, skip=1),
            "eager": lambda: shipped(vit),
            "compile": compiled(shipped, vit),
            "folded torch": lambda: plain(vit, skip=1),
        },
        truth=lambda: copy.deepcopy(shipped).double()(vit.double()),
    )


def cases(quick: bool) -> Iterator[Case]:
    shapes = [(1024, 5, torch.float32), (1024, 13, torch.float32)]
    if not quick:
        shapes += [(1024, 1, torch.float32), (1024, 5, torch.bfloat16), (1024, 13, torch.bfloat16)]
        shapes += [(3200, 5, torch.float32)]
    for width, tiles, dtype in shapes:
        weights = (4 + 4 + 8 * 4) * width * width  # both attentions and the gating blocks, once each
        yield Case(
            "tile_router",
            f"C={width} tiles={tiles} {str(dtype).removeprefix('torch.')}",
            {"width": width, "tiles": tiles},
            lambda width=width, tiles=tiles, dtype=dtype: make(width, tiles, dtype),
            bytes=dtype.itemsize * (tiles * TOKENS * width + weights),
            # Four poolings of 16 heads, and each weight used once for a tile (the second attention's three times).
            flops=2 * tiles * (4 * 2 * 16 * TOKENS * width + (4 * 4 + 8 * 4) * width * width),
            dtype=torch.float32,
            seconds=25.0,
        )
