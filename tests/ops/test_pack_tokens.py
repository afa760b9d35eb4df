"""Packing against a slow Python rendition, and against the released batch-1 compaction."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels import _dispatch
from ivl_kernels.ops import PackedTokens, pack_tokens
from ivl_kernels.testing import poisoned
from ivl_kernels.testing.shipped import shipped_compaction
from tests.simulator.gpu import backends, simulated_gpu

BACKENDS = backends("cpu", "cuda", "triton", "reference")
TOKEN, PAD = 7, 11


def slow(ids, compress, mask, labels, weights, padding, full, small, capacity):
    """Token by token, as one would do it by hand."""
    batch, columns = ids.shape
    tile, rows, tile_at = 0, [], []
    for b in range(batch):
        row, inside = [], 0
        for n in range(columns):
            if not mask[b, n]:
                continue
            if ids[b, n] == TOKEN:
                if inside == 0:
                    tile_at.append((b, len(row)))
                if inside < small or not compress[tile]:
                    row.append(n)
                inside += 1
                if inside == full:
                    inside, tile = 0, tile + 1
            else:
                row.append(n)
        rows.append(row)
    lengths = [len(row) for row in rows]
    width = columns if capacity else max(lengths, default=0)
    starts = [sum(lengths[:b]) for b in range(batch)]
    if padding != "none":
        starts = [b * width + (width - lengths[b] if padding == "left" else 0) for b in range(batch)]
    size = batch * width if padding != "none" else batch * columns if capacity else sum(lengths)
    flat = [(PAD, 0, 0, -1, -100, 0.0)] * size
    for b, row in enumerate(rows):
        for i, n in enumerate(row):
            values = (int(ids[b, n]), 1, i, b * columns + n, int(labels[b, n]), float(weights[b, n]))
            flat[starts[b] + i] = values
    shape = (1, size) if padding == "none" else (batch, width)
    columns_of = [torch.tensor([v[k] for v in flat], dtype=torch.int64 if k < 5 else torch.float32) for k in range(6)]
    names = ("ids", "attention_mask", "position_ids", "kept", "labels", "loss_weights")
    result = {name: column.view(shape) for name, column in zip(names, columns_of)}
    keep = [[n in row for n in range(columns)] for row in rows]
    result["keep"] = torch.tensor(keep, dtype=torch.bool).view(batch, columns)
    result["lengths"] = torch.tensor(lengths, dtype=torch.int64)
    result["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    result["tile_rows"] = torch.tensor([starts[b] + at for b, at in tile_at], dtype=torch.int64)
    return result


@st.composite
def batches(draw, most=40):
    """Rows of text and runs of tiles, padded on one side, with labels and weights."""
    full = draw(st.sampled_from([1, 3, 16]))
    small = draw(st.integers(1, full))
    rows, tiles = [], 0
    for _ in range(draw(st.integers(1, 4))):
        row = []
        for _ in range(draw(st.integers(0, 3))):
            row += draw(st.lists(st.integers(0, 6), max_size=most // 4))
            count = draw(st.integers(0, 3))
            tiles += count
            # A text token between images, or none: then the two images are one run.
            row += [TOKEN] * (full * count) + [3] * draw(st.integers(0, 1))
        rows.append(row)
    columns = max(map(len, rows)) + draw(st.integers(0, 2))
    left = draw(st.booleans())
    pad_with = draw(st.sampled_from([PAD, TOKEN, -1]))  # what is masked is not a placeholder, nor a wrong id
    ids = torch.full((len(rows), columns), pad_with)
    mask = torch.zeros(len(rows), columns, dtype=torch.int64)
    for b, row in enumerate(rows):
        at = columns - len(row) if left else 0
        ids[b, at : at + len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[b, at : at + len(row)] = 1
    compress = torch.tensor(draw(st.lists(st.booleans(), min_size=tiles, max_size=tiles)), dtype=torch.bool)
    labels = torch.randint(0, 100, ids.shape)
    return ids, mask, compress, labels, torch.rand(ids.shape), full, small


def check(backend, batch, padding, capacity):
    ids, mask, compress, labels, weights, full, small = batch
    expected = slow(ids, compress, mask, labels, weights, padding, full, small, capacity)
    table = torch.randn(max(TOKEN, PAD) + 1, 3)
    with poisoned():
        got = pack_tokens(
            ids, compress, TOKEN, attention_mask=mask, labels=labels, loss_weights=weights, padding=padding,
            embedding=table, capacity=capacity, pad_id=PAD, tokens_per_tile=full, compressed_tokens=small,
            backend=backend,
        )  # fmt: skip
    for name, value in expected.items():
        mine = getattr(got, name)
        assert mine.dtype == value.dtype, name
        assert torch.equal(mine, value), (name, mine, value)
    text = got.ids != TOKEN
    assert got.embeds.shape == (*got.ids.shape, 3) and torch.equal(got.embeds[text], table[got.ids[text]])
    got.check()
    if not (capacity and backend in ("cuda", "triton")):
        assert got.compressed_tiles == (int(compress.sum()) if small < full else 0)
        assert got.masked_tokens == int((mask == 0).sum())


@backends("cpu", "reference")
@given(batch=batches(), padding=st.sampled_from(["left", "right", "none"]), capacity=st.booleans())
@settings(max_examples=60)
def test_equals_slow(backend, batch, padding, capacity):
    check(backend, batch, padding, capacity)


@given(batch=batches(), padding=st.sampled_from(["left", "right", "none"]), capacity=st.booleans())
@settings(max_examples=10)
def test_equals_slow_on_simulated_gpu(batch, padding, capacity):
    with simulated_gpu():
        for backend in ("cuda", "triton"):
            check(backend, batch, padding, capacity)


def example(tiles=(1, 0, 3), text=5, full=256):
    """Left-padded rows with one image each; `tiles` of each row."""
    rows = [[3] * text + [TOKEN] * (full * t) + [4] * text for t in tiles]
    columns = max(map(len, rows))
    ids = torch.tensor([[PAD] * (columns - len(row)) + row for row in rows])
    return ids, (ids != PAD).long()


@BACKENDS
def test_released_sizes(backend):
    ids, mask = example()
    compress = torch.tensor([True, False, True, False])
    packed = pack_tokens(ids, compress, TOKEN, attention_mask=mask, pad_id=PAD, backend=backend)
    assert packed.lengths.tolist() == [74, 10, 10 + 256 + 64 + 256]
    assert packed.cu_seqlens.tolist() == [0, 74, 84, 670]
    assert packed.ids.shape == (3, 586) and packed.max_length == 586
    assert packed.tile_rows.tolist() == [586 - 74 + 5, 1172 + 5, 1172 + 5 + 256, 1172 + 5 + 256 + 64]
    assert (packed.ids.view(-1)[packed.tile_rows] == TOKEN).all()
    assert torch.equal(packed.ids[0, -74:], torch.tensor([3] * 5 + [TOKEN] * 64 + [4] * 5))
    assert packed.labels is None and packed.loss_weights is None


@BACKENDS
def test_tiles_of_six_tokens(backend):
    ids, mask = example((2, 0, 3), full=6)
    compress = torch.tensor([True, False, False, True, True])
    check(backend, (ids, mask, compress, ids + 1, torch.rand(ids.shape), 6, 2), "left", False)


@BACKENDS
def test_more_tiles_than_columns(backend):
    """Tiles of one token: a batch row's threads place more tiles than it has columns."""
    ids, compress = torch.full((3, 120), TOKEN), torch.zeros(360, dtype=torch.bool)
    packed = pack_tokens(ids, compress, TOKEN, tokens_per_tile=1, compressed_tokens=1, backend=backend)
    assert torch.equal(packed.tile_rows, torch.arange(360)) and torch.equal(packed.ids, ids)


