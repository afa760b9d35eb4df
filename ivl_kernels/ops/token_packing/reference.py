"""Token packing in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import EmbedText, PlaceRows, TakeRows
from .packed import Packing, Pieces, check_counts, check_status, packed_width, report_of


def place_rows_(a: PlaceRows) -> None:
    batch, column = (a.input_ids == a.token_id).nonzero(as_tuple=True)
    check_counts(batch.shape[0], a.rows.shape[0], a.token_id)
    a.embeds[batch, column] = a.rows


def take_rows(a: TakeRows) -> Tensor:
    batch, column = (a.input_ids == a.token_id).nonzero(as_tuple=True)
    check_counts(batch.shape[0], a.number, a.token_id)
    return a.embeds[batch, column]


def embed_text(a: EmbedText) -> Tensor:
    return torch.nn.functional.embedding(a.ids.masked_fill(a.ids == a.token_id, 0), a.table)


def pack_tokens(a: Packing) -> Pieces:
    batch, columns = a.input_ids.shape
    device, tiles = a.input_ids.device, a.compress.shape[0]
    present = torch.ones_like(a.input_ids, dtype=torch.bool) if a.mask is None else a.mask.bool()
    visual = present & (a.input_ids == a.token_id)
    count = visual.cumsum(1)
    total = visual.sum(1)
    before = (total.cumsum(0) - total) // a.tokens_per_tile  # tiles in the batch rows above
    tile = before[:, None] + (count - 1).div(a.tokens_per_tile, rounding_mode="floor")
    small_tile = torch.cat([a.compress, a.compress.new_zeros(1)])[tile.clamp(0, tiles)] & (tile >= 0)
    keep = present & ~(visual & small_tile & ((count - 1) % a.tokens_per_tile >= a.compressed_tokens))

    # The run that a position ends, and an id out of range: the first column of each, or -1.
    following = torch.cat([visual[:, 1:], visual.new_zeros(batch, 1)], 1)[:, :columns]
    bad_run = visual & ~following & (count % a.tokens_per_tile != 0)
    bad_id = present & ((a.input_ids < 0) | (a.input_ids >= a.vocabulary))
    column = torch.arange(columns, device=device).expand(batch, columns)
    first = [torch.where(bad, column, columns).amin(1) if columns else total for bad in (bad_run, bad_id)]
    first = [torch.where(f < columns, f, -1) if columns else f - 1 for f in first]
    lengths = keep.sum(1)
    status = torch.stack([total, lengths, *first, present.sum(1)], 1)  # a `Row` each
    rows = None
    if not (a.capacity and device.type == "cuda"):
        rows = status.tolist()
        check_status(rows, a)
    width = packed_width(rows, a)

    if a.padding == "none":
        start = lengths.cumsum(0) - lengths
        size, shape = width, (1, width)
    else:
        row = torch.arange(batch, device=device)
        start = row * width + (width - lengths if a.padding == "left" else 0)
        size, shape = batch * width, (batch, width)
    place = keep.cumsum(1) - 1
    # Dropped tokens go to one row after the end, which is cut off.
    target = torch.where(keep, start[:, None] + place, size).flatten()

    def scattered(values: Tensor, fill: float) -> Tensor:
        out = torch.full((size + 1,), fill, dtype=values.dtype, device=device)
        return out.scatter_(0, target, values.flatten())[:size].view(shape)

    integers = [
        scattered(a.input_ids, a.pad_id),
        scattered(torch.ones_like(a.input_ids), 0),
        scattered(place, 0),
        scattered(torch.arange(batch * columns, device=device), -1),
        *([] if a.labels is None else [scattered(a.labels, -100)]),
    ]
    loss_weights = keep.new_empty(0, dtype=torch.float32) if a.loss_weights is None else scattered(a.loss_weights, 0.0)
    starts = visual & ((count - 1) % a.tokens_per_tile == 0) & (tile < tiles)
    tile_rows = torch.zeros(tiles + 1, dtype=torch.int64, device=device)
    tile_rows.scatter_(0, torch.where(starts, tile, tiles).flatten(), target)
    embeds = loss_weights.new_empty(0) if a.table is None else embed_text(EmbedText(integers[0], a.table, a.token_id))
    report = report_of(rows, status)
    return Pieces(torch.stack(integers), loss_weights, embeds, keep, status, tile_rows[:tiles].clone(), report)
