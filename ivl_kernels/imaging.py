"""Picture files to tiles the InternVL way: decoded by Pillow, upright, RGB; cut and normalised by `ops.tile_image`."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .ops.tile_image import MEAN, STD, choose_grid
from .ops.tile_image import tile_image as tile_pixels

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "MEAN",
    "STD",
    "ImageError",
    "Tiling",
    "choose_grid",
    "draw_tiles",
    "load_image",
    "pixels_of",
    "tile_image",
    "to_rgb",
]


class ImageError(ValueError):
    """The picture cannot be used; the message is one line."""


@dataclass
class Tiling:
    """A picture cut into tiles.

    Attributes:
        image: the picture, RGB, upright.
        columns, rows: the grid; its tiles come first, row by row.
        tile: pixels of a tile's side.
        thumbnail: whether the whole picture comes last, as one more tile (only when the grid has more than one).
    """

    image: Image.Image
    columns: int
    rows: int
    tile: int
    thumbnail: bool

    def __len__(self) -> int:
        return self.columns * self.rows + self.thumbnail

    def pixel_values(self, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        """[T, 3, tile, tile], normalised."""
        grid = (self.columns, self.rows)
        pixels = tile_pixels(pixels_of(self.image), dtype=dtype, grid=grid, tile=self.tile, thumbnail=self.thumbnail)
        return pixels.to(device or "cpu")

    @functools.cached_property
    def tiles(self) -> list[Image.Image]:
        """[T] pictures of `tile` x `tile` pixels, by Pillow."""
        from PIL import Image

        side = self.tile
        resized = self.image.resize((self.columns * side, self.rows * side), Image.Resampling.BICUBIC)
        corners = [(x * side, y * side) for y in range(self.rows) for x in range(self.columns)]
        cut = [resized.crop((x, y, x + side, y + side)) for x, y in corners]
        if self.thumbnail:
            cut.append(self.image.resize((side, side), Image.Resampling.BICUBIC))
        return cut


def pixels_of(image: Image.Image) -> torch.Tensor:
    """[H, W, 3] uint8 of an RGB picture."""
    import numpy

    # A copy, since Pillow's memory is not to be written.
    return torch.from_numpy(numpy.array(image, dtype=numpy.uint8))


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


def tile_image(
    image: Image.Image, *, min_tiles: int = 1, max_tiles: int = 12, tile: int = 448, thumbnail: bool = True
) -> Tiling:
    """The grid of a picture; the thumbnail of a picture of several tiles comes last."""
    image = to_rgb(image)
    columns, rows = choose_grid(*image.size, min_tiles=min_tiles, max_tiles=max_tiles, tile=tile)
    return Tiling(image, columns, rows, tile, thumbnail and columns * rows > 1)


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
