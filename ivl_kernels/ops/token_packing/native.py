"""Token packing on the CPU: thin calls into csrc/cpu/token_packing.cpp."""

from __future__ import annotations

import torch

from ... import _native
from .packed import PADDINGS, STATUS, Pieces, check_counts, check_status, report_of


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
    size, planes = batch * columns, 4 if labels is None else 5
    # As large as can be: the width is known when all is written.
    buffer, tile_rows = input_ids.new_empty(planes * size), input_ids.new_empty(compress.shape[0])
    keep, status = input_ids.new_empty((batch, columns), dtype=torch.bool), input_ids.new_empty((batch, STATUS))
    new_weights = input_ids.new_empty(0 if weights is None else size, dtype=torch.float32)
    width = _native.op("pack_tokens")(
        input_ids, mask, compress, labels, weights, token_id, full, small, vocabulary, PADDINGS.index(padding),
        capacity, pad_id, keep, status, buffer, new_weights, tile_rows,
    )  # fmt: skip
    if width < 0:
        check_status(status.tolist(), input_ids, mask, compress.shape[0], token_id, full, vocabulary)
    rows = 1 if padding == "none" else batch
    plane = rows * width
    integers = buffer.as_strided((planes, rows, width), (plane, width, 1))
    if weights is not None:
        new_weights = new_weights.as_strided((rows, width), (width, 1))
    if table is None:
        embeds = new_weights.new_empty(0)
    else:
        embeds = table.new_empty((rows, width, table.shape[1]))
        _native.op("embed_text")(buffer.as_strided((plane,), (1,)), table, embeds, token_id)
    return integers, new_weights, embeds, keep, status, tile_rows, report_of(None, status)
