"""Tiles in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def weights(size: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Of each of `wanted` results along an axis of `size`: the pixels it is made of, and their weights [wanted, K]."""
    scale = size / wanted
    stretch = max(scale, 1.0)
    support = 2 * stretch
    most = 2 * math.ceil(support) + 1
    which, values = torch.zeros(wanted, most, dtype=torch.int64), torch.zeros(wanted, most, dtype=torch.float64)
    for i in range(wanted):
        center = (i + 0.5) * scale
        first, last = max(0, int(center - support + 0.5)), min(size, int(center + support + 0.5))
        row = [_bicubic((k - center + 0.5) / stretch) for k in range(first, last)]
        which[i, : len(row)] = torch.arange(first, last)
        values[i, : len(row)] = torch.tensor(row, dtype=torch.float64) / math.fsum(row)
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


def tile_image(
    photos: Tensor, out: Tensor, columns: int, rows: int, thumbnail: bool, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Into `out` [F * T, 3, tile, tile]."""
    tile, frames = out.shape[-1], photos.shape[0]
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    for photo, tiles in zip(photos, out.unflatten(0, (frames, -1))):
        x = photo.permute(2, 0, 1).to(wide)
        grid = _along(_along(x, 2, columns * tile), 1, rows * tile)
        cut = grid.view(3, rows, tile, columns, tile).permute(1, 3, 0, 2, 4).flatten(0, 1)
        if thumbnail:
            cut = torch.cat([cut, _along(_along(x, 2, tile), 1, tile)[None]])
        shift, scale = (torch.tensor(tuple(v), dtype=wide, device=x.device)[:, None, None] for v in (mean, std))
        tiles.copy_(cut.div_(255).sub_(shift).div_(scale))
