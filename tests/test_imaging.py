"""Pictures to tiles."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ivl_kernels import imaging


def picture(width=60, height=40, mode="RGB"):
    values = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(values).convert(mode)


@given(
    width=st.integers(1, 3000), height=st.integers(1, 3000), low=st.integers(1, 4), more=st.integers(0, 12),
)  # fmt: skip
def test_grid_is_transformers_grid(width, height, low, more):
    processing = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    got = imaging.choose_grid(width, height, min_tiles=low, max_tiles=low + more)
    if low == 1:
        assert got == processing.get_optimal_tiled_canvas((height, width), (448, 448), low, low + more)
    assert low <= got[0] * got[1] <= low + more


@pytest.mark.parametrize(
    "size, grid", [((600, 400), (3, 2)), ((448, 448), (1, 1)), ((2000, 2000), (3, 3)), ((100, 1000), (1, 10))]
)
def test_known_grids(size, grid):
    assert imaging.choose_grid(*size) == grid


def test_tiles():
    image = picture(600, 400)
    tiling = imaging.tile_image(image, tile=64)
    assert (tiling.columns, tiling.rows, len(tiling.tiles), tiling.thumbnail) == (3, 2, 7, True)
    resized = image.resize((192, 128), Image.Resampling.BICUBIC)
    assert tiling.tiles[4].tobytes() == resized.crop((64, 64, 128, 128)).tobytes()
    assert tiling.tiles[-1].tobytes() == image.resize((64, 64), Image.Resampling.BICUBIC).tobytes()
    pixels = tiling.pixel_values(torch.float64)
    assert pixels.shape == (7, 3, 64, 64) and pixels.dtype == torch.float64
    value = torch.tensor(tiling.tiles[1].getpixel((3, 5)), dtype=torch.float64) / 255
    expected = (value - torch.tensor(imaging.MEAN)) / torch.tensor(imaging.STD)
    torch.testing.assert_close(pixels[1, :, 5, 3], expected, rtol=1e-5, atol=1e-5)
    assert len(imaging.tile_image(picture(64, 64), tile=64).tiles) == 1
    assert len(imaging.tile_image(image, tile=64, thumbnail=False).tiles) == 6
    assert len(imaging.tile_image(image, tile=64, max_tiles=2).tiles) == 3


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I", "F", "I;16"])
def test_modes(mode, tmp_path):
    if mode == "I;16":
        image = Image.fromarray((numpy.arange(2400, dtype=numpy.uint16) * 27).reshape(40, 60))
    else:
        image = picture(mode=mode)
    path = tmp_path / f"picture.{'png' if mode not in ('CMYK', 'F', 'I') else 'tif'}"
    image.save(path)
    loaded = imaging.load_image(path)
    assert loaded.mode == "RGB" and loaded.size == (60, 40)
    assert numpy.asarray(loaded).std() > 5


def test_transparency_becomes_white(tmp_path):
    image = picture(mode="RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.save(tmp_path / "clear.png")
    assert numpy.asarray(imaging.load_image(tmp_path / "clear.png")).min() == 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert numpy.asarray(imaging.load_image(tmp_path / "palette.png")).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation, tmp_path):
    upright = numpy.zeros((40, 60, 3), numpy.uint8)
    upright[:20, :30] = 255
    image = Image.fromarray(upright)
    if orientation > 1:
        stored = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
                  5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
                  8: Image.Transpose.ROTATE_270}[orientation]  # fmt: skip
        image = image.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    image.save(path, exif=exif)
    assert numpy.array_equal(numpy.asarray(imaging.load_image(path)), upright)


def test_errors(tmp_path):
    with pytest.raises(imaging.ImageError, match="no such file"):
        imaging.load_image(tmp_path / "none.jpg")
    with pytest.raises(imaging.ImageError, match="is a folder"):
        imaging.load_image(tmp_path)
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(imaging.ImageError, match="not a picture"):
        imaging.load_image(tmp_path / "text.jpg")
    picture(200, 200).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(imaging.ImageError, match="damaged") as caught:
        imaging.load_image(tmp_path / "cut.jpg")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="min_tiles"):
        imaging.choose_grid(3, 3, min_tiles=4, max_tiles=2)
    with pytest.raises(ValueError, match="0 x 3"):
        imaging.choose_grid(0, 3)


def test_drawing():
    tiling = imaging.tile_image(picture(600, 400), tile=64)
    plain = imaging.draw_tiles(tiling)
    routed = imaging.draw_tiles(tiling, compressed=[True, False] * 3 + [False], scores=[0.5] * 7)
    assert plain.size == routed.size and plain.size[0] > plain.size[1]
    assert imaging.draw_tiles(imaging.tile_image(picture(64, 64), tile=64)).size[0] < plain.size[0]


def test_photo_ships_with_the_package():
    from importlib.resources import files

    image = imaging.load_image(files("ivl_kernels") / "data" / "coffee.jpg")
    assert image.size == (600, 400)
