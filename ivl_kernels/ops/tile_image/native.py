"""Tiles on the CPU: a thin call into csrc/cpu/tile_image.cpp."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _native


@functools.cache
def _affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """[3] each: (level / 255 - mean) / std is level * scale + shift."""
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / (255 * s)).float(), (-m / s).float()


def tile_image(
    photos: Tensor, out: Tensor, columns: int, rows: int, thumbnail: bool, mean: Sequence[float], std: Sequence[float]
) -> None:
    if photos.stride(3) != 1 or photos.stride(2) != 3:
        photos = photos.contiguous()
    scale, shift = _affine(tuple(mean), tuple(std))
    _native.op("tile_image")(photos, scale, shift, columns, rows, out.shape[-1], thumbnail, out)
