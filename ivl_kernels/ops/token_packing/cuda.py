"""Token packing on NVIDIA GPUs: launches of csrc/cuda/token_packing.cu."""

from __future__ import annotations

import torch

from ... import _cuda

WARPS = 4


def _launch_rows(kernel: str, embeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    size = embeds.element_size()
    _cuda.launch(
        "token_packing",
        kernel,
        (-(-rows.shape[0] // WARPS),),
        32 * WARPS,
        [
            embeds,
            positions,
            rows,
            rows.shape[0],
            embeds.shape[1],
            embeds.stride(0) * size,
            embeds.stride(1) * size,
            embeds.shape[2] * size,
        ],
    )


def place_rows_(embeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    target = embeds if embeds.stride(2) == 1 else embeds.contiguous()
    _launch_rows("place_rows", target, positions, rows.contiguous())
    if target is not embeds:
        embeds.copy_(target)


def take_rows(embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    embeds = embeds if embeds.stride(2) == 1 else embeds.contiguous()
    out = embeds.new_empty(positions.shape[0], embeds.shape[2])
    _launch_rows("take_rows", embeds, positions, out)
    return out
