"""A row of samples as tensors, and samples that are too large for a row cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._checks import check_dtype, check_shape
from ..models.packed import varlen_keywords
from ..ops.linear_logprob import row_plan
from .stream import Limits, TooLarge


@dataclass(frozen=True)
class Sample:
    """One training sample, tokenized.

    Attributes:
        ids: [n] int64, with a placeholder for every visual token.
        labels: [n] int64, aligned with `ids`; -100 where nothing is supervised. None: nothing is.
        pixels: [T, 3, h, w] tiles in order of appearance; None: no image.
        key: anything that says where it comes from.

    Raises:
        ValueError, TypeError: no token, or shapes or dtypes that do not fit.
    """

    ids: torch.Tensor
    labels: torch.Tensor | None = None
    pixels: torch.Tensor | None = None
    key: Any = None

    def __post_init__(self) -> None:
        check_dtype("ids", self.ids, (torch.int64,))
        check_shape("ids", self.ids, ("n",))
        if not len(self.ids):
            raise ValueError("ids: got a sample without tokens, expected at least one")
        if self.labels is not None:
            check_dtype("labels", self.labels, (torch.int64,))
            check_shape("labels", self.labels, (len(self.ids),))
        if self.pixels is not None:
            check_shape("pixels", self.pixels, ("T", 3, "h", "w"))

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def tiles(self) -> int:
        return 0 if self.pixels is None else len(self.pixels)


def cut(sample: Sample, limits: Limits, token_id: int, tokens_a_tile: int) -> Iterator[Sample]:
    """The sample, or pieces of it that fit a row: each as long as may be, and no cut within an image.

    An image is a run of placeholders with the token before it and the one after (`<img>` and `</img>`). A piece counts
    its own supervised tokens, as InternVL's do.

    Args:
        limits: of a row.
        token_id: the placeholder.
        tokens_a_tile: placeholders a tile.

    Raises:
        TooLarge: an image alone is more than a row takes.
        ValueError: the placeholders do not fit the tiles.
    """
    visual = sample.ids == token_id
    if int(visual.sum()) != sample.tiles * tokens_a_tile:
        raise ValueError(
            f"sample: got {int(visual.sum())} placeholders for {sample.tiles} tiles, expected {tokens_a_tile} a tile"
        )
    if sample.tokens <= limits.tokens and sample.tiles <= limits.tiles:
        yield sample
        return
    edge = visual.new_zeros(1)
    wide = visual | torch.cat([visual[1:], edge]) | torch.cat([edge, visual[:-1]])
    inside = wide[1:] & wide[:-1] & (visual[1:] | visual[:-1])  # no cut between these two tokens
    cuts = [0, *(torch.nonzero(~inside).squeeze(1) + 1).tolist(), sample.tokens]
    tiles = [0, *(visual.cumsum(0) // tokens_a_tile).tolist()]  # before position i
    begin = at = 0
    while begin < sample.tokens:
        end = begin
        while at + 1 < len(cuts) and _fits(cuts[at + 1] - begin, tiles[cuts[at + 1]] - tiles[begin], limits):
            at += 1
            end = cuts[at]
        if end == begin:
            least = cuts[at + 1]
            raise TooLarge(
                f"sample: an image with {least - begin} tokens and {tiles[least] - tiles[begin]} tiles at position "
                f"{begin}, expected at most {limits.tokens} and {limits.tiles}: it cannot be cut"
            )
        labels = None if sample.labels is None else sample.labels[begin:end]
        pixels = None if sample.pixels is None else sample.pixels[tiles[begin] : tiles[end]]
        pixels = None if pixels is None or not len(pixels) else pixels
        yield replace(sample, ids=sample.ids[begin:end], labels=labels, pixels=pixels)
        begin = end


def _fits(tokens: int, tiles: int, limits: Limits) -> bool:
    return tokens <= limits.tokens and tiles <= limits.tiles


@dataclass(frozen=True)
class Collator:
    """Makes one row of samples: `collate` with its options fixed, for a DataLoader or a Trainer."""

    reduction: str = "token"
    counting: str = "internvl"
    boundary: str = "masked"
    pad_to: int = 0
    pad_id: int = 0
    vocab_size: int | None = None
    image_flags: bool = False

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if len(samples) == 1 and isinstance(samples[0], (list, tuple)):
            samples = samples[0]  # a Trainer's batch of one row
        return collate(samples, **vars(self))


def collate(
    samples: Sequence[Sample],
    *,
    reduction: str = "token",
    counting: str = "internvl",
    boundary: str = "masked",
    pad_to: int = 0,
    pad_id: int = 0,
    vocab_size: int | None = None,
    image_flags: bool = False,
) -> dict[str, Any]:
    """One row, as the keyword arguments of a model's forward.

    Args:
        samples: that share the row.
        reduction, counting, boundary, vocab_size: of the loss weights, as in `ops.row_plan`.
        pad_to: length of the row; what is left is one more sub-sequence without labels. 0: no padding.
        pad_id: token of the padding.
        image_flags: with image_flags [T, 1], ones: remote code asks for them.

    Returns:
        input_ids, position_ids (from 0 in each sample) and labels [1, N] int64; cu_seq_lens_q and cu_seq_lens_k
        [S + 1] int32, max_length_q and max_length_k, as transformers names where the S sub-sequences begin and how
        long the longest is; pixel_values [T, 3, h, w] if there are any; and `row_plan`, a dictionary of the tensors of
        `ops.RowPlan`, from which `patch(model, loss=True)` makes the loss. There is no attention mask, since a mask of
        ones would let samples see each other, and `use_cache` is False for the same reason.

    Raises:
        ValueError: no samples, more tokens than `pad_to`, or a label outside the vocabulary.
    """
    if not samples:
        raise ValueError("samples: got none, expected at least one")
    lengths = [sample.tokens for sample in samples]
    parts = [sample.ids for sample in samples]
    labels = [torch.full_like(s.ids, -100) if s.labels is None else s.labels for s in samples]
    if pad_to:
        left = pad_to - sum(lengths)
        if left < 0:
            raise ValueError(f"pad_to: got {pad_to}, expected at least the {sum(lengths)} tokens of the samples")
        if left:
            lengths.append(left)
            parts.append(parts[0].new_full((left,), pad_id))
            labels.append(labels[0].new_full((left,), -100))
    starts = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
    targets = torch.cat(labels)[None]
    plan = row_plan(targets, starts, reduction=reduction, counting=counting, boundary=boundary, vocab_size=vocab_size)
    row: dict[str, Any] = {
        "input_ids": torch.cat(parts)[None],
        "position_ids": torch.cat([torch.arange(length, device="cpu") for length in lengths])[None],
        "labels": targets,
        "use_cache": False,
        "row_plan": plan._asdict(),
        **varlen_keywords(starts, max(lengths)),
    }
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    if pixels:
        row["pixel_values"] = torch.cat(pixels)
        if image_flags:
            row["image_flags"] = torch.ones(len(row["pixel_values"]), 1, dtype=torch.int64, device="cpu")
    return row
