"""Token packing in Triton, where the CUDA C++ kernels are not built and on AMD GPUs.

Packing takes four launches: placeholders are counted in chunks of a row, then each chunk knows where its tokens are in
their tiles and tells what it keeps, which is summed for each row; between chunks nobody waits. The fourth writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import Kernel, cdiv, next_power_of_2
from .op import EmbedText, PlaceRows, TakeRows
from .packed import STATUS, Packing, Pieces, check_counts, packed_by

CHUNK = 1024  # columns of a program that packs
NONE = tl.constexpr(0x7FFFFFFF)  # column of what is not there


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


@Kernel
@triton.jit(do_not_specialize=["token"])
def embed_text_kernel(ids, table, out, vocabulary, token, width, BLOCK: tl.constexpr):
    """An id outside the table makes a row of NaN; rows of the token are left alone."""
    i = tl.program_id(0).to(tl.int64)
    found = tl.load(ids + i)
    if found == token:
        return
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = h < tl.where((found >= 0) & (found < vocabulary), width, 0)
    tl.store(out + i * width + h, tl.load(table + found * width + h, mask=there, other=float("nan")), mask=h < width)


@triton.jit
def _sum(values, count, STEP: tl.constexpr, CHUNK: tl.constexpr):
    """Of the first `count` of values that lie STEP apart."""
    total = tl.zeros([CHUNK], tl.int64)
    for first in range(0, count, CHUNK):
        i = first + tl.arange(0, CHUNK)
        total += tl.load(values + i * STEP, mask=i < count, other=0)
    return tl.sum(total)


@triton.jit
def _tokens(ids, mask, columns, token, CHUNK: tl.constexpr):
    """This program's columns, whether they exist, their ids, and which are present and which placeholders."""
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = n < columns
    at = tl.program_id(1).to(tl.int64) * columns + n
    found = tl.load(ids + at, mask=inside, other=0)
    present = inside
    if mask is not None:
        present = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    return n, inside, at, found, present, present & (found == token)


@triton.jit
def _staying(visual, present, compress, counts, tiles, full, small, CHUNK: tl.constexpr):
    """Place of each placeholder in its tile, the tile, and which tokens stay."""
    chunks = tl.num_programs(0)
    row = tl.program_id(1)
    first_tile = _sum(counts, row * chunks, 1, CHUNK) // full
    rank = _sum(counts + row.to(tl.int64) * chunks, tl.program_id(0), 1, CHUNK) + tl.cumsum(visual.to(tl.int32)) - 1
    in_tile, tile = rank % full, first_tile + rank // full
    compressed = tl.load(compress + tile, mask=visual & (tile < tiles), other=0) != 0
    return in_tile, tile, present & ~(visual & compressed & (in_tile >= small))


@Kernel
@triton.jit(do_not_specialize=["columns", "token"])
def pack_tokens_count_kernel(ids, mask, counts, columns, token, CHUNK: tl.constexpr):
    """counts [B, chunks]: placeholders."""
    visual = _tokens(ids, mask, columns, token, CHUNK)[5]
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + at, tl.sum(visual.to(tl.int64)))


