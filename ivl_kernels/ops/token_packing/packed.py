"""What packing takes and returns, and the checks that its backends share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _gpu

PADDINGS = ("left", "right", "none")


class Packing(NamedTuple):
    """What packing takes, checked and contiguous."""

    input_ids: Tensor
    mask: Tensor | None
    compress: Tensor
    labels: Tensor | None
    loss_weights: Tensor | None
    table: Tensor | None
    token_id: int
    tokens_per_tile: int
    compressed_tokens: int
    vocabulary: int
    padding: str
    capacity: bool
    pad_id: int


class Pieces(NamedTuple):
    """What the raw op returns; loss weights and embeddings are empty when there are none."""

    integers: Tensor  # [4 or 5, B, N']: ids, mask, position ids, kept, labels
    loss_weights: Tensor
    embeds: Tensor
    keep: Tensor
    status: Tensor  # [B, 5]: a `Row` each
    tile_rows: Tensor
    report: (
        Tensor  # status as the host read it (-1: it did not; empty on the CPU, where the host can read the original)
    )


class Row(NamedTuple):
    """What the scan found in a row."""

    placeholders: int
    kept: int
    run_end: int  # last column of a run that is no multiple of a tile, or -1
    bad_id: int  # column of an id out of range, or -1
    present: int


STATUS = len(Row._fields)


@dataclass
class PackedTokens:
    """A batch after packing: B rows of at most N tokens became [B, N'], or [1, N'] when nothing is padded.

    Attributes:
        ids: [B, N'] int64 token ids.
        attention_mask: [B, N'] int64, 1 at tokens and 0 at padding.
        position_ids: [B, N'] int64, 0, 1, ... in each row; 0 at padding.
        kept: [B, N'] int64, where a token came from: row * N + column of the input; -1 at padding.
        keep: [B, N] bool, which tokens of the input stayed.
        tile_rows: [T] int64, the first row of each tile in the packed embeddings seen as [B * N', H].
        labels: [B, N'] int64 (-100 at padding), or None.
        loss_weights: [B, N'] float32 (0 at padding), or None.
        embeds: [B, N', H] embeddings, the rows of placeholders **not initialised**, or None.
        max_length: a number that no row exceeds: N' when rows are padded, else N.
        tokens_per_tile, compressed_tokens: rows of a full and of a compressed tile.
    """

    ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    kept: Tensor
    keep: Tensor
    tile_rows: Tensor
    labels: Tensor | None = None
    loss_weights: Tensor | None = None
    embeds: Tensor | None = None
    max_length: int = 0
    tokens_per_tile: int = 256
    compressed_tokens: int = 64
    _input: Packing | None = field(default=None, repr=False)
    _status: Tensor | None = field(default=None, repr=False)
    _report: Tensor | None = field(default=None, repr=False)

    @property
    def lengths(self) -> Tensor:
        """[B] int64 tokens in each row."""
        assert self._status is not None
        return self._status[:, Row._fields.index("kept")]

    @property
    def cu_seqlens(self) -> Tensor:
        """[B + 1] int32, starts of the rows when they are laid end to end; made on the device when asked for."""
        return F.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))

    @property
    def compressed_tiles(self) -> int:
        """How many tiles were compressed; costs no read of the device, but is not known in capacity mode on a GPU."""
        sums = Row(*self._host().sum(0).tolist())
        return (sums.present - sums.kept) // max(1, self.tokens_per_tile - self.compressed_tokens)

    @property
    def masked_tokens(self) -> int:
        """How many tokens of the input were masked; known when `compressed_tiles` is."""
        return self.keep.numel() - Row(*self._host().sum(0).tolist()).present

    def _host(self) -> Tensor:
        assert self._status is not None
        if _gpu.on_host(self._status):
            return self._status
        if self._report is None or bool((self._report[:, :2] < 0).any()):
            raise RuntimeError("in capacity mode on a GPU the host does not know what was packed")
        return self._report

    def check(self) -> None:
        """Raise the ValueError that a capacity-mode call on a GPU could not (it reads nothing back). One host read."""
        assert self._status is not None and self._input is not None
        check_status(self._status.tolist(), self._input)


def check_counts(found: int, rows: int, token_id: int) -> None:
    if found != rows and not _gpu.compiling():
        raise ValueError(
            f"rows: got {rows} visual rows for {found} placeholder tokens (id {token_id}) in input_ids; the counts "
            "must be equal"
        )


def check_status(status: list[list[int]], a: Packing) -> None:
    """Raise for what the scan found."""
    rows = [Row(*values) for values in status]
    for i, row in enumerate(rows):
        if row.bad_id >= 0:
            raise ValueError(
                f"input_ids: row {i} has id {int(a.input_ids[i, row.bad_id])} at column {row.bad_id}, expected 0 to "
                f"{a.vocabulary - 1}"
            )
        if row.run_end >= 0:
            visual = a.input_ids[i, : row.run_end + 1] == a.token_id
            if a.mask is not None:
                visual = visual & (a.mask[i, : row.run_end + 1] != 0)
            length = visual.tolist()[::-1].index(False) if not bool(visual.all()) else row.run_end + 1
            raise ValueError(
                f"input_ids: row {i} has a run of {length} placeholder tokens (id {a.token_id}) in columns "
                f"{row.run_end + 1 - length} to {row.run_end}, expected a multiple of {a.tokens_per_tile}"
            )
    counts = [row.placeholders // a.tokens_per_tile for row in rows]
    tiles = a.compress.shape[0]
    if sum(counts) != tiles:
        raise ValueError(
            f"compress: got {tiles} decisions for {sum(counts)} tiles of {a.tokens_per_tile} placeholder tokens (tiles "
            f"of each row: {counts}); the counts must be equal"
        )


def packed_by(
    a: Packing,
    scan: Callable[[Packing], tuple[Tensor, Tensor, Any]],
    write: Callable[[Packing, Tensor, Any, Tensor, Tensor], Tensor],
    embed: Callable[[Tensor, Tensor], Tensor],
) -> Pieces:
    """Packing in two passes; between them the host reads what the first found, unless in capacity mode.

    Args:
        scan: `keep`, `status`, and what the second pass needs.
        write: fills integers and loss weights; returns `tile_rows`.
        embed: rows of a table by ids.
    """
    keep, status, found = scan(a)
    rows = None
    if not a.capacity:
        rows = status.tolist()
        check_status(rows, a)
    width = packed_width(rows, a)
    shape = (1, width) if a.padding == "none" else (len(keep), width)
    integers = status.new_empty(4 if a.labels is None else 5, *shape)
    loss_weights = status.new_empty(0 if a.loss_weights is None else shape, dtype=torch.float32)
    tile_rows = write(a, status, found, integers, loss_weights)
    embeds = loss_weights.new_empty(0) if a.table is None else embed(integers[0], a.table)
    return Pieces(integers, loss_weights, embeds, keep, status, tile_rows, report_of(rows, status))


def packed_width(status: list[list[int]] | None, a: Packing) -> int:
    batch, columns = a.input_ids.shape
    if a.capacity or status is None:
        return batch * columns if a.padding == "none" else columns
    lengths = [Row(*row).kept for row in status]
    return sum(lengths) if a.padding == "none" else max(lengths, default=0)


def report_of(rows: list[list[int]] | None, status: Tensor) -> Tensor:
    if _gpu.on_host(status):
        return status.new_empty(0)
    values = [[-1] * STATUS] * len(status) if rows is None else rows
    return torch.tensor(values, dtype=torch.int64, device="cpu").view(-1, STATUS)
