"""Visual rows into placeholder positions, against `masked_scatter`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels.ops import place_rows
from ivl_kernels.testing import poisoned
from tests.simulator.gpu import backends, simulated_gpu

BACKENDS = backends("cpu", "cuda", "triton", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOKEN = 7


def make(batch, length, width, dtype=torch.float32, seed=0, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.where(torch.rand(batch, length, generator=generator) < share, TOKEN, 3)
    embeds = torch.randn(batch, length, width, generator=generator).to(dtype)
    rows = torch.randn(int((ids == TOKEN).sum()), width, generator=generator).to(dtype)
    return embeds, ids, rows


def plain(embeds, ids, rows):
    return embeds.masked_scatter((ids == TOKEN).unsqueeze(-1), rows)


@BACKENDS
@settings(max_examples=15)
@given(
    batch=st.integers(0, 3), length=st.integers(0, 40), width=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99), inplace=st.booleans(),
)  # fmt: skip
def test_equals_masked_scatter(backend, batch, length, width, dtype, share, seed, inplace):
    embeds, ids, rows = make(batch, length, width, dtype, seed, share)
    expected, before = plain(embeds, ids, rows), embeds.clone()
    with poisoned():
        got = place_rows(embeds, ids, rows, TOKEN, inplace=inplace, backend=backend)
    assert torch.equal(got, expected)
    assert (got is embeds) == inplace
    assert inplace or torch.equal(embeds, before)


@BACKENDS
def test_strided(backend):
    embeds, ids, rows = make(3, 10, 8)
    expected = plain(embeds, ids, rows)
    ids, rows = ids.t().contiguous().t(), torch.zeros(len(rows), 16)[:, ::2].copy_(rows)
    wide = torch.zeros(3, 20, 16)
    for view in (wide[:, ::2, :8], wide[:, 5:15, ::2], wide[:, :10, 8:]):
        view.copy_(embeds)
        assert torch.equal(place_rows(view, ids, rows, TOKEN, inplace=True, backend=backend), expected)
        assert torch.equal(torch.ops.ivl.take_rows(view, ids, len(rows), TOKEN, backend), rows)


@BACKENDS
@pytest.mark.parametrize("gap", [0, 1, 3])
def test_runs_end_with_the_batch_row(backend, gap):
    """Whole rows one after the other in memory, with a gap between batch rows in which nothing may be written."""
    embeds, ids, _ = make(3, 6, 8)
    ids[:, 0] = ids[:, -2:] = TOKEN  # a run at each end: it looks as if it went on in the next batch row
    rows = torch.randn(int((ids == TOKEN).sum()), 8)
    wide = torch.full((3, 6 + gap, 8), 9.0)
    view = wide[:, :6].copy_(embeds)
    assert torch.equal(place_rows(view, ids, rows, TOKEN, inplace=True, backend=backend), plain(embeds, ids, rows))
    assert (wide[:, 6:] == 9).all()
    assert torch.equal(torch.ops.ivl.take_rows(view, ids, len(rows), TOKEN, backend), rows)


@BACKENDS
@pytest.mark.parametrize("width", [0, 2100])
def test_empty_and_wide_rows(backend, width):
    embeds, ids, rows = make(1, 5, width, torch.bfloat16)
    there = embeds.clone()
    torch.ops.ivl.place_rows_(there, ids, rows, TOKEN, backend)
    assert torch.equal(there, plain(embeds, ids, rows))
    assert torch.equal(torch.ops.ivl.take_rows(there, ids, len(rows), TOKEN, backend), rows)


@BACKENDS
def test_odd_addresses(backend):
    """Rows of 16 bytes, of which one side or the other begins 2 bytes past such an address."""
    embeds, ids, rows = make(2, 9, 8, torch.bfloat16)
    for shift in (0, 1):
        there = torch.empty(2 * 9 * 8 + 1, dtype=rows.dtype)[shift:][: 2 * 9 * 8].view(2, 9, 8).copy_(embeds)
        given = torch.empty(rows.numel() + 1, dtype=rows.dtype)[1 - shift :][: rows.numel()].view_as(rows).copy_(rows)
        torch.ops.ivl.place_rows_(there, ids, given, TOKEN, backend)
        assert torch.equal(there, plain(embeds, ids, rows))
        assert torch.equal(torch.ops.ivl.take_rows(there, ids, len(rows), TOKEN, backend), rows)


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients(backend, inplace):
    embeds, ids, rows = make(2, 9, 5, torch.float64)
    embeds.requires_grad_()
    rows.requires_grad_()

    def run(embeds, rows):
        return place_rows(embeds * 1, ids, rows, TOKEN, inplace=inplace, backend=backend)

    assert run(embeds, rows).grad_fn is not None
    assert torch.autograd.gradcheck(run, (embeds, rows))


@BACKENDS
def test_opcheck(backend):
    embeds, ids, rows = make(2, 9, 5)
    torch.library.opcheck(torch.ops.ivl.place_rows_.default, (embeds, ids, rows, TOKEN, backend))
    torch.library.opcheck(torch.ops.ivl.take_rows.default, (embeds, ids, rows.shape[0], TOKEN, backend))


@BACKENDS
def test_wrong_count_writes_nothing(backend):
    embeds, ids, rows = make(2, 9, 5)
    before = embeds.clone()
    for wrong in (rows[:-1], torch.cat([rows, rows])):
        with pytest.raises(ValueError, match=rf"rows: got {len(wrong)} visual rows for {len(rows)} placeholder"):
            place_rows(embeds, ids, wrong, TOKEN, inplace=True, backend=backend)
    assert torch.equal(embeds, before)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(embeds=torch.zeros(2, 5)), ValueError, "embeds: got float32"),
        (dict(embeds=torch.zeros(2, 9, 5, dtype=torch.int64)), TypeError, "embeds: .*expected dtype"),
        (dict(input_ids=torch.zeros(2, 8, dtype=torch.int64)), ValueError, "input_ids: .*expected shape"),
        (dict(input_ids=torch.zeros(2, 9, dtype=torch.int32)), TypeError, "input_ids: .*expected dtype int64"),
        (dict(rows=torch.zeros(3, 5, dtype=torch.bfloat16)), TypeError, "rows: .*expected the dtype of embeds"),
        (dict(rows=torch.zeros(3, 4)), ValueError, r"rows: .*expected \[\.\.\., 5\]"),
        (dict(rows=[1, 2]), TypeError, "rows: got list, expected a torch.Tensor"),
    ],
)
def test_wrong_input(change, error, message):
    embeds, ids, rows = make(2, 9, 5)
    with pytest.raises(error, match=message):
        place_rows(**{**dict(embeds=embeds, input_ids=ids, rows=rows, token_id=TOKEN), **change})


def test_several_blocks_of_ids():
    embeds, ids, rows = make(2, 2600, 2, share=0.1)
    with simulated_gpu():
        assert torch.equal(place_rows(embeds, ids, rows, TOKEN, backend="cuda"), plain(embeds, ids, rows))


def test_long_runs_across_threads():
    """Runs much longer than what one thread copies, one after another and with gaps, on both sides of a batch row."""
    ids = torch.full((3, 4096), TOKEN)
    ids[:, 1000:1003] = 3
    ids[1, ::7] = 3
    embeds = torch.zeros(3, 4096, 24)
    rows = torch.randn(int((ids == TOKEN).sum()), 24)
    assert torch.equal(place_rows(embeds, ids, rows, TOKEN), plain(embeds, ids, rows))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_counters(backend):
    """Rows move once, 16 bytes a lane, in whole sectors."""
    embeds, ids, rows = make(2, 64, 256)
    with simulated_gpu() as log:
        place_rows(embeds, ids, rows, TOKEN, inplace=True, backend=backend)
    move = log[-1]
    size = rows.numel() * 4
    assert move.global_store_bytes == size
    assert move.global_load_bytes <= size + 8 * 128 * rows.shape[0]
    assert move.store_efficiency == 1
    assert move.instructions["st.global"] == size / 16 / 32
