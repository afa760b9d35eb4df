"""V2PE positions against exact rational arithmetic, one token at a time."""

import math
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels.ops import v2pe_position_ids
from ivl_kernels.ops.v2pe_rope import op, triton_positions
from ivl_kernels.testing import poisoned
from tests.simulator import aot
from tests.simulator.gpu import backends, simulated_gpu
from tests.simulator.idle import idle_gpu, no_host_reads

BACKENDS = backends("cpu", "triton", "reference")
CPU = backends("cpu", "reference")
IMAGE, TEXT, TILE, SMALL = 9, 1, 8, 2  # small tiles keep the cases short
TILES = dict(tile_tokens=TILE, compressed_tokens=SMALL)


def expected(rows, deltas, compress=None, same=False, pads=(0, 0)):
    """`rows`: lists of pieces, an int for that many text tokens or a list of tiles (True: compressed)."""
    out, image = [], 0
    for row in rows:
        p, positions = Fraction(-1), []
        for piece in row:
            if isinstance(piece, int):
                positions += [p + i + 1 for i in range(piece)]
                p += piece
                continue
            delta = Fraction(deltas[image % len(deltas)]).limit_denominator(1000)
            image += 1
            for small in piece:
                small = small and compress
                for _ in range(SMALL if small else TILE):
                    p += delta * (TILE // SMALL if small and not same else 1)
                    positions.append(p)
            p = Fraction(math.ceil(p))
        out.append([float(p) for p in positions])
    return out


def ids_of(rows, compress, left):
    """input_ids [B, N], attention_mask [B, N], compress [T]."""
    lines, tiles = [], []
    for row in rows:
        line = []
        for piece in row:
            if isinstance(piece, int):
                line += [TEXT] * piece
            else:
                tiles += piece
                line += [IMAGE] * sum(SMALL if small and compress else TILE for small in piece)
        lines.append(line)
    width = max(len(line) for line in lines)
    ids, mask = torch.full((len(rows), width), TEXT), torch.zeros(len(rows), width, dtype=torch.int64)
    for b, line in enumerate(lines):
        where = slice(width - len(line), width) if left else slice(0, len(line))
        ids[b, where], mask[b, where] = torch.tensor(line, dtype=torch.int64), 1
    return ids, mask, torch.tensor(tiles, dtype=torch.bool)


ROW = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.booleans(), min_size=1, max_size=4)), min_size=0, max_size=4
).map(lambda pairs: [piece for pair in pairs for piece in pair] + [2])


@CPU
@given(
    rows=st.lists(ROW, min_size=1, max_size=3), left=st.booleans(), compress=st.booleans(), same=st.booleans(),
    deltas=st.lists(st.sampled_from([1, 1 / 2, 1 / 16, 1 / 256, 0.1]), min_size=1, max_size=12),
)  # fmt: skip
def test_against_exact_arithmetic(backend, rows, left, compress, same, deltas):
    as_exact_arithmetic(backend, rows, left, compress, same, deltas)


@pytest.mark.parametrize("target", [80, 90, 100])
@settings(max_examples=6)
@given(
    rows=st.lists(ROW, min_size=1, max_size=3), left=st.booleans(), compress=st.booleans(), same=st.booleans(),
    deltas=st.lists(st.sampled_from([1, 1 / 2, 1 / 16, 1 / 256, 0.1]), min_size=1, max_size=12),
)  # fmt: skip
def test_triton_against_exact_arithmetic(target, rows, left, compress, same, deltas):
    with mock.patch.object(triton_positions, "BLOCK", 256), simulated_gpu(target=target) as log:
        as_exact_arithmetic("triton", rows, left, compress, same, deltas)
        assert len(log) == 1


def as_exact_arithmetic(backend, rows, left, compress, same, deltas):
    ids, mask, tiles = ids_of(rows, compress, left)
    images = sum(not isinstance(piece, int) for row in rows for piece in row)
    deltas = (deltas * images)[:images]
    options = dict(TILES, compress=tiles, compressed_step="same" if same else "span") if compress else {}
    with poisoned():
        got = v2pe_position_ids(ids, IMAGE, deltas, attention_mask=mask, backend=backend, **options)
    assert got.dtype == torch.float32
    assert (got[mask == 0] == 1).all()
    for b, row in enumerate(expected(rows, deltas, compress, same)):
        assert torch.equal(got[b][mask[b] == 1], torch.tensor(row))


