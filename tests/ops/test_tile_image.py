"""Photographs to tiles, against Pillow's pipeline and transformers' processor."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivl_kernels.ops import choose_grid, tile_image, tile_images
from ivl_kernels.ops.tile_image import MEAN, STD
from ivl_kernels.testing import assert_accurate, poisoned
from tests.simulator.gpu import backends

BACKENDS = backends("cpu", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def photo(height, width, seed=0, kind="noise"):
    generator = numpy.random.default_rng(seed)
    values = generator.integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    if kind == "smooth":
        values = numpy.asarray(Image.fromarray(values[:9, :9]).resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(values.copy())


def resized(image, width, height):
    """Along x and then along y, as Pillow up to 12 does it always, and 13 unless the height shrinks much more."""
    bicubic = Image.Resampling.BICUBIC
    return image.resize((width, image.height), bicubic).resize((width, height), bicubic)


def released(pixels, dtype=torch.float32, tile=448, grid=None, thumbnail=True):
    """`dynamic_preprocess` and `build_transform` of the model cards."""
    image = Image.fromarray(pixels.numpy())
    columns, rows = grid or choose_grid(*image.size, tile=tile)
    large = resized(image, columns * tile, rows * tile)
    corners = [(x * tile, y * tile) for y in range(rows) for x in range(columns)]
    tiles = [large.crop((x, y, x + tile, y + tile)) for x, y in corners]
    if thumbnail and len(tiles) > 1:
        tiles.append(resized(image, tile, tile))
    values = torch.stack([torch.from_numpy(numpy.array(t)) for t in tiles]).permute(0, 3, 1, 2).float().div(255)
    return values.sub(torch.tensor(MEAN)[:, None, None]).div(torch.tensor(STD)[:, None, None]).to(dtype)


def levels(tiles):
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    return (tiles.double() * std + mean) * 255


def assert_same_pixels(got, want):
    """The same levels; the arithmetic that normalises them is looked at elsewhere."""
    assert got.shape == want.shape and got.dtype == want.dtype
    slack = {torch.bfloat16: 0.6, torch.float16: 0.1}.get(got.dtype, 1e-3)
    assert float((levels(got) - levels(want)).abs().max()) <= slack


@backends("cpu", "reference")
@settings(max_examples=30)
@given(
    height=st.integers(1, 130), width=st.integers(1, 130), tile=st.sampled_from([1, 7, 16, 30, 64]),
    dtype=st.sampled_from(DTYPES), thumbnail=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_same_pixels(backend, height, width, tile, dtype, thumbnail, seed):
    pixels = photo(height, width, seed)
    with poisoned():
        got = tile_image(pixels, dtype=dtype, tile=tile, thumbnail=thumbnail, backend=backend)
    assert_same_pixels(got, released(pixels, dtype, tile, thumbnail=thumbnail))


@pytest.mark.parametrize("size", [(600, 800), (1080, 1920), (448, 448), (3000, 4000)], ids=str)
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_photographs(size, kind):
    pixels = photo(*size, kind=kind)
    got = tile_image(pixels)
    assert_same_pixels(got, released(pixels))
    if size == (3000, 4000):
        assert len(got) == 13


@pytest.mark.parametrize("size", [(600, 800), (900, 500)], ids=str)
def test_transformers_processor(size):
    processing = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    processor = processing.GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=12, image_mean=MEAN,
        image_std=STD,
    )  # fmt: skip
    pixels = photo(*size)
    want = processor(images=[Image.fromarray(pixels.numpy())], return_tensors="pt")["pixel_values"]
    got = tile_image(pixels)
    assert got.shape == want.shape
    # Pillow 13 resizes the thumbnail of the second along y first: noise then differs by more than a level.
    end = None if size[0] < size[1] else -1
    assert float((levels(got[:end]) - levels(want[:end])).abs().max()) <= 1.001


@BACKENDS
def test_accuracy_of_the_normalisation(backend):
    """A photograph that needs no resizing: only the arithmetic of a level is left."""
    pixels = photo(64, 64)
    truth = (pixels.permute(2, 0, 1).double() / 255 - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(
        STD
    ).double()[:, None, None]
    for dtype in DTYPES:
        got = tile_image(pixels, tile=64, dtype=dtype, backend=backend)[0]
        assert_accurate(got, truth, released(pixels, dtype, 64)[0])
    wide = tile_image(pixels, tile=64, dtype=torch.float64)
    torch.testing.assert_close(levels(wide)[0], pixels.permute(2, 0, 1).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"], indirect=True)
def test_every_instruction_set(isa):
    for height, width, tile in ((33, 57, 16), (100, 41, 30), (5, 3, 7), (200, 300, 64)):
        pixels = photo(height, width)
        for dtype in DTYPES:
            assert_same_pixels(tile_image(pixels, tile=tile, dtype=dtype), released(pixels, dtype, tile))


@BACKENDS
def test_video_frames_and_batches(backend):
    frames = torch.stack([photo(40, 60, seed) for seed in range(3)])
    got = tile_image(frames, tile=32, backend=backend)
    each = [tile_image(frame, tile=32, backend=backend) for frame in frames]
    assert len(each[0]) > 1 and torch.equal(got, torch.cat(each))
    one = tile_image(frames, tile=32, max_tiles=1, backend=backend)
    assert one.shape == (3, 3, 32, 32)
    photos = [photo(50, 20), frames, photo(32, 32)]
    tiles, counts = tile_images(photos, tile=32, dtype=torch.bfloat16, backend=backend)
    want = [tile_image(p, tile=32, dtype=torch.bfloat16, backend=backend) for p in photos]
    assert counts == [len(w) for w in want] and torch.equal(tiles, torch.cat(want))
    tiles, counts = tile_images([], tile=32)
    assert tiles.shape == (0, 3, 32, 32) and counts == []
    assert tile_image(frames[:0], tile=32, backend=backend).shape == (0, 3, 32, 32)


@BACKENDS
def test_strided_photographs(backend):
    large = photo(90, 120)
    for view in (large[10:70, 5:85], large.transpose(0, 1), large.flip(2), large[::2, ::3]):
        got = tile_image(view, tile=32, backend=backend)
        assert torch.equal(got, tile_image(view.contiguous(), tile=32, backend=backend))


def test_far_apart_frames():
    """Frames over 2 GiB apart: the memory between them is never touched."""
    apart = (1 << 31) + 6
    storage = torch.empty(apart + 40 * 60 * 3, dtype=torch.uint8)
    frames = storage.as_strided((2, 40, 60, 3), (apart, 180, 3, 1))
    for i in range(2):
        frames[i] = photo(40, 60, i)
    got = tile_image(frames, tile=32)
    assert torch.equal(got, torch.cat([tile_image(photo(40, 60, i), tile=32) for i in range(2)]))


def test_grid_out_and_thumbnail():
    pixels = photo(40, 60)
    got = tile_image(pixels, tile=16, grid=(5, 1))
    assert_same_pixels(got, released(pixels, tile=16, grid=(5, 1)))
    out = torch.full((8, 3, 16, 16), float("nan"))
    assert tile_image(pixels, tile=16, grid=(5, 1), out=out[1:7]).data_ptr() == out[1].data_ptr()
    assert torch.equal(out[1:7], got) and out[0].isnan().all() and out[7].isnan().all()
    assert len(tile_image(pixels, tile=16, grid=(1, 1))) == 1


def test_does_not_depend_on_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(tile_image(photo(300, 500), tile=64))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@BACKENDS
def test_opcheck(backend):
    normalisation = torch.tensor([MEAN, STD], dtype=torch.float64)
    args = (photo(20, 30)[None], torch.empty(7, 3, 8, 8), normalisation, 3, 2, True, backend)
    torch.library.opcheck(torch.ops.ivl.tile_image_.default, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles_to_one_graph():
    pixels = photo(40, 60)

    def run(pixels):
        return tile_image(pixels, tile=16, dtype=torch.bfloat16) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pixels), run(pixels))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(photo=torch.zeros(4, 4, 3)), ValueError, r"photo: got float32 \[4, 4, 3\] on cpu, expected uint8"),
        (dict(photo=torch.zeros(3, 4, 4, dtype=torch.uint8)), ValueError, r"photo: got uint8 \[3, 4, 4\]"),
        (dict(photo=torch.zeros(0, 4, 3, dtype=torch.uint8)), ValueError, "expected at least one pixel"),
        (dict(photo=[1]), TypeError, "photo: got list, expected a torch.Tensor"),
        (dict(dtype=torch.int32), TypeError, "dtype: got torch.int32"),
        (dict(grid=(0, 1)), ValueError, "grid: got 0 x 1"),
        (dict(tile=0), ValueError, "tile: got 0"),
        (dict(min_tiles=5, max_tiles=2), ValueError, "min_tiles, max_tiles: got 5, 2"),
        (dict(std=(1.0, 0.0, 1.0)), ValueError, "std: got"),
        (dict(mean=(1.0,)), ValueError, "mean: got 1 values, expected 3"),
        (dict(out=torch.zeros(2, 3, 8, 8)), ValueError, r"out: got .*expected shape \[1, 3, 8, 8\]"),
        (dict(out=torch.zeros(1, 3, 8, 8, dtype=torch.int32)), TypeError, "out: .*expected dtype"),
        (dict(out=torch.zeros(1, 3, 8, 16)[..., ::2]), ValueError, "out: got strides"),
    ],
)  # fmt: skip
def test_wrong_input(change, error, message):
    given = {**dict(photo=torch.zeros(8, 8, 3, dtype=torch.uint8), tile=8), **change}
    with pytest.raises(error, match=message):
        tile_image(given.pop("photo"), **given)
    with pytest.raises(ValueError, match=r"photos\[1\]: got float32"):
        tile_images([torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, 3)])
