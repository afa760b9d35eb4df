"""Token packing on the CPU: thin calls into csrc/cpu/token_packing.cpp."""

from __future__ import annotations

import torch

from ... import _native


def place_rows_(embeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    target = embeds if embeds.stride(2) == 1 else embeds.contiguous()
    _native.op("place_rows_")(target, positions, rows.contiguous())
    if target is not embeds:
        embeds.copy_(target)


def take_rows(embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if embeds.stride(2) != 1:
        embeds = embeds.contiguous()
    out = embeds.new_empty(positions.shape[0], embeds.shape[2])
    _native.op("take_rows")(embeds, positions, out)
    return out