@BACKENDS
def test_masks_of_any_dtype_and_none(backend):
    ids, mask = example((2, 2))
    compress = torch.tensor([True, False, True, False])
    expected = pack_tokens(ids, compress, TOKEN, backend="reference")
    for kind in (None, mask, mask.bool(), mask.float(), mask.to(torch.int32), mask.bool().t().contiguous().t()):
        assert torch.equal(pack_tokens(ids, compress, TOKEN, attention_mask=kind, backend=backend).ids, expected.ids)


@BACKENDS
@pytest.mark.parametrize("padding", ["left", "none"])
def test_empty(backend, padding):
    none = torch.zeros(0, dtype=torch.bool)
    for shape in ((0, 5), (2, 0)):
        packed = pack_tokens(torch.zeros(shape, dtype=torch.int64), none, TOKEN, padding=padding, backend=backend)
        assert packed.ids.numel() == 0 and packed.lengths.tolist() == [0] * shape[0]
    masked = torch.zeros(2, 3, dtype=torch.int64)
    packed = pack_tokens(masked, none, TOKEN, attention_mask=masked, padding=padding, backend=backend)
    assert packed.ids.numel() == 0 and packed.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("padding", ["left", "none"])
def test_rows_in_parallel(padding):
    ids, mask = example((100, 0, 150))
    compress = torch.arange(250) % 3 == 0
    got, expected = (
        pack_tokens(ids, compress, TOKEN, attention_mask=mask, padding=padding, backend=name)
        for name in ("cpu", "reference")
    )
    for name in ("ids", "attention_mask", "position_ids", "kept", "keep", "lengths", "cu_seqlens", "tile_rows"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_long_rows_in_parallel_know_the_tiles_before_them():
    """Placeholders that padding covers are none."""
    ids = torch.randint(20, 30, (3, 32768), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(3):
        ids[row, 100:108] = TOKEN
        ids[row, 9000 : 9000 + 4 * row] = TOKEN
    mask[0, 100:104] = mask[1, 100:108] = 0
    compress = torch.tensor([True, False, True, False, False, True])
    options = dict(attention_mask=mask, tokens_per_tile=4, compressed_tokens=1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # in one thread each row is counted again before the next is written
    try:
        got, expected = (pack_tokens(ids, compress, TOKEN, **options, backend=b) for b in ("cpu", "reference"))
    finally:
        torch.set_num_threads(before)
    for name in ("ids", "attention_mask", "kept", "keep", "tile_rows", "lengths"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def wrong_cases():
    ids, mask = example()
    broken = ids.clone()
    broken[2, 20] = 3
    negative = ids.clone()
    negative[1, -1] = -100
    yield (
        broken,
        4,
        "input_ids: row 2 has a run of 15 placeholder tokens .id 7. in columns 5 to 19, expected a multiple",
    )
    yield negative, 4, "input_ids: row 1 has id -100 at column 777, expected 0 to"
    yield ids, 3, r"compress: got 3 decisions for 4 tiles .*\(tiles of each row: \[1, 0, 3\]\)"
    yield ids, 5, "compress: got 5 decisions for 4 tiles"
    yield ids, 0, "compress: got 0 decisions for 4 tiles"
    yield torch.tensor([[3] * 5 + [TOKEN] * 27]), 0, "row 0 has a run of 27 placeholder tokens .* 5 to 31"


@BACKENDS
def test_wrong_values(backend):
    for ids, tiles, message in wrong_cases():
        mask = (ids != PAD).long()
        with pytest.raises(ValueError, match=message):
            pack_tokens(ids, torch.ones(tiles, dtype=torch.bool), TOKEN, attention_mask=mask, backend=backend)
    ids, mask = example()
    decisions = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="row 0 has id 11 at column .*, expected 0 to 10"):
        pack_tokens(ids, decisions, TOKEN, vocabulary=11, backend=backend)
    # The padding of this mask cuts the last tile short.
    mask[0, -10:] = 0
    with pytest.raises(ValueError, match="row 0 has a run of 251 placeholder"):
        pack_tokens(ids, decisions, TOKEN, attention_mask=mask, backend=backend)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_capacity_mode_on_a_gpu_reads_nothing_and_checks_later(backend, monkeypatch):
    with simulated_gpu():
        for ids, tiles, message in wrong_cases():
            args = (ids, torch.ones(tiles, dtype=torch.bool), TOKEN)
            with monkeypatch.context() as patch:
                for read in ("tolist", "item", "__bool__", "__int__"):
                    patch.setattr(torch.Tensor, read, lambda *_: pytest.fail("a host read"))
                with poisoned():
                    packed = pack_tokens(*args, attention_mask=ids != PAD, capacity=True, backend=backend)
            # Whoever writes there before the check stays inside the buffer.
            assert all(0 <= row < packed.ids.numel() for row in packed.tile_rows.tolist())
            with pytest.raises(ValueError, match=message):
                packed.check()


@pytest.mark.parametrize("report", [None, torch.full((2, 5), -1)])
def test_what_the_host_was_not_told_raises(report):
    status = torch.zeros(2, 5, dtype=torch.int64, device="meta")  # elsewhere, and not read
    packed = PackedTokens(*[torch.zeros(2, 3)] * 6, _status=status, _report=report)
    for name in ("compressed_tiles", "masked_tokens"):
        with pytest.raises(RuntimeError, match="capacity mode on a GPU"):
            getattr(packed, name)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("capacity", [False, True])
def test_what_the_host_read_on_a_gpu_is_kept(backend, capacity, monkeypatch):
    packed = importlib.import_module("ivl_kernels.ops.token_packing.packed")
    report_of = packed.report_of
    monkeypatch.setattr(packed, "report_of", lambda rows, status: report_of(rows, status.to("meta")))
    ids, _ = example((1, 2), full=8)
    options = dict(tokens_per_tile=8, compressed_tokens=2, capacity=capacity, backend=backend)
    with simulated_gpu():
        got = pack_tokens(ids, torch.ones(3, dtype=torch.bool), TOKEN, **options)
    assert got._report.tolist() == ([[-1] * 5] * 2 if capacity else got._status.tolist())


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(input_ids=torch.zeros(5, dtype=torch.int64)), ValueError, "input_ids: .*expected shape"),
        (dict(input_ids=torch.zeros(3, 778)), TypeError, "input_ids: .*expected dtype int64"),
        (dict(compress=torch.zeros(4)), TypeError, "compress: .*expected dtype bool"),
        (dict(compress=[True]), TypeError, "compress: got list"),
        (dict(attention_mask=torch.zeros(3, 777)), ValueError, "attention_mask: .*expected shape"),
        (dict(labels=torch.zeros(3, 778)), TypeError, "labels: .*expected dtype int64"),
        (dict(loss_weights=torch.zeros(3, 778).double()), TypeError, "loss_weights: .*expected dtype float32"),
        (dict(embedding=torch.zeros(9)), ValueError, "embedding: .*expected shape"),
        (dict(embedding=torch.zeros(9, 2).long()), TypeError, "embedding: .*expected dtype"),
        (dict(embedding=torch.zeros(7, 2)), ValueError, "row 0 has id 7 at column .*, expected 0 to 6"),
        (dict(embedding=torch.zeros(9, 2), pad_id=9), ValueError, "pad_id: got 9, expected 0 to 8"),
        (dict(padding="top"), ValueError, "padding: got 'top'"),
        (dict(compressed_tokens=0), ValueError, "compressed_tokens: got 0"),
        (dict(backend="torch"), _dispatch.BackendError, "no such backend"),
    ],
)
def test_wrong_input(change, error, message):
    ids, mask = example()
    args = dict(input_ids=ids, compress=torch.zeros(4, dtype=torch.bool), token_id=TOKEN, attention_mask=mask)
    with pytest.raises(error, match=message):
        pack_tokens(**{**args, **change})


