"""Photographs to tiles: the released pipeline of Pillow, and transformers' processor over Pillow, against the op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import torch
from PIL import Image

from bench.measure import Case, Work
from ivl_kernels.ops import choose_grid, tile_image
from ivl_kernels.ops.tile_image import MEAN, STD

TILE = 448


def released(image: Image.Image, dtype: torch.dtype) -> torch.Tensor:
    """`dynamic_preprocess` and `build_transform` of the model cards."""
    columns, rows = choose_grid(*image.size)
    large = image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    corners = [(x * TILE, y * TILE) for y in range(rows) for x in range(columns)]
    tiles = [large.crop((x, y, x + TILE, y + TILE)) for x, y in corners]
    if len(tiles) > 1:
        tiles.append(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    values = [torch.from_numpy(numpy.array(t)).permute(2, 0, 1).contiguous().float().div(255) for t in tiles]
    return torch.stack([v.sub_(mean).div_(std) for v in values]).to(dtype)


def processor() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    size = {"height": TILE, "width": TILE}
    return GotOcr2ImageProcessorPil(
        size=size, crop_to_patches=True, min_patches=1, max_patches=12, image_mean=MEAN, image_std=STD
    )


def make(width: int, height: int, dtype: torch.dtype) -> Work:
    """A photograph of noise that was enlarged, as far as it is: neither flat nor without neighbours."""
    generator = numpy.random.default_rng(0)
    small = generator.integers(0, 256, (height // 10, width // 10, 3), dtype=numpy.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    pixels, whole = torch.from_numpy(numpy.array(image)), processor()
    variants = {
        "ours": lambda: tile_image(pixels, dtype=dtype),
        "eager": lambda: released(image, dtype),
        "processor": lambda: whole(images=[image], return_tensors="pt")["pixel_values"].to(dtype),
    }
    return Work(variants, truth=lambda: tile_image(pixels, dtype=torch.float64))


def cases(quick: bool) -> Iterator[Case]:
    sizes = [(4000, 3000)] if quick else [(4000, 3000), (1920, 1080), (640, 480)]
    for width, height in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            name, grid = str(dtype).removeprefix("torch."), choose_grid(width, height)
            tiles = grid[0] * grid[1] + 1
            yield Case(
                "tile_image",
                f"{width} x {height} to {tiles} tiles {name}",
                dict(width=width, height=height, dtype=name),
                lambda v=(width, height, dtype): make(*v),  # type: ignore[misc]
                bytes=width * height * 3 + tiles * 3 * TILE**2 * dtype.itemsize,
                dtype=dtype,
            )