@Kernel
@triton.jit(do_not_specialize=["columns", "tiles", "token", "full", "small", "vocabulary"])
def pack_tokens_scan_kernel(
    ids, mask, compress, counts, keep, found, columns, tiles, token, full, small, vocabulary, STATUS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """keep [B, N]: which tokens stay; found [B, chunks, 5]: as `Row`, of a chunk."""
    n, inside, at, value, present, visual = _tokens(ids, mask, columns, token, CHUNK)
    in_tile, _, stays = _staying(visual, present, compress, counts, tiles, full, small, CHUNK)
    tl.store(keep + at, stays, mask=inside)
    more = tl.load(ids + at + 1, mask=n + 1 < columns, other=0) == token
    if mask is not None:
        more &= tl.load(mask + at + 1, mask=n + 1 < columns, other=0) != 0
    more &= n + 1 < columns
    found += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * STATUS
    tl.store(found, tl.sum(visual.to(tl.int64)))
    tl.store(found + 1, tl.sum(stays.to(tl.int64)))
    tl.store(found + 2, tl.min(tl.where(visual & ~more & (in_tile + 1 != full), n, NONE)).to(tl.int64))
    tl.store(found + 3, tl.min(tl.where(present & ((value < 0) | (value >= vocabulary)), n, NONE)).to(tl.int64))
    tl.store(found + 4, tl.sum(present.to(tl.int64)))


@Kernel
@triton.jit(do_not_specialize=["chunks"])
def pack_tokens_status_kernel(found, status, chunks, STATUS: tl.constexpr, CHUNK: tl.constexpr):
    """status [B, 5]: of a row what `found` has of its chunks."""
    row = tl.program_id(0).to(tl.int64)
    found += row * chunks * STATUS
    status += row * STATUS
    for i in tl.static_range(STATUS):
        if i == 2 or i == 3:
            least = tl.full([CHUNK], NONE, tl.int64)
            for first in range(0, chunks, CHUNK):
                c = first + tl.arange(0, CHUNK)
                least = tl.minimum(least, tl.load(found + c * STATUS + i, mask=c < chunks, other=NONE))
            column = tl.min(least)
            tl.store(status + i, tl.where(column == NONE, -1, column))
        else:
            tl.store(status + i, _sum(found + i, chunks, STATUS, CHUNK))


@Kernel
@triton.jit(do_not_specialize=["batch", "columns", "width", "tiles", "token", "full", "small", "pad_id"])
def pack_tokens_write_kernel(
    ids, mask, compress, labels, weights, counts, found, status, integers, new_weights, tile_rows, batch, columns,
    width, plane, tiles, token, full, small, pad_id, LEFT: tl.constexpr, JOINED: tl.constexpr, STATUS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Tokens that stay go to their places; the rest of the packed buffer is padded. JOINED: rows end to end."""
    n, inside, at, value, present, visual = _tokens(ids, mask, columns, token, CHUNK)
    in_tile, tile, stays = _staying(visual, present, compress, counts, tiles, full, small, CHUNK)
    row = tl.program_id(1)
    length = tl.load(status + row.to(tl.int64) * STATUS + 1)
    begin = _sum(status + 1, row, STATUS, CHUNK) if JOINED else row.to(tl.int64) * width
    start = begin + width - length if LEFT else begin
    kept = _sum(found + 1 + row.to(tl.int64) * tl.num_programs(0) * STATUS, tl.program_id(0), STATUS, CHUNK)
    place = kept + tl.cumsum(stays.to(tl.int32)) - 1
    to = start + place
    tl.store(integers + to, value, mask=stays)
    tl.store(integers + plane + to, tl.full([CHUNK], 1, tl.int64), mask=stays)
    tl.store(integers + 2 * plane + to, place, mask=stays)
    tl.store(integers + 3 * plane + to, at, mask=stays)
    tl.store(tile_rows + tile, to, mask=visual & (in_tile == 0) & (tile < tiles))
    if JOINED:
        pad = _sum(status + 1, batch, STATUS, CHUNK) + at
        padded = inside & (pad < width)
    elif LEFT:
        pad = begin + n
        padded = n < width - length
    else:
        pad = begin + n
        padded = (n >= length) & (n < width)
    zero = tl.zeros([CHUNK], tl.int64)
    tl.store(integers + pad, zero + pad_id, mask=padded)
    tl.store(integers + plane + pad, zero, mask=padded)
    tl.store(integers + 2 * plane + pad, zero, mask=padded)
    tl.store(integers + 3 * plane + pad, zero - 1, mask=padded)
    if labels is not None:
        tl.store(integers + 4 * plane + to, tl.load(labels + at, mask=stays, other=0), mask=stays)
        tl.store(integers + 4 * plane + pad, zero - 100, mask=padded)
    if weights is not None:
        tl.store(new_weights + to, tl.load(weights + at, mask=stays, other=0.0), mask=stays)
        tl.store(new_weights + pad, tl.zeros([CHUNK], tl.float32), mask=padded)


def _blocks(width: int, itemsize: int) -> tuple[int, int]:
    """Elements of a row that a program moves, and its warps."""
    block = min(next_power_of_2(width), 4096 // itemsize)
    return block, max(1, min(4, block * itemsize // 512))


def _launch(embeds: Tensor, positions: Tensor, rows: Tensor, take: bool) -> None:
    count, width = rows.shape
    if count == 0 or width == 0:
        return
    block, warps = _blocks(width, embeds.element_size())
    strides = (embeds.shape[1], embeds.stride(0), embeds.stride(1))
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


def embed_text(a: EmbedText) -> Tensor:
    (vocabulary, width), table = a.table.shape, a.table.contiguous()
    out = table.new_empty(*a.ids.shape, width)
    if out.numel():
        block, warps = _blocks(width, table.element_size())
        grid = (a.ids.numel(), cdiv(width, block))
        args = (a.ids.contiguous(), table, out, vocabulary, a.token_id, width)
        embed_text_kernel[grid](*args, BLOCK=block, num_warps=warps)
    return out


def _sizes(a: Packing) -> tuple[int, int, int, int]:
    return a.compress.shape[0], a.token_id, a.tokens_per_tile, a.compressed_tokens


def _scan(a: Packing) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    (batch, columns), ids = a.input_ids.shape, a.input_ids
    chunks = cdiv(columns, CHUNK)
    counts, found = ids.new_empty(batch, chunks), ids.new_empty(batch, chunks, STATUS)
    keep, status = torch.empty_like(ids, dtype=torch.bool), ids.new_empty(batch, STATUS)
    if ids.numel():
        grid = (chunks, batch)
        pack_tokens_count_kernel[grid](ids, a.mask, counts, columns, a.token_id, CHUNK=CHUNK)
        pack_tokens_scan_kernel[grid](
            ids, a.mask, a.compress, counts, keep, found, columns, *_sizes(a), a.vocabulary, STATUS=STATUS, CHUNK=CHUNK
        )
    if batch:
        pack_tokens_status_kernel[(batch,)](found, status, chunks, STATUS=STATUS, CHUNK=CHUNK)
    return keep, status, (counts, found)


def _write(
    a: Packing, status: Tensor, scanned: tuple[Tensor, Tensor], integers: Tensor, loss_weights: Tensor
) -> Tensor:
    (batch, columns), (_, _, width) = a.input_ids.shape, integers.shape
    tile_rows = a.input_ids.new_zeros(a.compress.shape[0])
    if a.input_ids.numel():
        pack_tokens_write_kernel[cdiv(columns, CHUNK), batch](
            a.input_ids, a.mask, a.compress, a.labels, a.loss_weights, *scanned, status, integers, loss_weights,
            tile_rows, batch, columns, width, integers[0].numel(), *_sizes(a), a.pad_id, LEFT=a.padding == "left",
            JOINED=a.padding == "none", STATUS=STATUS, CHUNK=CHUNK,
        )  # fmt: skip
    return tile_rows


def pack_tokens(a: Packing) -> Pieces:
    return packed_by(a, _scan, _write, lambda ids, table: embed_text(EmbedText(ids, table, a.token_id)))