@BACKENDS
@pytest.mark.parametrize("delta, tokens, after", [(0.55, 100, 56), (0.1, 30, 4), (0.07, 100, 8), ("1/3", 33, 12)])
def test_a_span_is_not_rounded_up_for_float_error(backend, delta, tokens, after):
    ids = torch.tensor([[TEXT] + [IMAGE] * tokens + [TEXT]])  # 0.55 * 100 is 55.00000000000001
    assert v2pe_position_ids(ids, IMAGE, delta, backend=backend)[0, -1] == after


@BACKENDS
def test_packed_samples_restart(backend):
    first, second = [3, [False], 4], [2, [False, False], 1]
    ids = torch.cat([ids_of([row], False, False)[0] for row in (first, second)], 1)
    lengths = [15, 19]
    cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    got = v2pe_position_ids(ids, IMAGE, ["1/4", 0.5], cu_seqlens=cu_seqlens, backend=backend)
    assert got[0].tolist() == sum(expected([first, second], [0.25, 0.5]), [])
    # A sample that ends in an image right before one that starts with an image: two images, not one.
    ids = torch.full((1, 8), IMAGE)
    got = v2pe_position_ids(ids, IMAGE, [1.0, 0.5], cu_seqlens=torch.tensor([0, 4, 8]), backend=backend)
    assert got[0].tolist() == [0, 1, 2, 3, -0.5, 0, 0.5, 1]


@BACKENDS
def test_delta_one_is_the_stock_position(backend):
    ids, mask, _ = ids_of([[5, [False] * 3, 7], [1, [False], 2, [False], 3]], False, True)
    stock = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    assert torch.equal(v2pe_position_ids(ids, IMAGE, attention_mask=mask, backend=backend), stock.float())
    assert torch.equal(v2pe_position_ids(ids, IMAGE, 1, backend=backend)[0], torch.arange(ids.shape[1]).float())


@BACKENDS
def test_text_does_not_depend_on_compression(backend):
    routed = [[4, [True, False, True], 3, [True], 2]]
    ids, _, tiles = ids_of(routed, True, False)
    full, _, _ = ids_of(routed, False, False)
    got = v2pe_position_ids(ids, IMAGE, "1/4", compress=tiles, **TILES, backend=backend)
    plain = v2pe_position_ids(full, IMAGE, "1/4", backend=backend)
    assert torch.equal(got[ids == TEXT], plain[full == TEXT])
    assert set(got[ids == IMAGE].tolist()) <= set(plain[full == IMAGE].tolist())


@BACKENDS
@pytest.mark.parametrize("hole", [0, 5, 16, 20, 31, 32, 39])
def test_padding_inside_an_image_parts_it(backend, hole):
    ids = torch.tensor([[TEXT] + [IMAGE] * 40 + [TEXT]])
    mask = torch.ones_like(ids)
    mask[0, 1 + hole] = 0
    got = v2pe_position_ids(ids, IMAGE, 0.3, attention_mask=mask, backend=backend)[0]
    last = 0.0
    for begin, end in ((1, 1 + hole), (2 + hole, 41)):
        steps = torch.arange(1, end - begin + 1, dtype=torch.float64) * 0.3
        torch.testing.assert_close(got[begin:end].double(), last + steps, rtol=1e-6, atol=0)
        last += math.ceil((end - begin) * 0.3 - 1e-9)
    assert got[41] == last + 1


@BACKENDS
def test_one_delta_a_row(backend):
    ids, _, _ = ids_of([[2, [False], 1], [2, [False], 1]], False, False)
    got = v2pe_position_ids(ids, IMAGE, torch.tensor([[0.5], [1.0]]), backend=backend)
    assert got[:, -1].tolist() == [6, 10]


