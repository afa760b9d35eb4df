"""Select, Search, Pack, Maintain: nothing is lost or repeated, limits hold, rows are full, and all of it resumes."""

import copy
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bench.packing import sizes_of
from ivl_kernels.packing import Limits, Mixture, PackedStream, Packer
from ivl_kernels.packing.stream import TooLarge

SIZES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10)), max_size=200)


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, rows=st.integers(1, 5))
def test_every_sample_is_in_one_row(sizes, rows):
    packer = Packer(Limits(100, 10), rows=rows)
    made = [packer.push(i, *size) for i, size in enumerate(sizes)]
    assert len(packer) == len(sizes) - sum(len(row) for row in made if row)
    assert len(packer.state_dict()["open"]) <= rows
    made = [row for row in made if row] + packer.flush()
    assert sorted(itertools.chain(*made)) == list(range(len(sizes))) and len(packer) == 0
    for row in made:
        assert row == sorted(row)
        assert sum(sizes[i][0] for i in row) <= 100 and sum(sizes[i][1] for i in row) <= 10


def test_search_takes_the_fullest_that_fits():
    packer = Packer(Limits(10, 4), rows=3)
    for item, tokens, tiles in (("a", 5, 0), ("b", 6, 4), ("c", 7, 0)):
        assert packer.push(item, tokens, tiles) is None
    assert packer.push("d", 3, 0) == ["c", "d"]  # no token left
    assert packer.push("e", 4, 1) is None  # b has no tile left
    assert packer.push("f", 1, 0) == ["a", "e", "f"]


def test_maintain_finishes_the_fullest():
    packer = Packer(Limits(10, 4), rows=2)
    assert packer.push("a", 6) is None and packer.push("b", 8) is None
    assert packer.push("c", 7) == ["b"]
    assert packer.flush() == [["c"], ["a"]]


def test_fill():
    limits, sizes = Limits(), [size for size in sizes_of(50_000) if size[0] <= 32768]
    packer = Packer(limits)
    rows = [row for i, size in enumerate(sizes) if (row := packer.push(i, *size))]
    rows += packer.flush()
    assert sum(tokens for tokens, _ in sizes) / (len(rows) * limits.tokens) > 0.98


@pytest.mark.parametrize("size", [(0, 0), (101, 0), (5, 11), (5, -1)])
def test_what_fits_no_row(size):
    packer = Packer(Limits(100, 10))
    with pytest.raises(TooLarge, match=f"got {size[0]} tokens and {size[1]} tiles, expected 1 to 100"):
        packer.push("x", *size)
    assert not packer.flush()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="limits: got"):
        Packer(Limits(0, 1))
    with pytest.raises(ValueError, match="rows: got 0"):
        Packer(rows=0)
    with pytest.raises(ValueError, match="rank: got 2 of 2"):
        Mixture([[1]], rank=2, world=2)
    with pytest.raises(ValueError, match="weights: got 1 for 2"):
        Mixture([[1], [2]], [1])
    with pytest.raises(ValueError, match="weights: .*finite"):
        Mixture([[1]], [float("nan")])
    with pytest.raises(ValueError, match="never be drawn"):
        Mixture([[1], [2]], [1, 0])
    with pytest.raises(ValueError, match="number 1 is empty"):
        Mixture([[1], []], [1, 1], repeat=True)


def test_select_draws_by_weight_and_everything_once():
    sets = [range(1000), range(1000, 4000)]
    drawn = list(Mixture(sets, [3, 1], seed=5))
    assert sorted(drawn) == list(range(4000)) and drawn != sorted(drawn)
    assert 0.7 < sum(item < 1000 for item in drawn[:1000]) / 1000 < 0.8
    again = Mixture(sets, [3, 1], seed=5)
    assert list(again) == drawn and list(again) == drawn  # one that has ended begins again
    assert list(Mixture([[3, 1, 2]], shuffle=False)) == [3, 1, 2] and list(Mixture([])) == []


def test_select_repeats_in_new_orders():
    stream = iter(Mixture([range(5)], repeat=True))
    epochs = [[next(stream) for _ in range(5)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and epochs[0] != epochs[1]


def test_ranks_share_nothing():
    sets = [range(101), range(101, 150)]
    parts = [list(Mixture(sets, seed=1, rank=rank, world=3)) for rank in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(150))


def stream(kind, sizes):
    items = [(i, *size) for i, size in enumerate(sizes)]
    source = Mixture([items[::2], items[1::2]], [2, 1], seed=3) if kind == "mixture" else items
    return PackedStream(source, Limits(100, 10), rows=3, size=lambda item: item[1:])


@pytest.mark.parametrize("kind", ["mixture", "list"])
@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10)), min_size=2, max_size=60), data=st.data())
def test_resumes_anywhere(kind, sizes, data):
    whole = list(stream(kind, sizes))
    assert Counter(itertools.chain(*whole)) == Counter((i, *size) for i, size in enumerate(sizes))
    stop = data.draw(st.integers(0, len(whole)))
    first = stream(kind, sizes)
    begun = list(itertools.islice(first, stop))
    state = copy.deepcopy(first.state_dict())
    rest = stream(kind, sizes)
    rest.load_state_dict(state)
    assert begun + list(rest) == whole
    assert list(rest) == whole  # the next epoch is a whole one
    # The interrupted stream itself goes on too.
    assert begun + list(first) == whole


def test_state_of_another_kind():
    with pytest.raises(ValueError, match="another kind of source"):
        stream("list", [(1, 1)] * 4).load_state_dict(stream("mixture", [(1, 1)] * 4).state_dict())
    with pytest.raises(ValueError, match="got places"):
        Mixture([[1]]).load_state_dict(Mixture([[1], [2]]).state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers):
    sizes = sizes_of(300)
    items = [(i, *size) for i, size in enumerate(sizes) if size[0] <= 32768]
    packed = PackedStream(Mixture([items]), size=size_of)
    rows = list(DataLoader(packed, batch_size=None, num_workers=workers, collate_fn=list))
    assert sorted(item[0] for row in rows for item in row) == [item[0] for item in items]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_of_one_stream(workers):
    """Each rank packs its own share; together the rows hold every sample once."""
    items = [(i, *size) for i, size in enumerate(sizes_of(301)) if size[0] <= 32768]
    seen = []
    for rank in range(3):
        packed = PackedStream(Mixture([items[:90], items[90:]], seed=4, rank=rank, world=3), rows=4, size=size_of)
        rows = list(DataLoader(packed, batch_size=None, num_workers=workers, collate_fn=list))
        assert rows and all(sum(item[1] for item in row) <= 32768 for row in rows)
        seen += [item for row in rows for item in row]
    assert sorted(seen) == items


def test_a_rank_resumes_its_share():
    items = [(i, *size) for i, size in enumerate(sizes_of(200)) if size[0] <= 32768]

    def stream_of(rank):
        return PackedStream(Mixture([items[:50], items[50:]], seed=2, rank=rank, world=2), rows=3, size=size_of)

    seen = []
    for rank in range(2):
        whole, first, rest = list(stream_of(rank)), stream_of(rank), stream_of(rank)
        begun = list(itertools.islice(first, len(whole) // 2))
        rest.load_state_dict(copy.deepcopy(first.state_dict()))
        assert begun + list(rest) == whole
        seen += itertools.chain(*whole)
    assert sorted(seen) == items


def size_of(item):
    return item[1:]
