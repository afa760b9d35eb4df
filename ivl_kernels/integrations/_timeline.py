"""The positions of a sequence that comes in several calls: a cache carries what the next call has to know.

Nothing is continued by arithmetic on the last position. The whole sequence is described again (which tokens are visual,
with which step) and its positions are computed as if it had come at once, so a call may begin or end anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from ..ops import v2pe_position_ids
from ..ops.v2pe_rope.op import image_steps


@dataclass(frozen=True)
class Tokens:
    """Tokens that a call brings.

    Attributes:
        visual: [B, N] bool.
        small: [B, N] bool, tokens of compressed tiles; None where no tile is compressed.
        tile: tokens of a tile and of a compressed one.
    """

    visual: torch.Tensor
    small: torch.Tensor | None = None
    tile: tuple[int, int] = (256, 64)

    @staticmethod
    def of(ids: torch.Tensor, token_id: Any, compress: torch.Tensor | None, tile: tuple[int, int]) -> Tokens:
        visual = ids == token_id if token_id is not None else torch.zeros_like(ids, dtype=torch.bool)
        if compress is None:
            return Tokens(visual, None, tile)
        compress = compress.to(ids.device)
        sizes = torch.where(compress, tile[1], tile[0])
        if int(sizes.sum()) != int(visual.sum()):
            raise ValueError(
                f"compress: got {len(compress)} tiles of {int(sizes.sum())} tokens, expected the {int(visual.sum())} "
                "placeholders of the packed prompt"
            )
        small = torch.zeros_like(visual)
        small[visual] = compress.repeat_interleave(sizes)
        return Tokens(visual, small, tile)

    def since(self, start: int) -> Tokens:
        return replace(self, visual=self.visual[:, start:], small=None if self.small is None else self.small[:, start:])

    def rows(self, count: int) -> Tokens:
        small = None if self.small is None else repeated(self.small, count)
        return replace(self, visual=repeated(self.visual, count), small=small)


@dataclass(frozen=True)
class Timeline:
    """What is known of the sequence so far. Everything after the L tokens of its columns is text.

    Attributes:
        tokens: the first L tokens.
        present: [B, L] bool, False at padding.
        step: [B, L] float64, the step of the image that a visual token belongs to.
        shift: [B, L + 1] float64, what V2PE adds to the position of each token, and to that of text after them.
        span: [B] float64, positions that the first L tokens take.
        seen: tokens that have passed, at least L.
        keys: the cache's keys of token L - 1, by which its rows are known again; None where they cannot be read.
    """

    tokens: Tokens
    present: torch.Tensor
    step: torch.Tensor
    shift: torch.Tensor
    span: torch.Tensor
    seen: int
    keys: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return self.present.shape[1]

    def rows(self, count: int) -> Timeline:
        """With a row for each beam."""
        if count == self.present.shape[0]:
            return self
        many = {name: repeated(getattr(self, name), count) for name in ("present", "step", "shift", "span")}
        keys = None if self.keys is None else repeated(self.keys, count)
        return replace(self, tokens=self.tokens.rows(count), keys=keys, **many)

    def extended(
        self,
        seen: int,
        new: Tokens,
        present: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        delta: Any,
        compressed_step: str = "span",
        backend: str = "",
    ) -> Timeline:
        """The first `seen` tokens of this sequence, then `new` ones.

        Args:
            present: [B, seen + N], False at padding; what is known already counts as it did then.
            positions: [B, N] integer positions of packed samples, which restart at 0, or None.
            delta: step of the images that begin in `new`.
            compressed_step, backend: as in `v2pe_position_ids`.
        """
        known, added = min(seen, self.length), new.visual.shape[1]
        old = self.tokens
        room = (0, seen - known)  # text that has passed since
        present = torch.cat((self.present[:, :known], present[:, known:]), 1)
        visual = torch.cat((pad(old.visual[:, :known], room), new.visual), 1) & present
        step = torch.cat((pad(self.step[:, :known], room), self.step.new_zeros(new.visual.shape)), 1)
        starts = visual & ~pad(visual, (1, 0))[:, :-1]
        small = None
        if old.small is not None or new.small is not None:
            before, after = (torch.zeros_like(t.visual) if t.small is None else t.small for t in (old, new))
            small = torch.cat((pad(before[:, :known], room), after), 1)
        tokens = Tokens(visual, small, new.tile)

        fresh = None
        if positions is not None:
            fresh = positions == 0
            starts = starts | (visual & fresh)
        first = starts.clone()
        first[:, :seen] = False
        rows_of = first.nonzero()[:, 0]
        step[first] = image_steps(delta, rows_of.cpu(), visual.shape[0]).to(step.device)
        # Every visual token has the step of its image: that of the last start at or before it.
        at = torch.arange(visual.shape[1], device=visual.device)
        step = step.gather(1, torch.where(starts, at, 0).cummax(1).values) * visual
        if not bool(visual.any()):
            zero = step.new_zeros(step.shape[0], step.shape[1] + 1)
            return Timeline(tokens, present, step, zero, present.sum(1).double(), seen + added)

        def and_text(x: torch.Tensor, value: bool) -> torch.Tensor:
            return pad(x, (0, 1), value=value)  # one token of text at the end says where text goes on

        options: dict[str, Any] = {}
        if small is not None:
            options = dict(compress=_tiles(tokens), tile_tokens=new.tile[0], compressed_tokens=new.tile[1])
            options["compressed_step"] = compressed_step
        if fresh is not None:
            boundaries = and_text(fresh, False).flatten().nonzero().squeeze(1)
            options["cu_seqlens"] = pad(boundaries, (0, 1), value=fresh.numel() + fresh.shape[0])
        at_once = v2pe_position_ids(
            and_text(visual, False).long(),
            1,
            step[starts],
            attention_mask=and_text(present, True),
            backend=backend,
            **options,
        ).double()
        counted = and_text(present, True).cumsum(1) - 1
        if positions is not None:
            counted = torch.cat((positions, positions[:, -1:] + 1), 1)
        shift = torch.where(and_text(present, True), at_once - counted, 0.0)
        span = at_once[:, :-1].masked_fill(~present, 0.0).amax(1) + 1
        return Timeline(tokens, present, step, shift, span, seen + added)


def empty(rows: int, device: torch.device) -> Timeline:
    none, zero = torch.zeros(rows, 0, dtype=torch.bool, device=device), torch.zeros(rows, 1, device=device).double()
    return Timeline(Tokens(none), none, zero[:, :0], zero, zero[:, 0], 0)


def repeated(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The rows of `x`, each as often as it has beams."""
    if rows % x.shape[0]:
        raise ValueError(f"v2pe: got {rows} rows, expected a multiple of the {x.shape[0]} of the prompt")
    return x if x.shape[0] == rows else x.repeat_interleave(rows // x.shape[0], 0)


def _tiles(tokens: Tokens) -> torch.Tensor:
    """[T] which tiles are compressed, from the tokens of each."""
    assert tokens.small is not None
    kinds, counts = torch.unique_consecutive(tokens.small[tokens.visual], return_counts=True)
    sizes = torch.where(kinds, tokens.tile[1], tokens.tile[0])
    if bool((counts % sizes).any()):
        raise ValueError("v2pe: this call ends inside a tile of a sequence with compressed tiles, expected whole tiles")
    return kinds.repeat_interleave(counts // sizes)


def padding_of(mask: Any, rows: int, past: int, new: int, device: torch.device) -> torch.Tensor:
    """[B, past + N] bool from whatever form the mask has that a decoder stack gets.

    Raises:
        ValueError: it does not say which tokens are padding.
    """
    length = past + new
    if isinstance(mask, dict):  # one a kind of layer; those with a window do not see everything
        if "full_attention" not in mask:
            raise ValueError(f"attention_mask: got masks for {', '.join(mask)}, expected one for full_attention")
        mask = mask["full_attention"]
    if mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=device)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        if mask.shape[1] != length:
            raise ValueError(
                f"attention_mask: got {list(mask.shape)}, expected [{rows}, {length}] (cached and new tokens)"
            )
        return repeated(mask.to(device, torch.bool), rows)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[-1] >= length:
        allowed = mask[:, 0, :, :length].to(device)
        allowed = allowed if allowed.dtype == torch.bool else allowed == 0
        at = torch.arange(length, device=device)
        present = allowed[:, -1] if new else allowed.new_ones(len(allowed), length)
        causal = at <= at[past:, None]
        same = (allowed == (causal & present[:, None])) | ~present[:, past:, None]
        if bool(same.all()):
            return repeated(present, rows)
    raise ValueError(
        "attention_mask: got a mask that is not causal attention over tokens and padding, expected one that is, or the "
        "[B, tokens] mask it is made of: v2pe has to know which tokens are padding"
    )