def test_random_steps():
    ids, _, _ = ids_of([[2, [False], 1] * 40], False, False)

    def draw(seed):
        return v2pe_position_ids(ids, IMAGE, "random", generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    starts = (ids[0] == IMAGE) & (ids[0].roll(1) != IMAGE)
    before = starts.nonzero().squeeze(1)
    steps = draw(1)[0][before] - draw(1)[0][before - 1]
    assert set(steps.tolist()) <= {2.0**-j for j in range(9)} and len(set(steps.tolist())) > 4


@BACKENDS
def test_steps_that_float32_cannot_hold(backend):
    def run(text, delta):
        ids = torch.cat([torch.full((1, text), TEXT), torch.full((1, 256), IMAGE)], 1)
        return v2pe_position_ids(ids, IMAGE, delta, backend=backend)

    got = run(65536, "1/256")[0]  # the last position before the limit: all 256 tokens are there and differ
    assert got[-1] == 65536 and len(set(got[-256:].tolist())) == 256
    with pytest.raises(ValueError, match=r"delta: image 0 ends at position 65537, where float32"):
        run(65537, "1/256")
    assert run(65537, "2/256")[0, -1] == 65538
    with pytest.raises(ValueError, match="float32 cannot hold"):
        run(131072, 0.1)


@BACKENDS
def test_degenerate_batches(backend):
    for shape in ((0, 5), (2, 0), (1, 1)):
        got = v2pe_position_ids(torch.ones(shape, dtype=torch.int64), IMAGE, 0.5, backend=backend)
        assert got.shape == shape and bool((got == 0).all())
    ids = torch.full((1, 4), IMAGE)  # an image with no text before it starts below zero
    assert v2pe_position_ids(ids, IMAGE, 0.5, backend=backend)[0].tolist() == [-0.5, 0, 0.5, 1]


@BACKENDS
def test_opcheck(backend):
    ids, mask, tiles = ids_of([[3, [True, False], 2]], True, False)
    args = (ids, mask.bool(), None, IMAGE, torch.tensor([0.5], dtype=torch.float64), False, tiles, TILE, SMALL, 4)
    torch.library.opcheck(torch.ops.ivl.v2pe_position_ids.default, (*args, backend))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(input_ids=torch.ones(5, dtype=torch.int64)), ValueError, "input_ids: .*expected shape"),
        (dict(input_ids=torch.ones(1, 5)), TypeError, "input_ids: .*expected dtype int64"),
        (dict(delta=0), ValueError, r"delta: got 0, expected a number in \(0, 1\]"),
        (dict(delta="2"), ValueError, "delta: got '2'"),
        (dict(delta="many"), ValueError, "delta: got 'many', expected a number"),
        (dict(delta=[0.5, 0.5]), ValueError, "delta: got 2 values, expected one for each of the 1 images"),
        (dict(delta=torch.tensor([2.0])), ValueError, "delta: got values from"),
        (dict(delta=torch.ones(3, 1)), ValueError, "delta: got 3 rows, expected 1"),
        (dict(delta=torch.ones(3, 2)), ValueError, r"delta: .*expected a scalar, \[images\] or \[B, 1\]"),
        (dict(attention_mask=torch.ones(1, 4)), ValueError, "attention_mask: .*expected shape"),
        (dict(compress=torch.ones(2, dtype=torch.bool)), ValueError, "compress: got 2 tiles that do not fit the 10"),
        (dict(compress=torch.ones(1)), TypeError, "compress: .*expected dtype bool"),
        (dict(compressed_step="no"), ValueError, "compressed_step: got 'no'"),
        (dict(compressed_tokens=3), ValueError, "compressed_tokens: got 3, expected a divisor of tile_tokens 8"),
    ],
)
def test_wrong_input(change, error, message):
    ids = torch.tensor([[TEXT] * 2 + [IMAGE] * 10 + [TEXT]])
    for backend in ("cpu", "reference"):
        with pytest.raises(error, match=message):
            v2pe_position_ids(**{**dict(input_ids=ids, token_id=IMAGE, delta=0.5), **TILES, **change}, backend=backend)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_without_spills(target):
    ids, mask, tiles = ids_of([[3, [True, False], 2]], True, False)
    for compress, cu_seqlens in ((tiles, torch.tensor([0, len(ids[0])])), (None, None)):
        a = op.Positions(ids, mask.bool(), cu_seqlens, IMAGE, torch.ones(1).double(), False, compress, TILE, SMALL, 4)
        with aot.compiling(target) as log:
            triton_positions.v2pe_position_ids(a)
        assert [c.spills for c in log] == [0] or target == "gfx942" and log[0].spills <= 65  # one program, of one pass


def test_nothing_is_read_from_the_device():
    """One scan; on a GPU, torch has one launch more for the step."""
    ids = torch.tensor([[TEXT, IMAGE, IMAGE, TEXT]])
    with idle_gpu() as idle, no_host_reads():
        v2pe_position_ids(ids, IMAGE, 0.5, attention_mask=torch.ones_like(ids), check=False)
        assert idle.launches == 1
        with pytest.raises(AssertionError, match="reads from the device"):
            v2pe_position_ids(ids, IMAGE, 0.5)
