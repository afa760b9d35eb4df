"""Decoded photographs to the tiles that the vision transformer takes, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import op
from .grid import choose_grid

__all__ = ["MEAN", "STD", "choose_grid", "tile_image", "tile_images"]

# ImageNet's, of the released preprocessing.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def tile_image(
    photo: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    grid: tuple[int, int] | None = None,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile: int = 448,
    thumbnail: bool = True,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    out: Tensor | None = None,
    backend: str = "",
) -> Tensor:
    """A photograph cut into normalised tiles, row by row, its thumbnail last.

    The photograph is resized to its grid by the bicubic filter with antialias as Pillow computes it (two passes, each
    rounded to 8 bits), cut, and each level v becomes `(v / 255 - mean) / std`.

    Args:
        photo: [H, W, 3] uint8, RGB; or [F, H, W, 3], frames of a video. Rows and frames may be apart.
        dtype: of the tiles: float32, bfloat16, float16 or float64.
        grid: (columns, rows); None: `choose_grid` of the photograph's size, `min_tiles`, `max_tiles` and `tile`.
        tile: pixels of a tile's side.
        thumbnail: whether a photograph of several tiles gets one more, of the whole of it.
        mean, std: of the three channels, for levels from 0 to 1.
        out: contiguous, of the result's shape and on the photograph's device: takes the result; `dtype` is ignored.
        backend: force a backend; empty picks the best.

    Returns:
        [T, 3, tile, tile], or [F * T, 3, tile, tile] frame by frame. Every level is that of Pillow (up to 12).

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written then.

    No gradients. On the CPU the result does not depend on the number of threads.
    Source: `dynamic_preprocess` and `build_transform` of InternVL's model cards; Pillow's `ImagingResample`.

    Example:
        >>> tile_image(torch.zeros(3000, 4000, 3, dtype=torch.uint8), dtype=torch.bfloat16).shape
        torch.Size([13, 3, 448, 448])
    """
    return op.tile_image(photo, dtype, grid, min_tiles, max_tiles, tile, thumbnail, mean, std, out, backend)


def tile_images(
    photos: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile: int = 448,
    thumbnail: bool = True,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    backend: str = "",
) -> tuple[Tensor, list[int]]:
    """Photographs of any sizes, each cut as by `tile_image`, into one tensor.

    Args:
        photos: [H, W, 3] or [F, H, W, 3] uint8 each, on one device.
        dtype, min_tiles, max_tiles, tile, thumbnail, mean, std, backend: as in `tile_image`.

    Returns:
        Tiles [T, 3, tile, tile] of all, and how many are each photograph's (all frames' of a video).

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return op.tile_images(photos, dtype, min_tiles, max_tiles, tile, thumbnail, mean, std, backend)
