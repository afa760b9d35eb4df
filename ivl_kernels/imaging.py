"""Photographs to tiles the InternVL way: dynamic aspect ratio, thumbnail last, ImageNet normalisation.

Needs Pillow. Source of the rule: `dynamic_preprocess` of InternVL's model cards; transformers' GotOcr2 image processor,
which InternVL uses there, chooses the same grids.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class ImageError(ValueError):
    """The picture cannot be used; the message is one line."""


@dataclass
class Tiling:
    """A picture cut into tiles.

    Attributes:
        image: the picture, RGB, upright.
        columns, rows: the grid; its tiles come first, row by row.
        tiles: [T] pictures of `tile` x `tile` pixels; with `thumbnail` the last one is the whole picture.
        thumbnail: whether there is one (only when the grid has more than one tile).
    """

    image: Image.Image
    columns: int
    rows: int
    tiles: list[Image.Image]
    thumbnail: bool

    def pixel_values(self, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        """[T, 3, tile, tile], normalised."""
        return to_pixels(self.tiles).to(dtype).to(device or "cpu")


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open a picture as upright RGB: EXIF rotation applied, transparency laid on white, grey and palettes converted.

    Raises:
        ImageError: no such file, not a picture, or damaged.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = os.fspath(path)
    try:
        with Image.open(path) as opened:
            return to_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: is a folder, not a picture") from None
    except PermissionError:
        raise ImageError(f"{path}: no permission to read it") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not a picture in a known format") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{path}: damaged or not readable ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB copy; transparent parts become white, 16-bit grey is scaled."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        low, high = image.getextrema()
        top = 65535.0 if image.mode.startswith("I") and high > 255 else 255.0 if high > 1 else 1.0  # type: ignore[operator]
        return image.convert("F").point(lambda value: value * (255.0 / top)).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def choose_grid(
    width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 12, tile: int = 448
) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect ratio is closest to the picture's.

    Among grids equally close, a larger one is taken while the picture has more than half the pixels of that grid.

    Raises:
        ValueError: sizes that are not positive, or min_tiles > max_tiles.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width, height: got {width} x {height}, expected at least 1 x 1")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles, max_tiles: got {min_tiles}, {max_tiles}, expected 1 <= min_tiles <= max_tiles")
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles + 1)
        if min_tiles <= columns * rows <= max_tiles
    ]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    aspect, best, distance = width / height, (1, 1), math.inf
    for columns, rows in grids:
        away = abs(aspect - columns / rows)
        roomy = width * height > 0.5 * tile * tile * columns * rows
        if away < distance or (away == distance and roomy):
            best, distance = (columns, rows), away
    return best


def tile_image(
    image: Image.Image, *, min_tiles: int = 1, max_tiles: int = 12, tile: int = 448, thumbnail: bool = True
) -> Tiling:
    """Resize a picture to its grid and cut it; the thumbnail of a picture of several tiles comes last."""
    from PIL import Image

    image = to_rgb(image)
    columns, rows = choose_grid(*image.size, min_tiles=min_tiles, max_tiles=max_tiles, tile=tile)
    resized = image.resize((columns * tile, rows * tile), Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((x * tile, y * tile, (x + 1) * tile, (y + 1) * tile)) for y in range(rows) for x in range(columns)
    ]
    thumbnail = thumbnail and len(tiles) > 1
    if thumbnail:
        tiles.append(image.resize((tile, tile), Image.Resampling.BICUBIC))
    return Tiling(image, columns, rows, tiles, thumbnail)


def to_pixels(tiles: Sequence[Image.Image]) -> torch.Tensor:
    """[T, 3, h, w] float32, normalised with ImageNet's mean and standard deviation."""
    import numpy

    values = torch.from_numpy(numpy.stack([numpy.asarray(tile, dtype=numpy.uint8) for tile in tiles]))
    values = values.permute(0, 3, 1, 2).float().div_(255)
    return values.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def draw_tiles(
    tiling: Tiling, *, compressed: Sequence[bool] | None = None, scores: Sequence[float] | None = None, side: int = 224
) -> Image.Image:
    """The tiles as the model gets them, numbered, the thumbnail at the right.

    compressed: one flag a tile; compressed ones are drawn in 8 x 8 blocks, as coarse as their 64 tokens, under an
    orange band. scores: written beside the number.
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, band = side // 28, side // 9
    columns = tiling.columns + (1 if tiling.thumbnail else 0)
    extra = 2 * gap if tiling.thumbnail else 0
    width = columns * (side + gap) + gap + extra
    height = tiling.rows * (side + band + gap) + gap
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font: Any = ImageFont.load_default(band * 0.6)
    for i, tile in enumerate(tiling.tiles):
        is_thumbnail = tiling.thumbnail and i == len(tiling.tiles) - 1
        column, row = (tiling.columns, 0) if is_thumbnail else (i % tiling.columns, i // tiling.columns)
        x = gap + column * (side + gap) + (extra if is_thumbnail else 0)
        y = gap + row * (side + band + gap)
        small = compressed is not None and bool(compressed[i])
        picture, color = tile.resize((side, side), Image.Resampling.BICUBIC), "#444444"
        text = f"{i + 1}" + (" thumbnail" if is_thumbnail else "")
        if compressed is not None:
            text += ": 64 tokens" if small else ": 256 tokens"
            if scores is not None:
                text += f" ({scores[i]:.2f})"
            color = "#c2410c" if small else "#15803d"
            if small:
                picture = picture.resize((8, 8), Image.Resampling.BOX).resize((side, side), Image.Resampling.NEAREST)
        canvas.paste(picture, (x, y + band))
        draw.rectangle((x, y, x + side - 1, y + band - 1), fill=color)
        draw.text((x + band * 0.3, y + band * 0.12), text, fill="white", font=font)
        draw.rectangle((x, y, x + side - 1, y + band + side - 1), outline=color, width=max(1, side // 90))
    return canvas
