"""Row movement of token packing in Triton, where the CUDA C++ kernels are not built and on AMD GPUs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._triton import Kernel, cdiv, next_power_of_2
from .op import PlaceRows, TakeRows
from .packed import check_counts


@Kernel
@triton.jit
def place_rows_kernel(
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


def _launch(embeds: Tensor, positions: Tensor, rows: Tensor, take: bool) -> None:
    count, width = rows.shape
    if count == 0 or width == 0:
        return
    block = min(next_power_of_2(width), 4096 // embeds.element_size())
    strides = (embeds.shape[1], embeds.stride(0), embeds.stride(1))
    warps = max(1, min(4, block * embeds.element_size() // 512))
    grid = (count, cdiv(width, block))
    place_rows_kernel[grid](embeds, rows, positions, *strides, width, TAKE=take, BLOCK=block, num_warps=warps)


def _positions(input_ids: Tensor, token_id: int, rows: int) -> Tensor:
    positions = (input_ids.reshape(-1) == token_id).nonzero().squeeze(1)
    check_counts(positions.shape[0], rows, token_id)
    return positions


def place_rows_(a: PlaceRows) -> None:
    positions = _positions(a.input_ids, a.token_id, a.rows.shape[0])
    target = a.embeds if a.embeds.stride(2) == 1 else a.embeds.contiguous()
    _launch(target, positions, a.rows.contiguous(), False)
    if target is not a.embeds:
        a.embeds.copy_(target)


def take_rows(a: TakeRows) -> Tensor:
    positions = _positions(a.input_ids, a.token_id, a.number)
    embeds = a.embeds if a.embeds.stride(2) == 1 else a.embeds.contiguous()
    out = embeds.new_empty(a.number, embeds.shape[2])
    _launch(embeds, positions, out, True)
    return out
