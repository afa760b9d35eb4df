"""Token packing on NVIDIA GPUs: launches of csrc/cuda/token_packing.cu."""

from __future__ import annotations

import torch

from ... import _cuda
from .packed import PADDINGS, STATUS, Pieces, check_counts, check_status, packed_width, report_of

WARPS = 4  # rows moved by a block
SCAN_THREADS = 512
CHUNK = 2048  # ids counted and listed by a block
WRITE_THREADS = 256


def _positions(input_ids: torch.Tensor, token_id: int, rows: int) -> torch.Tensor:
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


def _move_rows(kernel: str, embeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    size = embeds.element_size()
    strides = [embeds.shape[1], embeds.stride(0) * size, embeds.stride(1) * size, embeds.shape[2] * size]
    grid = (-(-rows.shape[0] // WARPS),)
    _cuda.launch("token_packing", kernel, grid, 32 * WARPS, [embeds, positions, rows, rows.shape[0], *strides])


def place_rows_(embeds: torch.Tensor, input_ids: torch.Tensor, rows: torch.Tensor, token_id: int) -> None:
    positions = _positions(input_ids.contiguous(), token_id, rows.shape[0])
    target = embeds if embeds.stride(2) == 1 else embeds.contiguous()
    _move_rows("place_rows", target, positions, rows.contiguous())
    if target is not embeds:
        embeds.copy_(target)


def take_rows(embeds: torch.Tensor, input_ids: torch.Tensor, count: int, token_id: int) -> torch.Tensor:
    positions = _positions(input_ids.contiguous(), token_id, count)
    embeds = embeds if embeds.stride(2) == 1 else embeds.contiguous()
    out = embeds.new_empty(count, embeds.shape[2])
    _move_rows("take_rows", embeds, positions, out)
    return out


def embed_text(ids: torch.Tensor, table: torch.Tensor, token_id: int) -> torch.Tensor:
    out = table.new_empty(*ids.shape, table.shape[1])
    row_bytes = table.shape[1] * table.element_size()
    args = [ids.contiguous(), table.contiguous(), out, ids.numel(), table.shape[0], token_id, row_bytes]
    _cuda.launch("token_packing", "embed_text", (-(-ids.numel() // WARPS),), 32 * WARPS, args)
    return out


def pack_tokens(
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    compress: torch.Tensor,
    labels: torch.Tensor | None,
    weights: torch.Tensor | None,
    table: torch.Tensor | None,
    token_id: int,
    full: int,
    small: int,
    vocabulary: int,
    padding: str,
    capacity: bool,
    pad_id: int,
) -> Pieces:
    batch, columns = input_ids.shape
    tiles = compress.shape[0]
    mask = mask if mask is None else mask.bool()
    size = -(-columns // 32)
    status, words = input_ids.new_empty(batch, STATUS), input_ids.new_empty(batch, size)
    keep = torch.empty_like(input_ids, dtype=torch.bool)
    tile_source, counts = input_ids.new_full((tiles + batch,), -1).split((tiles, batch))
    scan_args = [input_ids, mask, compress, counts, keep, words, status, tile_source]
    sizes = [columns, tiles, token_id, full, small, vocabulary]
    _cuda.launch("token_packing", "pack_scan", (batch,), SCAN_THREADS, [*scan_args, *sizes], 12 * size)
    rows = None
    if not capacity:
        rows = status.tolist()
        check_status(rows, input_ids, mask, tiles, token_id, full, vocabulary)
    width = packed_width(rows, input_ids, padding, capacity)
    shape = (1, width) if padding == "none" else (batch, width)
    integers = input_ids.new_empty(4 if labels is None else 5, *shape)
    new_weights = keep.new_empty(0 if weights is None else shape, dtype=torch.float32)
    tile_rows = input_ids.new_empty(tiles)
    if input_ids.numel():
        blocks = -(-columns // WRITE_THREADS)
        planes = [*integers.unbind(0), *([None] if labels is None else [])]
        write_args = [input_ids, labels, weights, words, status, tile_source, *planes, new_weights, tile_rows]
        options = [batch, columns, width, tiles, PADDINGS.index(padding), pad_id]
        _cuda.launch("token_packing", "pack_write", (blocks, batch), WRITE_THREADS, [*write_args, *options])
    embeds = new_weights.new_empty(0) if table is None else embed_text(integers[0], table, token_id)
    return integers, new_weights, embeds, keep, status, tile_rows, report_of(rows, status)
