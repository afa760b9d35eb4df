"""Schema, fake, backends and argument checks of tile_image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape, check_tensor, describe
from ..._dispatch import Implementation
from ..._library import Op
from .grid import choose_grid


class Tiling(NamedTuple):
    """photos [F, H, W, 3] uint8, out [F * T, 3, tile, tile], normalisation [2, 3] float64: mean and std."""

    photos: Tensor
    out: Tensor
    normalisation: Tensor
    columns: int
    rows: int
    thumbnail: bool


_tile_image = Op(
    "tile_image_",
    Tiling,
    NoneType,
    key="out",
    written=("out",),
    implementations=(
        Implementation("cpu", KERNEL_DTYPES),
        Implementation("reference"),
    ),
    fake=lambda a: None,
)


def _plan(
    name: str, photo: Tensor, grid: tuple[int, int] | None, low: int, high: int, tile: int, thumbnail: bool
) -> tuple[int, int, bool, int]:
    """Columns, rows, whether there is a thumbnail, and tiles in all of a checked photograph."""
    check_tensor(name, photo)
    if photo.dtype != torch.uint8 or photo.dim() not in (3, 4) or photo.shape[-1] != 3:
        raise ValueError(f"{name}: got {describe(photo)}, expected uint8 [H, W, 3] or [F, H, W, 3]")
    height, width = photo.shape[-3:-1]
    if height < 1 or width < 1:
        raise ValueError(f"{name}: got {describe(photo)}, expected at least one pixel")
    columns, rows = grid or choose_grid(width, height, min_tiles=low, max_tiles=high, tile=tile)
    if columns < 1 or rows < 1:
        raise ValueError(f"grid: got {columns} x {rows}, expected at least 1 x 1")
    thumbnail = thumbnail and columns * rows > 1
    frames = photo.shape[0] if photo.dim() == 4 else 1
    return columns, rows, thumbnail, frames * (columns * rows + thumbnail)


def _check_options(dtype: torch.dtype, tile: int, mean: Sequence[float], std: Sequence[float]) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}, expected float32, bfloat16, float16 or float64")
    if tile < 1:
        raise ValueError(f"tile: got {tile}, expected at least 1")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name}: got {len(values)} values, expected 3: one a channel")
    if not all(value > 0 for value in std):
        raise ValueError(f"std: got {tuple(std)}, expected positive values")


@functools.cache
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return torch.tensor([mean, std], dtype=torch.float64, device="cpu")


def _run(
    photo: Tensor, out: Tensor, columns: int, rows: int, small: bool, mean: Sequence[float], std: Sequence[float],
    backend: str,
) -> None:  # fmt: skip
    if out.numel():
        photos = photo if photo.dim() == 4 else photo[None]
        _tile_image(Tiling(photos, out, _normalisation(tuple(mean), tuple(std)), columns, rows, small), backend)


def tile_image(
    photo: Tensor,
    dtype: torch.dtype,
    grid: tuple[int, int] | None,
    min_tiles: int,
    max_tiles: int,
    tile: int,
    thumbnail: bool,
    mean: Sequence[float],
    std: Sequence[float],
    out: Tensor | None,
    backend: str,
) -> Tensor:
    _check_options(dtype, tile, mean, std)
    columns, rows, small, tiles = _plan("photo", photo, grid, min_tiles, max_tiles, tile, thumbnail)
    if out is None:
        out = photo.new_empty(tiles, 3, tile, tile, dtype=dtype)
    else:
        check_shape("out", out, (tiles, 3, tile, tile))
        check_dtype("out", out, FLOATS)
        check_same("out", out, "photo", photo, dtype=False)
        if not out.is_contiguous():
            raise ValueError(f"out: got strides {list(out.stride())}, expected a contiguous tensor")
    _run(photo, out, columns, rows, small, mean, std, backend)
    return out


def tile_images(
    photos: Sequence[Tensor],
    dtype: torch.dtype,
    min_tiles: int,
    max_tiles: int,
    tile: int,
    thumbnail: bool,
    mean: Sequence[float],
    std: Sequence[float],
    backend: str,
) -> tuple[Tensor, list[int]]:
    _check_options(dtype, tile, mean, std)
    plans = [_plan(f"photos[{i}]", p, None, min_tiles, max_tiles, tile, thumbnail) for i, p in enumerate(photos)]
    for i, photo in enumerate(photos):
        check_same(f"photos[{i}]", photo, "photos[0]", photos[0])
    counts = [tiles for *_, tiles in plans]
    device = photos[0].device if photos else None
    out = torch.empty(sum(counts), 3, tile, tile, dtype=dtype, device=device)
    for photo, part, (columns, rows, small, _) in zip(photos, out.split(counts) if counts else (), plans):
        _run(photo, part, columns, rows, small, mean, std, backend)
    return out, counts
