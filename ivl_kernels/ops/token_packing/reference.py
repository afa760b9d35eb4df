"""Token packing in plain torch."""

from __future__ import annotations

import torch

from .packed import Pieces, check_counts, check_status, packed_width, report_of


def place_rows_(embeds: torch.Tensor, input_ids: torch.Tensor, rows: torch.Tensor, token_id: int) -> None:
    batch, column = (input_ids == token_id).nonzero(as_tuple=True)
    check_counts(batch.shape[0], rows.shape[0], token_id)
    embeds[batch, column] = rows


def take_rows(embeds: torch.Tensor, input_ids: torch.Tensor, count: int, token_id: int) -> torch.Tensor:
    batch, column = (input_ids == token_id).nonzero(as_tuple=True)
    check_counts(batch.shape[0], count, token_id)
    return embeds[batch, column]


def embed_text(ids: torch.Tensor, table: torch.Tensor, token_id: int) -> torch.Tensor:
    return torch.nn.functional.embedding(ids.masked_fill(ids == token_id, 0), table)


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
    device, tiles = input_ids.device, compress.shape[0]
    present = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    visual = present & (input_ids == token_id)
    count = visual.cumsum(1)
    total = visual.sum(1)
    before = (total.cumsum(0) - total) // full  # tiles in the batch rows above
    tile = before[:, None] + (count - 1).div(full, rounding_mode="floor")
    small_tile = torch.cat([compress, compress.new_zeros(1)])[tile.clamp(0, tiles)] & (tile >= 0)
    keep = present & ~(visual & small_tile & ((count - 1) % full >= small))

    # The run that a position ends, and an id out of range: the first column of each, or -1.
    following = torch.cat([visual[:, 1:], visual.new_zeros(batch, 1)], 1)[:, :columns]
    bad_run = visual & ~following & (count % full != 0)
    bad_id = present & ((input_ids < 0) | (input_ids >= vocabulary))
    column = torch.arange(columns, device=device).expand(batch, columns)
    first = [torch.where(bad, column, columns).amin(1) if columns else total for bad in (bad_run, bad_id)]
    first = [torch.where(f < columns, f, -1) if columns else f - 1 for f in first]
    lengths = keep.sum(1)
    status = torch.stack([total, lengths, *first, present.sum(1)], 1)
    rows = None
    if not (capacity and device.type == "cuda"):
        rows = status.tolist()
        check_status(rows, input_ids, mask, tiles, token_id, full, vocabulary)
    width = packed_width(rows, input_ids, padding, capacity)

    if padding == "none":
        start = lengths.cumsum(0) - lengths
        size, shape = width, (1, width)
    else:
        row = torch.arange(batch, device=device)
        start = row * width + (width - lengths if padding == "left" else 0)
        size, shape = batch * width, (batch, width)
    place = keep.cumsum(1) - 1
    # Dropped tokens go to one row after the end, which is cut off.
    target = torch.where(keep, start[:, None] + place, size).flatten()

    def scattered(values: torch.Tensor, fill: float) -> torch.Tensor:
        out = torch.full((size + 1,), fill, dtype=values.dtype, device=device)
        return out.scatter_(0, target, values.flatten())[:size].view(shape)

    integers = [
        scattered(input_ids, pad_id),
        scattered(torch.ones_like(input_ids), 0),
        scattered(place, 0),
        scattered(torch.arange(batch * columns, device=device), -1),
        *([] if labels is None else [scattered(labels, -100)]),
    ]
    new_weights = keep.new_empty(0, dtype=torch.float32) if weights is None else scattered(weights, 0.0)
    starts = visual & ((count - 1) % full == 0) & (tile < tiles)
    tile_rows = torch.zeros(tiles + 1, dtype=torch.int64, device=device)
    tile_rows.scatter_(0, torch.where(starts, tile, tiles).flatten(), target)
    embeds = new_weights.new_empty(0) if table is None else embed_text(integers[0], table, token_id)
    return (
        torch.stack(integers), new_weights, embeds, keep, status, tile_rows[:tiles].clone(), report_of(rows, status)
    )  # fmt: skip
