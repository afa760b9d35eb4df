"""A cache that Flash filled: which of its tiles were compressed, and whether it still holds them.

The decisions are kept with the cache. Where it cannot be told whether they are those of its content, the call raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..flash import Decisions, FlashInputs, FlashParts, flash_inputs, image_of_tile, route
from ..models.upstream import filled, keys_at


@dataclass(frozen=True)
class Held:
    """What Flash left in a cache, kept with it.

    Attributes:
        compress: [T] bool, the decisions for the tiles in it.
        ids: [1, N'] the packed prompt.
        mark: keys of the last visual position, which depend on all that was decided: they tell this content of the
            cache from another one.
    """

    compress: torch.Tensor
    ids: torch.Tensor
    position: int
    mark: torch.Tensor

    def is_in(self, cache: Any) -> bool:
        """Whether the cache still holds what these decisions were made for."""
        keys = keys_at(cache, self.position)
        same = keys is not None and keys.shape == self.mark.shape and keys.dtype == self.mark.dtype
        return same and torch.equal(keys.to(self.mark.device), self.mark)  # type: ignore[union-attr]


_ATTRIBUTE = "_ivl_flash"  # of a cache: the `Held`
_UNKNOWN = (
    "{name}: got a filled cache that no Flash call of this patch made, so which of its tiles are compressed is not "
    "known"
)


def held_in(cache: Any) -> Held | None:
    """What Flash left in a filled cache, or None."""
    return getattr(cache, _ATTRIBUTE, None) if filled(cache) else None


def hold(cache: Any, inputs: FlashInputs, parts: FlashParts) -> None:
    """Keep with a cache what it holds now; nothing where a later call could not tell whether it still does."""
    if cache is None:
        return
    vars(cache).pop(_ATTRIBUTE, None)
    ids = inputs.packed.ids
    visual = (ids[0] == parts.language.token_id).nonzero()
    if ids.shape[0] == 1 and len(visual):
        position = int(visual[-1])
        mark = keys_at(cache, position)
        if mark is not None and len(mark) == 1:  # no beams
            setattr(cache, _ATTRIBUTE, Held(inputs.compress, ids, position, mark.clone()))


def check_held(held: Held | None, cache: Any, inputs: FlashInputs, parts: FlashParts, name: str) -> None:
    """Raise unless a filled cache holds the beginning of the packed prompt, with its tiles as they are decided now."""
    if held is None:
        raise ValueError(_UNKNOWN.format(name=name))
    language, old = parts.language, len(held.compress)
    past, packed = filled(cache), inputs.packed.ids
    seen = int((packed[:, :past] == language.token_id).sum())
    expected = language.tokens * old - (language.tokens - language.tokens // 4) * int(held.compress.sum())
    if past >= packed.shape[1] or seen != expected:
        raise ValueError(
            f"{name}: got {past} positions, {seen} of them visual, for a packed prompt of {packed.shape[1]}; expected "
            f"fewer than the prompt has, {expected} of them visual: those of the {old} tiles seen before"
        )
    begin = min(held.ids.shape[1], past)
    if not torch.equal(packed[:, :begin], held.ids[:, :begin].to(packed.device)):
        raise ValueError(f"{name}: got a cache of another prompt, expected one that input_ids goes on with")
    if not torch.equal(inputs.compress[:old], held.compress.to(inputs.compress.device)):
        raise ValueError(f"{name}: got a cache whose {old} tiles were decided otherwise than now")
    if not held.is_in(cache):
        raise ValueError(
            f"{name}: got a cache that was filled anew since Flash decided for its {old} tiles, so which of them are "
            "compressed is not known"
        )


def continued(
    parts: FlashParts, ids: torch.Tensor, mask: torch.Tensor, pixels: Any, cache: Any, held: Held | None, name: str
) -> FlashInputs:
    """The prompt of a further turn: tiles in the cache as they were decided, new ones routed."""
    vision, language = parts
    if ids.shape[0] > 1:
        raise ValueError(
            f"{name}: got a filled cache and a batch of {ids.shape[0]}, expected a batch of one: the padding of "
            "packed rows changes as they grow"
        )
    if held is None:
        raise ValueError(_UNKNOWN.format(name=name))
    tiles = len(image_of_tile(ids, mask, language.token_id, language.tokens))
    old, got = len(held.compress), 0 if pixels is None else len(pixels)
    new = tiles - old
    if got not in (new, tiles) or new < 0:
        raise ValueError(
            f"pixel_values: got {got} tiles for {tiles} in input_ids, of which the cache holds {old}; expected those "
            "of the new images, or all"
        )
    decisions = Decisions(held.compress)
    if new:
        vit = vision.tokens_of(pixels[-new:])
        decisions = Decisions(torch.cat([held.compress, route(vit, vision).compress]))
    else:
        vit = torch.empty(0, 4 * vision.tokens + 1, 1, device=ids.device)
    inputs = flash_inputs(parts, ids, vit, attention_mask=mask, decisions=decisions, cached_tiles=old)
    check_held(held, cache, inputs, parts, name)
    return inputs


def name_of(value: Any, given: Mapping[str, Any]) -> str:
    return next(name for name, other in given.items() if other is value)
