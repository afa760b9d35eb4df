"""How the tiles of a call were routed, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..ops.tile_image import choose_grid
from .tiles import image_of_tile

if TYPE_CHECKING:
    from .inputs import FlashInputs, FlashParts


@dataclass(frozen=True)
class ImageRouting:
    """How the tiles of one image were routed.

    Attributes:
        grid: rows and columns of tiles, without the thumbnail; None when there are several and the sizes of the
            photographs were not given: the model only sees how many there are.
        thumbnail: the last tile is the thumbnail of the whole image, as the InternVL tiling makes it.
        scores: of each tile, the probability that compressing it is harmless; empty when the decision was given.
        compressed: whether each tile got 64 tokens instead of 256.
    """

    grid: tuple[int, int] | None
    thumbnail: bool
    scores: list[float]
    compressed: list[bool]


class Routing:
    """The decisions of one call, image by image. Nothing is read from the device before `images` is asked for."""

    def __init__(
        self, images: list[ImageRouting] | None = None, *, later: Callable[[], Any] | None = None, tile: int = 448
    ) -> None:
        self._images, self._later, self._tile = images or [], later, tile

    @property
    def images(self) -> list[ImageRouting]:
        if self._later is not None:
            self._images, self._later = self._later(), None
        return self._images

    @classmethod
    def of(cls, inputs: FlashInputs, input_ids: torch.Tensor, mask: torch.Tensor | None, parts: FlashParts) -> Routing:
        language, tile = parts.language, parts.vision.tile
        compress, scores = inputs.compress, inputs.decisions.scores

        def images() -> list[ImageRouting]:
            owners = image_of_tile(input_ids, mask, language.token_id, language.tokens).tolist()
            made: list[ImageRouting] = []
            values: list[float] = [] if scores is None else scores.tolist()
            for tile, (owner, small) in enumerate(zip(owners, compress.tolist())):
                if tile == 0 or owner != owners[tile - 1]:
                    many = owners.count(owner) > 1
                    made.append(ImageRouting(None if many else (1, 1), many, [], []))
                made[-1].compressed.append(small)
                if values:
                    made[-1].scores.append(values[tile])
            return made

        return cls(later=images, tile=tile)

    def with_grids(self, image_sizes: Sequence[tuple[int, int]]) -> Routing:
        """The same decisions with every image's grid; see `PatchHandle.last_routing`."""
        if len(image_sizes) != len(self.images):
            raise ValueError(f"image_sizes: got {len(image_sizes)}, expected {len(self.images)}: one an image")
        made = []
        for i, (image, (height, width)) in enumerate(zip(self.images, image_sizes)):
            tiles = len(image.compressed)
            # A grid of `limit` tiles that the rule chooses under a larger limit is its choice under this one too.
            limit = tiles - image.thumbnail
            columns, rows = choose_grid(width, height, max_tiles=limit, tile=self._tile)
            count = columns * rows
            if count + (count > 1) != tiles:
                raise ValueError(
                    f"image_sizes: image {i} has {tiles} tiles, which height {height}, width {width} does not give: of "
                    f"up to {limit} tiles besides the thumbnail the rule chooses {rows} rows x {columns} columns"
                )
            made.append(replace(image, grid=(rows, columns)))
        return Routing(made, tile=self._tile)

    def __repr__(self) -> str:
        return f"Routing(images={self.images})"

    def __str__(self) -> str:
        tiles = sum(len(image.compressed) for image in self.images)
        return f"{sum(sum(image.compressed) for image in self.images)} of {tiles} tiles compressed"