@BACKENDS
@pytest.mark.parametrize("capacity", [False, True])
def test_opcheck(backend, capacity):
    ids, mask = example((1, 2), full=8)
    compress = torch.tensor([True, False, True])
    extra = (torch.ones_like(ids), torch.ones(ids.shape), None)
    for kind, carried in ((mask, extra), (mask.bool(), (None, None, None))):
        args = (ids, kind, compress, *carried, TOKEN, 8, 2, 100, "left", capacity, 0, backend)
        torch.library.opcheck(torch.ops.ivl.pack_tokens.default, args)
    args = (ids, mask, compress, None, None, torch.ones(12, 3), TOKEN, 8, 2, 12, "left", capacity, 0, backend)
    # Not compared with a second run: the rows of placeholders are whatever was in memory.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.ivl.pack_tokens.default, args, test_utils=checks)


@pytest.mark.parametrize("capacity", [False, True])
def test_compile(capacity):
    def run(ids, mask, compress):
        packed = pack_tokens(ids, compress, TOKEN, attention_mask=mask, capacity=capacity)
        return packed.ids * 2, packed.tile_rows, packed.cu_seqlens

    ids, mask = example()
    args = (ids, mask, torch.tensor([True, False, True, False]))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for got, expected in zip(compiled(*args), run(*args)):
            assert torch.equal(got, expected)


