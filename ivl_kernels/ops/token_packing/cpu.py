"""Token packing on the CPU: thin calls into csrc/cpu/token_packing.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu
from .op import EmbedText, PlaceRows, TakeRows
from .packed import PADDINGS, STATUS, Packing, Pieces, check_counts, check_status, report_of


def place_rows_(a: PlaceRows) -> None:
    target = a.embeds if a.embeds.stride(2) == 1 else a.embeds.contiguous()
    found = _cpu.op("place_rows_")(target, a.input_ids.contiguous(), a.rows.contiguous(), a.token_id)
    check_counts(found, a.rows.shape[0], a.token_id)
    if target is not a.embeds:
        a.embeds.copy_(target)


def take_rows(a: TakeRows) -> Tensor:
    embeds = a.embeds if a.embeds.stride(2) == 1 else a.embeds.contiguous()
    out = embeds.new_empty(a.number, embeds.shape[2])
    found = _cpu.op("take_rows")(embeds, a.input_ids.contiguous(), out, a.token_id)
    check_counts(found, a.number, a.token_id)
    return out


def embed_text(a: EmbedText) -> Tensor:
    out = a.table.new_empty(*a.ids.shape, a.table.shape[1])
    ids = a.ids.contiguous()
    wrong = _cpu.op("embed_text")(ids, a.table.contiguous(), out, a.token_id)
    if wrong >= 0:
        raise IndexError(f"ids: got {int(ids.flatten()[wrong])}, expected 0 to {a.table.shape[0] - 1}")
    return out


def pack_tokens(a: Packing) -> Pieces:
    batch, columns = a.input_ids.shape
    size, planes = batch * columns, 4 if a.labels is None else 5
    # As large as can be: the width is known when all is written.
    buffer, tile_rows = a.input_ids.new_empty(planes * size), a.input_ids.new_empty(a.compress.shape[0])
    keep, status = a.input_ids.new_empty((batch, columns), dtype=torch.bool), a.input_ids.new_empty((batch, STATUS))
    loss_weights = a.input_ids.new_empty(0 if a.loss_weights is None else size, dtype=torch.float32)
    width = _cpu.op("pack_tokens")(
        a.input_ids, a.mask, a.compress, a.labels, a.loss_weights, a.token_id, a.tokens_per_tile, a.compressed_tokens,
        a.vocabulary, PADDINGS.index(a.padding), a.capacity, a.pad_id, keep, status, buffer, loss_weights, tile_rows,
    )  # fmt: skip
    if width < 0:
        check_status(status.tolist(), a)
    rows = 1 if a.padding == "none" else batch
    plane = rows * width
    integers = buffer.as_strided((planes, rows, width), (plane, width, 1))
    if a.loss_weights is not None:
        loss_weights = loss_weights.as_strided((rows, width), (width, 1))
    if a.table is None:
        embeds = loss_weights.new_empty(0)
    else:
        embeds = a.table.new_empty((rows, width, a.table.shape[1]))
        _cpu.op("embed_text")(buffer.as_strided((plane,), (1,)), a.table, embeds, a.token_id)
    return Pieces(integers, loss_weights, embeds, keep, status, tile_rows, report_of(None, status))
