"""Token packing on NVIDIA GPUs: launches of csrc/cuda/token_packing.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cuda
from .op import EmbedText, PlaceRows, TakeRows
from .packed import PADDINGS, STATUS, Packing, Pieces, check_counts, packed_by

WARPS = 4  # rows moved by a block
SCAN_THREADS = 512
CHUNK = 2048  # ids counted and listed by a block
WRITE_THREADS = 256


def _positions(input_ids: Tensor, token_id: int, rows: int) -> Tensor:
    """Flat positions [rows] of the placeholders; raises when there are not `rows` of them. One host read."""
    n = input_ids.numel()
    chunks = -(-n // CHUNK)
    counts = input_ids.new_empty(chunks)
    _cuda.launch("token_packing", "count_tokens", (chunks,), SCAN_THREADS, [input_ids, counts, CHUNK, n, token_id])
    positions = input_ids.new_empty(rows)
    args = [input_ids, counts, positions, CHUNK, n, token_id, rows]
    _cuda.launch("token_packing", "list_tokens", (chunks,), SCAN_THREADS, args)
    check_counts(sum(counts.tolist()), rows, token_id)
    return positions


def _move_rows(kernel: str, embeds: Tensor, positions: Tensor, rows: Tensor) -> None:
    size = embeds.element_size()
    strides = [embeds.shape[1], embeds.stride(0) * size, embeds.stride(1) * size, embeds.shape[2] * size]
    grid = (-(-rows.shape[0] // WARPS),)
    _cuda.launch("token_packing", kernel, grid, 32 * WARPS, [embeds, positions, rows, rows.shape[0], *strides])


def place_rows_(a: PlaceRows) -> None:
    positions = _positions(a.input_ids.contiguous(), a.token_id, a.rows.shape[0])
    target = a.embeds if a.embeds.stride(2) == 1 else a.embeds.contiguous()
    _move_rows("place_rows", target, positions, a.rows.contiguous())
    if target is not a.embeds:
        a.embeds.copy_(target)


def take_rows(a: TakeRows) -> Tensor:
    positions = _positions(a.input_ids.contiguous(), a.token_id, a.number)
    embeds = a.embeds if a.embeds.stride(2) == 1 else a.embeds.contiguous()
    out = embeds.new_empty(a.number, embeds.shape[2])
    _move_rows("take_rows", embeds, positions, out)
    return out


def embed_text(a: EmbedText) -> Tensor:
    out = a.table.new_empty(*a.ids.shape, a.table.shape[1])
    row_bytes = a.table.shape[1] * a.table.element_size()
    args = [a.ids.contiguous(), a.table.contiguous(), out, a.ids.numel(), a.table.shape[0], a.token_id, row_bytes]
    _cuda.launch("token_packing", "embed_text", (-(-a.ids.numel() // WARPS),), 32 * WARPS, args)
    return out


def _scan(a: Packing) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    (batch, columns), tiles = a.input_ids.shape, a.compress.shape[0]
    size = -(-columns // 32)
    mask = a.mask if a.mask is None else a.mask.bool()
    status, words = a.input_ids.new_empty(batch, STATUS), a.input_ids.new_empty(batch, size)
    keep = torch.empty_like(a.input_ids, dtype=torch.bool)
    tile_source, counts = a.input_ids.new_full((tiles + batch,), -1).split((tiles, batch))
    args = [a.input_ids, mask, a.compress, counts, keep, words, status, tile_source]
    sizes = [columns, tiles, a.token_id, a.tokens_per_tile, a.compressed_tokens, a.vocabulary]
    _cuda.launch("token_packing", "pack_scan", (batch,), SCAN_THREADS, [*args, *sizes], 12 * size)
    return keep, status, (words, tile_source)


def _write(a: Packing, status: Tensor, found: tuple[Tensor, Tensor], integers: Tensor, loss_weights: Tensor) -> Tensor:
    (batch, columns), tiles = a.input_ids.shape, a.compress.shape[0]
    tile_rows = a.input_ids.new_empty(tiles)
    if a.input_ids.numel():
        blocks = -(-columns // WRITE_THREADS)
        planes = [*integers.unbind(0), *([None] if a.labels is None else [])]
        args = [a.input_ids, a.labels, a.loss_weights, found[0], status, found[1], *planes, loss_weights, tile_rows]
        options = [batch, columns, integers.shape[2], tiles, PADDINGS.index(a.padding), a.pad_id]
        _cuda.launch("token_packing", "pack_write", (blocks, batch), WRITE_THREADS, [*args, *options])
    return tile_rows


def pack_tokens(a: Packing) -> Pieces:
    return packed_by(a, _scan, _write, lambda ids, table: embed_text(EmbedText(ids, table, a.token_id)))
