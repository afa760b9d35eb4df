"""Token packing on the CPU: thin calls into csrc/cpu/token_packing.cpp."""

from __future__ import annotations

import torch

from ... import _native
from .packed import PADDINGS, STATUS, Pieces, check_counts, check_status, packed_width, report_of


def place_rows_(embeds: torch.Tensor, input_ids: torch.Tensor, rows: torch.Tensor, token_id: int) -> None:
    target = embeds if embeds.stride(2) == 1 else embeds.contiguous()
    found = _native.op("place_rows_")(target, input_ids.contiguous(), rows.contiguous(), token_id)
    check_counts(found, rows.shape[0], token_id)
    if target is not embeds:
        embeds.copy_(target)


def take_rows(embeds: torch.Tensor, input_ids: torch.Tensor, count: int, token_id: int) -> torch.Tensor:
    if embeds.stride(2) != 1:
        embeds = embeds.contiguous()
    out = embeds.new_empty(count, embeds.shape[2])
    found = _native.op("take_rows")(embeds, input_ids.contiguous(), out, token_id)
    check_counts(found, count, token_id)
    return out


def embed_text(ids: torch.Tensor, table: torch.Tensor, token_id: int) -> torch.Tensor:
    out = table.new_empty(*ids.shape, table.shape[1])
    ids = ids.contiguous()
    wrong = _native.op("embed_text")(ids, table.contiguous(), out, token_id)
    if wrong >= 0:
        raise IndexError(f"ids: got {int(ids.flatten()[wrong])}, expected 0 to {table.shape[0] - 1}")
    return out


def pack_tokens(
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    compress: torch.Tensor,
    labels: torch.Tensor | None,
    weights: torch.Tensor | None,
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
    what = (input_ids, mask, compress)
    keep = torch.empty_like(input_ids, dtype=torch.bool)
    status = input_ids.new_empty(batch, STATUS)
    _native.op("pack_scan")(*what, token_id, full, small, vocabulary, keep, status)
    rows = status.tolist()
    check_status(rows, input_ids, mask, tiles, token_id, full, vocabulary)
    width = packed_width(rows, input_ids, padding, capacity)
    shape = (1, width) if padding == "none" else (batch, width)
    integers = input_ids.new_empty(4 if labels is None else 5, *shape)
    new_weights = keep.new_empty(0 if weights is None else shape, dtype=torch.float32)
    tile_rows = input_ids.new_empty(tiles)
    sizes = (token_id, full, small)
    _native.op("pack_write")(
        *what, labels, weights, *sizes, keep, status, PADDINGS.index(padding), pad_id, integers, new_weights, tile_rows
    )
    return integers, new_weights, keep, status, tile_rows, report_of(rows, batch)
