"""Which row and image of a batch a tile belongs to, and its patch tokens shuffled."""

from __future__ import annotations

import torch


def _visual(input_ids: torch.Tensor, mask: torch.Tensor | None, token_id: int) -> torch.Tensor:
    visual = input_ids == token_id
    return visual if mask is None else visual & (mask != 0)


def row_of_tile(
    input_ids: torch.Tensor, mask: torch.Tensor | None, token_id: int, tokens: int, tiles: int
) -> torch.Tensor:
    """[T] the batch row of each tile, without reading from the device."""
    ends = (_visual(input_ids, mask, token_id).sum(1) // tokens).cumsum(0)
    which = torch.searchsorted(ends, torch.arange(tiles, device=ends.device), right=True)
    return which.clamp(max=max(0, len(ends) - 1))


def image_of_tile(input_ids: torch.Tensor, mask: torch.Tensor | None, token_id: int, tokens: int) -> torch.Tensor:
    """[T] the image (run of placeholders) of each tile, counted over the batch. Reads from the device."""
    visual = _visual(input_ids, mask, token_id)
    before = torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], 1)
    run = (visual & ~before).flatten().cumsum(0) - 1
    return run[visual.flatten()][::tokens]


def shuffled(vit: torch.Tensor, merge: int, order: str) -> torch.Tensor:
    """[T, n, C] patch tokens of a square grid -> [T, n / merge ** 2, merge ** 2 * C]"""
    tiles, count, width = vit.shape
    side = int(count**0.5)
    x = vit.reshape(tiles, side // merge, merge, side // merge, merge, width)
    x = x.permute(0, 1, 3, 2, 4, 5) if order == "v2" else x.permute(0, 3, 1, 2, 4, 5)
    return x.reshape(tiles, count // merge**2, merge**2 * width)
