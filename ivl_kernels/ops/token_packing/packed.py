"""What packing returns, and the checks that its backends share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ... import _gpu

PADDINGS = ("left", "right", "none")

# The result of the raw op: integers [4 or 5, B, N'] (ids, mask, position ids, kept, labels), loss weights and
# embeddings (empty when there are none), keep, status [B, 5] (see `check_status`), tile rows, status as the host read
# it (-1: it did not; empty on the CPU, where the host can read the original).
Pieces = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
STATUS = 5


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

    ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    kept: torch.Tensor
    keep: torch.Tensor
    tile_rows: torch.Tensor
    labels: torch.Tensor | None = None
    loss_weights: torch.Tensor | None = None
    embeds: torch.Tensor | None = None
    max_length: int = 0
    tokens_per_tile: int = 256
    compressed_tokens: int = 64
    _inputs: tuple = field(default=(), repr=False)
    _report: torch.Tensor | None = field(default=None, repr=False)

    @property
    def lengths(self) -> torch.Tensor:
        """[B] int64 tokens in each row."""
        return self._inputs[0][:, 1]

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """[B + 1] int32, starts of the rows when they are laid end to end; made on the device when asked for."""
        return F.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))

    @property
    def compressed_tiles(self) -> int:
        """How many tiles were compressed; costs no read of the device, but is not known in capacity mode on a GPU."""
        _, kept, _, _, present = self._host().sum(0).tolist()
        return (present - kept) // max(1, self.tokens_per_tile - self.compressed_tokens)

    @property
    def masked_tokens(self) -> int:
        """How many tokens of the input were masked; known when `compressed_tiles` is."""
        return self.keep.numel() - int(self._host()[:, 4].sum())

    def _host(self) -> torch.Tensor:
        status = self._inputs[0]
        if status.device.type == "cpu":
            return status
        if self._report is None or bool((self._report[:, :2] < 0).any()):
            raise RuntimeError("in capacity mode on a GPU the host does not know what was packed")
        return self._report

    def check(self) -> None:
        """Raise the ValueError that a capacity-mode call on a GPU could not (it reads nothing back). One host read."""
        status, *rest = self._inputs
        check_status(status.tolist(), *rest)


def check_counts(found: int, rows: int, token_id: int) -> None:
    if found != rows and not _gpu.compiling():
        raise ValueError(
            f"rows: got {rows} visual rows for {found} placeholder tokens (id {token_id}) in input_ids; the counts "
            "must be equal"
        )


def check_status(
    status: list[list[int]],
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    tiles: int,
    token_id: int,
    full: int,
    vocabulary: int,
) -> None:
    """Raise for what the scan found.

    `status` holds for each row: placeholders, tokens kept, last column of a bad run or -1, column of a bad id or -1,
    tokens present.
    """
    for row, (_, _, run_end, bad_id, _) in enumerate(status):
        if bad_id >= 0:
            raise ValueError(
                f"input_ids: row {row} has id {int(input_ids[row, bad_id])} at column {bad_id}, expected 0 to "
                f"{vocabulary - 1}"
            )
        if run_end >= 0:
            visual = input_ids[row, : run_end + 1] == token_id
            if mask is not None:
                visual = visual & (mask[row, : run_end + 1] != 0)
            length = visual.tolist()[::-1].index(False) if not bool(visual.all()) else run_end + 1
            raise ValueError(
                f"input_ids: row {row} has a run of {length} placeholder tokens (id {token_id}) in columns "
                f"{run_end + 1 - length} to {run_end}, expected a multiple of {full}"
            )
    counts = [placeholders // full for placeholders, *_ in status]
    if sum(counts) != tiles:
        raise ValueError(
            f"compress: got {tiles} decisions for {sum(counts)} tiles of {full} placeholder tokens (tiles of each row: "
            f"{counts}); the counts must be equal"
        )


def packed_width(status: list[list[int]] | None, input_ids: torch.Tensor, padding: str, capacity: bool) -> int:
    batch, columns = input_ids.shape
    if capacity or status is None:
        return batch * columns if padding == "none" else columns
    lengths = [row[1] for row in status]
    return sum(lengths) if padding == "none" else max(lengths, default=0)


def report_of(rows: list[list[int]] | None, status: torch.Tensor) -> torch.Tensor:
    if status.device.type == "cpu":
        return status.new_empty(0)
    values = [[-1] * STATUS] * len(status) if rows is None else rows
    return torch.tensor(values, dtype=torch.int64, device="cpu").view(-1, STATUS)