def test_counters():
    """The scan reads ids and mask once, the write the ids that stay; between them go 8 bytes for 32 tokens."""
    ids, mask = example((4, 4, 4))
    compress = torch.arange(12) % 2 == 0
    with simulated_gpu() as log:
        packed = pack_tokens(ids, compress, TOKEN, attention_mask=mask.bool(), backend="cuda")
    scan, write = log
    n, kept = ids.numel(), int(packed.keep.sum())
    words = 8 * 3 * -(-ids.shape[1] // 32)
    assert scan.unique_load_bytes <= 9 * n + 12 + 8 * 3
    assert scan.global_store_bytes == n + words + (5 + 1) * 8 * 3 + 8 * 12
    assert write.unique_load_bytes <= 8 * kept + words + 5 * 8 * 3 + 8 * 12
    assert write.global_store_bytes == 4 * 8 * packed.ids.numel() + 8 * 12
    # A warp stores 32 bools to one sector: that is all the bytes it has.
    assert write.store_efficiency > 0.9 and scan.store_efficiency > 0.5
    assert all(report.shared_races == 0 for report in log)


def test_counters_of_triton():
    """Three passes read ids and mask once each and keep nothing of a token but whether it stays."""
    ids, mask = example((4, 4, 4))
    compress = torch.arange(12) % 2 == 0
    with simulated_gpu() as log:
        packed = pack_tokens(ids, compress, TOKEN, attention_mask=mask.bool(), backend="triton")
    count, scan, status, write = log
    n, chunks = ids.numel(), 3 * -(-ids.shape[1] // 1024)
    assert count.unique_load_bytes == 9 * n and count.unique_store_bytes == 8 * chunks
    assert scan.unique_load_bytes <= 9 * n + 12 + 8 * chunks and scan.unique_store_bytes == n + 40 * chunks
    assert status.unique_load_bytes == 40 * chunks and status.unique_store_bytes == 40 * 3
    assert write.unique_load_bytes <= 9 * n + 12 + 16 * chunks + 8 * 3
    assert write.unique_store_bytes == 4 * 8 * packed.ids.numel() + 8 * 12
    assert all(report.shared_races == 0 for report in log)


@pytest.mark.parametrize("columns, target", [(1023, 80), (1024, 80), (1025, 80), (2500, 80), (2500, 90), (2500, 100)])
@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_rows_of_several_chunks(columns, target, padding):
    """Tiles that begin in one chunk and end in another, after rows with tiles of their own."""
    g = torch.Generator().manual_seed(columns)
    ids = torch.randint(20, 30, (3, columns), generator=g)
    for row, first in ((0, 900), (1, 0), (2, columns - 48)):
        ids[row, first : first + 48] = TOKEN
    compress = torch.rand(9, generator=g) < 0.5
    options = dict(labels=ids + 1, tokens_per_tile=16, compressed_tokens=4, padding=padding, pad_id=3)
    expected = pack_tokens(ids, compress, TOKEN, **options, backend="reference")
    with simulated_gpu(target=target) as log, poisoned():
        got = pack_tokens(ids, compress, TOKEN, **options, backend="triton")
    assert len(log) == 4 and all(report.shared_races == 0 for report in log)
    for name in ("ids", "attention_mask", "position_ids", "kept", "keep", "lengths", "labels", "tile_rows"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@BACKENDS
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_released_compaction(backend, seed):
    """Ids and kept tokens of the shipped code, which takes a batch of one."""
    torch.manual_seed(seed)
    ids, _ = example((4,))
    ids = torch.cat([ids, ids[:, : 5 + 512]], 1)
    compress = torch.rand(6) < 0.5
    _, kept_ids, keep = shipped_compaction(torch.zeros(ids.shape[1], 1), ids[0], compress, TOKEN)
    packed = pack_tokens(ids, compress, TOKEN, backend=backend)
    assert torch.equal(packed.ids[0], kept_ids) and torch.equal(packed.keep[0], keep)
    assert torch.equal(packed.kept[0], keep.nonzero().squeeze(1))
    assert packed.attention_mask.min() == 1 and torch.equal(packed.position_ids[0], torch.arange(len(kept_ids)))
