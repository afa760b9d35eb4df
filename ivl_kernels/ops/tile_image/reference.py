"""Tiles in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .op import Tiling


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def weights(size: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Of each of `wanted` results along an axis of `size`: the pixels it is made of, and their weights [wanted, K].

    Weights are whole multiples of 2 ** -22, as Pillow has them.
    """
    scale = size / wanted
    stretch = max(scale, 1.0)
    support = 2 * stretch
    most = 2 * math.ceil(support) + 1
    which = torch.zeros(wanted, most, dtype=torch.int64, device="cpu")
    values = torch.zeros(wanted, most, dtype=torch.float64, device="cpu")
    for i in range(wanted):
        center = (i + 0.5) * scale
        first, last = max(0, int(center - support + 0.5)), min(size, int(center + support + 0.5))
        row = [_bicubic((k - center + 0.5) / stretch) for k in range(first, last)]
        which[i, : len(row)] = torch.arange(first, last, device="cpu")
        exact = values.new_tensor(row) / sum(row)
        values[i, : len(row)] = (exact.abs() * 2**22 + 0.5).floor().copysign(exact) * 2.0**-22
    return which, values


def _along(x: Tensor, axis: int, wanted: int) -> Tensor:
    """`x` resized along an axis and rounded to whole levels from 0 to 255, halves up."""
    which, values = weights(x.shape[axis], wanted)
    which, values = which.to(x.device), values.to(x)
    shape = [1] * x.dim()
    shape[axis] = wanted
    total = sum(x.index_select(axis, w) * v.view(shape) for w, v in zip(which.unbind(1), values.unbind(1)))
    assert isinstance(total, Tensor)
    return total.add_(0.5).floor_().clamp_(0, 255)


def tile_image_(a: Tiling) -> None:
    tile, frames = a.out.shape[-1], a.photos.shape[0]
    wide = torch.float64 if a.out.dtype == torch.float64 else torch.float32
    mean, std = a.normalisation.to(a.out.device, wide)[:, :, None, None]
    for photo, tiles in zip(a.photos, a.out.unflatten(0, (frames, -1))):
        x = photo.permute(2, 0, 1).double()  # in which sums of levels and weights are exact
        grid = _along(_along(x, 2, a.columns * tile), 1, a.rows * tile)
        cut = grid.view(3, a.rows, tile, a.columns, tile).permute(1, 3, 0, 2, 4).flatten(0, 1)
        if a.thumbnail:
            cut = torch.cat([cut, _along(_along(x, 2, tile), 1, tile)[None]])
        tiles.copy_(cut.to(wide).div_(255).sub_(mean).div_(std))
