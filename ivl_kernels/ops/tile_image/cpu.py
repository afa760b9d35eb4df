"""Tiles on the CPU: a thin call into csrc/cpu/tile_image.cpp."""

from __future__ import annotations

from ... import _cpu
from .op import Tiling


def tile_image_(a: Tiling) -> None:
    photos = a.photos
    if photos.stride(3) != 1 or photos.stride(2) != 3:
        photos = photos.contiguous()
    mean, std = a.normalisation
    # (level / 255 - mean) / std is level * scale + shift.
    affine = (1 / (255 * std)).float(), (-mean / std).float()
    _cpu.op("tile_image_")(photos, *affine, a.columns, a.rows, a.thumbnail, a.out)
