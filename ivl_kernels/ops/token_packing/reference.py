"""Token packing in plain torch."""

from __future__ import annotations

import torch


def place_rows_(embeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    """`embeds` [B, N, H], `positions` [M] flat positions b * N + n, `rows` [M, H]."""
    columns = embeds.shape[1]
    embeds[positions // columns, positions % columns] = rows


def take_rows(embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The rows of `embeds` [B, N, H] at the flat `positions` [M]: [M, H]."""
    columns = embeds.shape[1]
    return embeds[positions // columns, positions % columns]
