"""The vision side of an InternVL: tiles to the rows that the language model takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..flash import FlashVision, VisionParts, project_into, route, vision_parts
from ..models.families import Family, Transformers, family_of
from ..models.halves import family_class, vision_half
from .cache import Entry, FeatureCache
from .features import VisualFeatures
from .weights import fingerprint_of, held, load_parts, rules_of, stored


@dataclass
class _Image:
    """An image of a request on its way: its tiles, and what the cache has of them."""

    request: int
    tiles: Tensor
    key: str | None
    entry: Entry | None
    first: int  # its first tile among all

    @property
    def all(self) -> range:
        return range(self.first, self.first + len(self.tiles))


class VisionSide:
    """Turns tiles into visual tokens, with an InternVL of either family, plain or Flash, patched or not.

    Args:
        model: an `InternVLForConditionalGeneration` (with a `FlashVision` attached for Flash) or an
            `InternVLChatModel`. Nothing of it is changed; patch it as you like.
        cache: keeps what was made of images whose content has a key.
        fingerprint: of weights and rules, where it is known; "" computes it, which reads every weight once. It is not
            computed again: make a new `VisionSide` when weights or thresholds have changed.

    Raises:
        TypeError: no InternVL.
    """

    def __init__(self, model: nn.Module, *, cache: FeatureCache | None = None, fingerprint: str = "") -> None:
        family = family_of(model)
        if family is None:
            raise TypeError(f"model: got {type(model).__name__}, expected an InternVL model")
        self.model, self.cache = model, cache
        self._family: Family = family
        parts = held(family)
        self.fingerprint = fingerprint or fingerprint_of(parts, rules_of(family, "mlp2" in parts))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: Any = "cpu",
        trust_remote_code: bool = False,
        cache: FeatureCache | None = None,
    ) -> VisionSide:
        """The vision side of a checkpoint folder (safetensors). Only its tensors are read: tower, projector, Flash.

        Args:
            dtype: None: as stored.
            trust_remote_code: needed for an `internvl_chat` checkpoint, whose own code is executed.

        Raises:
            ValueError: no InternVL checkpoint, tensors that do not fit, or code that is not trusted.
        """
        folder = os.fspath(folder)
        kind = family_class(folder)
        found = stored(folder, kind)
        model = vision_half(folder, kind, trust_remote_code)
        if kind is Transformers and "mlp2" in found:
            FlashVision.from_pretrained(folder, dtype=dtype).attach(model)
        load_parts(kind(model), found, dtype)
        return cls(model.to(device).eval(), cache=cache)

    @property
    def tile_pixels(self) -> int:
        """Pixels of a tile's side."""
        return self._family.tile_pixels

    @property
    def flash(self) -> bool:
        """Whether tiles are routed."""
        family = self._family
        return family.flash_holder is not None and bool(getattr(family.flash_settings, "flash_mode", False))

    def encode(
        self,
        requests: Sequence[Sequence[Tensor]],
        *,
        keys: Sequence[Sequence[str | None]] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[VisualFeatures]:
        """Encode the images of several requests: one pass of the tower over all tiles, one projector call a ratio.

        Args:
            requests: of each request the images, each [t, 3, tile, tile] of its tiles, the thumbnail last; a request
                without images costs nothing.
            keys: of each image its `content_key`, or None; None: the cache is not used.
            names: of the requests, for `VisualFeatures.request`.

        Returns:
            Features of each request. The rows of one call share memory. A request's tiles are routed as if it were
            alone.

        Raises:
            ValueError: an image of another shape than [t, 3, tile, tile]; other numbers of keys or names.
        """
        images = self._images(requests, keys)
        if names is not None and len(names) != len(requests):
            raise ValueError(f"names: got {len(names)}, expected {len(requests)}: one a request")
        with torch.no_grad():
            made = self._flash(images) if self.flash else self._plain(images)
        rows, tokens, scores = made
        features, first, start = [], 0, 0
        for i in range(len(requests)):
            tiles = tuple(len(image.tiles) for image in images if image.request == i)
            mine = slice(first, first + sum(tiles))
            count = sum(tokens[mine])
            features.append(
                VisualFeatures(
                    rows[start : start + count],
                    tuple(tokens[mine]),
                    tiles,
                    None if scores is None else scores[mine],
                    self.fingerprint,
                    names[i] if names is not None else "",
                )
            )
            first, start = mine.stop, start + count
        return features

    def _images(
        self, requests: Sequence[Sequence[Tensor]], keys: Sequence[Sequence[str | None]] | None
    ) -> list[_Image]:
        side = self._family.tile_pixels
        images: list[_Image] = []
        first = 0
        if keys is not None and [len(k) for k in keys] != [len(r) for r in requests]:
            raise ValueError("keys: expected one an image of each request")
        for i, request in enumerate(requests):
            for j, tiles in enumerate(request):
                if tiles.dim() != 4 or len(tiles) < 1 or tiles.shape[1:] != (3, side, side):
                    raise ValueError(
                        f"requests[{i}][{j}]: got shape {list(tiles.shape)}, expected [t, 3, {side}, {side}], t > 0"
                    )
                key = None if keys is None or self.cache is None else keys[i][j]
                entry = self.cache.get(key) if key is not None and self.cache is not None else None
                if entry is not None and len(entry.rows) != len(tiles):
                    raise ValueError(
                        f"keys[{i}][{j}]: got a key of {len(entry.rows)} tiles for an image of {len(tiles)}, expected "
                        "one of the content and the tiling (`content_key`)"
                    )
                images.append(_Image(i, tiles, key, entry, first))
                first += len(tiles)
        return images

    def _pixels(self, images: Sequence[_Image]) -> Tensor:
        weight = next(self._family.vision.parameters())
        return torch.cat([image.tiles for image in images]).to(weight.device, weight.dtype)

    def _plain(self, images: list[_Image]) -> tuple[Tensor, list[int], None]:
        tokens = self._family.tokens_a_tile
        fresh = [image for image in images if image.entry is None]
        made: Any = None
        if fresh:
            made = getattr(self._family.core, self._family.features_name)(self._pixels(fresh))
            made = made if isinstance(made, Tensor) else made.pooler_output
            made = made.flatten(0, 1)
        self._count(images, fresh)
        if len(fresh) == len(images):
            rows = made if images else self._empty()
        else:
            parts, at = [], 0
            for image in images:
                if image.entry is None:
                    parts.append(made[at : at + tokens * len(image.tiles)])
                    at += tokens * len(image.tiles)
                else:
                    parts += [tile[tokens] for tile in image.entry.rows]
            rows = torch.cat(parts)
        for image in fresh:
            self._keep(image, rows, [tokens] * len(image.tiles), image.first * tokens, None)
        return rows, [tokens] * sum(len(image.tiles) for image in images), None

    def _flash(self, images: list[_Image]) -> tuple[Tensor, list[int], Tensor | None]:
        parts = vision_parts(self._family)
        if not images:
            return self._empty(), [], None
        fresh = [image for image in images if image.entry is None]
        vit = {image.first: tokens for image, tokens in self._through_vit(fresh, parts)}
        scores = torch.empty(images[-1].all.stop)
        if fresh:
            together = torch.cat([vit[image.first] for image in fresh])
            found = route(together, parts).scores
            assert found is not None
            for image, values in zip(fresh, found.float().cpu().split([len(i.tiles) for i in fresh])):
                scores[image.first : image.all.stop] = values
        for image in images:
            if image.entry is not None:
                assert image.entry.scores is not None
                scores[image.first : image.all.stop] = image.entry.scores
        groups = torch.cat([torch.full((len(image.tiles),), image.request) for image in images])
        compress = ops.select_tiles(
            scores,
            relative_threshold=parts.relative_threshold,
            absolute_threshold=parts.absolute_threshold,
            groups=groups,
        )
        tokens = torch.where(compress, parts.tokens // 4, parts.tokens).tolist()
        # Known, but not at the ratio that this request wants.
        again = [i for i in images if i.entry and any(tokens[t] not in r for t, r in zip(i.all, i.entry.rows))]
        vit |= {image.first: values for image, values in self._through_vit(again, parts)}
        self._count(images, fresh + again)
        rows = self._rows(images, vit, compress, tokens, parts)
        for image in fresh + again:
            mine = slice(image.first, image.all.stop)
            self._keep(image, rows, tokens[mine], sum(tokens[: image.first]), scores[mine].clone())
        return rows, tokens, scores

    def _empty(self, rows: int = 0) -> Tensor:
        last = [*self._family.projector.parameters()][-1]  # the bias of its last layer, or the weight
        return last.new_empty(rows, last.shape[0])

    def _through_vit(self, images: list[_Image], parts: VisionParts) -> list[tuple[_Image, Tensor]]:
        if not images:
            return []
        vit = parts.tokens_of(self._pixels(images))
        return list(zip(images, vit.split([len(image.tiles) for image in images])))

    def _rows(
        self, images: list[_Image], vit: dict[int, Tensor], compress: Tensor, tokens: list[int], parts: VisionParts
    ) -> Tensor:
        """[N, H]: the kernels of the two projectors write into it; what the cache has is copied."""
        lengths = torch.tensor(tokens)
        starts = lengths.cumsum(0) - lengths
        done = [image for image in images if image.first in vit]
        rows = self._empty(sum(tokens))
        if done:
            which = torch.cat([torch.tensor(image.all) for image in done])
            rows = project_into(
                rows, torch.cat([vit[image.first] for image in done]), compress[which], parts, starts=starts[which]
            )
        for image in images:
            if image.first not in vit:
                assert image.entry is not None
                for tile, known in zip(image.all, image.entry.rows):
                    rows[starts[tile] : starts[tile] + tokens[tile]] = known[tokens[tile]]
        return rows

    def _count(self, images: list[_Image], encoded: list[_Image]) -> None:
        if self.cache is not None:
            missed = sum(image.key is not None for image in encoded)
            self.cache.count(sum(image.key is not None for image in images) - missed, missed)

    def _keep(self, image: _Image, rows: Tensor, tokens: list[int], start: int, scores: Tensor | None) -> None:
        if image.key is None or self.cache is None:
            return
        made: list[dict[int, Tensor]] = []
        for i, count in enumerate(tokens):
            known = image.entry.rows[i] if image.entry is not None else {}
            made.append({**known, count: rows[start : start + count].clone()})
            start += count
        self.cache.put(image.key, Entry(made, scores))
