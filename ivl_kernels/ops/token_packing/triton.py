"""Row movement of token packing in Triton, where the CUDA C++ kernels are not built and on AMD GPUs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton import Kernel, cdiv, next_power_of_2
from .packed import check_counts


@Kernel
@triton.jit
def _move_rows(
    grid, rows, positions, columns, batch_stride, token_stride, width, TAKE: tl.constexpr, BLOCK: tl.constexpr
):
    m = tl.program_id(0).to(tl.int64)
    p = tl.load(positions + m)
    cell = grid + (p // columns) * batch_stride + (p % columns) * token_stride
    row = rows + m * width
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if TAKE:
        tl.store(row + h, tl.load(cell + h, mask=h < width), mask=h < width)
    else:
        tl.store(cell + h, tl.load(row + h, mask=h < width), mask=h < width)


def _launch(embeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, take: bool) -> None:
    count, width = rows.shape
    if count == 0 or width == 0:
        return
    block = min(next_power_of_2(width), 4096 // embeds.element_size())
    strides = (embeds.shape[1], embeds.stride(0), embeds.stride(1))
    warps = max(1, min(4, block * embeds.element_size() // 512))
    grid = (count, cdiv(width, block))
    _move_rows[grid](embeds, rows, positions, *strides, width, TAKE=take, BLOCK=block, num_warps=warps)


def _positions(input_ids: torch.Tensor, token_id: int, rows: int) -> torch.Tensor:
    positions = (input_ids.reshape(-1) == token_id).nonzero().squeeze(1)
    check_counts(positions.shape[0], rows, token_id)
    return positions


def place_rows_(embeds: torch.Tensor, input_ids: torch.Tensor, rows: torch.Tensor, token_id: int) -> None:
    positions = _positions(input_ids, token_id, rows.shape[0])
    target = embeds if embeds.stride(2) == 1 else embeds.contiguous()
    _launch(target, positions, rows.contiguous(), False)
    if target is not embeds:
        embeds.copy_(target)


def take_rows(embeds: torch.Tensor, input_ids: torch.Tensor, count: int, token_id: int) -> torch.Tensor:
    positions = _positions(input_ids, token_id, count)
    embeds = embeds if embeds.stride(2) == 1 else embeds.contiguous()
    out = embeds.new_empty(count, embeds.shape[2])
    _launch(embeds, positions, out, True)
    return out
