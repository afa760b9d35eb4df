"""Rows of samples: tensors, weights, padding, pieces."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels.ops import RowPlan, row_plan
from ivl_kernels.packing import Collator, Limits, Sample, collate, cut
from ivl_kernels.packing.stream import TooLarge

IMAGE, START, END, TOKENS = 290, 291, 292, 4


def sample(parts, supervised=3, seed=0, key=None):
    """parts: numbers of text tokens (int) and of tiles ((n,)) in order; the last tokens are supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids, tiles = [], 0
    for part in parts:
        if isinstance(part, tuple):
            ids += [START, *[IMAGE] * (part[0] * TOKENS), END]
            tiles += part[0]
        else:
            ids += torch.randint(1, 280, (part,), generator=generator).tolist()
    ids = torch.tensor(ids)
    labels = ids.clone()
    labels[: len(ids) - supervised] = -100
    pixels = torch.randn(tiles, 3, 8, 8, generator=generator) if tiles else None
    return Sample(ids, labels, pixels, key)


def test_a_row():
    samples = [sample([4, (2,), 5], 4, 1), sample([3], 2, 2), sample([(1,), 2], 1, 3)]
    row = collate(samples, reduction="square", pad_to=50)
    lengths = [s.tokens for s in samples] + [50 - sum(s.tokens for s in samples)]
    starts = list(itertools.accumulate(lengths, initial=0))
    assert row["cu_seq_lens_q"].tolist() == starts and row["cu_seq_lens_q"].dtype == torch.int32
    assert row["max_length_q"] == row["max_length_k"] == max(lengths)
    assert row["input_ids"].shape == row["labels"].shape == row["position_ids"].shape == (1, 50)
    for s, begin, end in zip(samples, starts, starts[1:]):
        assert torch.equal(row["input_ids"][0, begin:end], s.ids)
        assert torch.equal(row["labels"][0, begin:end], s.labels)
        assert row["position_ids"][0, begin:end].tolist() == list(range(s.tokens))
    assert (row["labels"][0, starts[3] :] == -100).all() and row["position_ids"][0, starts[3]] == 0
    assert torch.equal(row["pixel_values"], torch.cat([samples[0].pixels, samples[2].pixels]))
    assert "attention_mask" not in row and row["use_cache"] is False
    plan = RowPlan(**row["row_plan"])
    assert plan.offsets.tolist() == [0, 4, 6, 7, 7]
    torch.testing.assert_close(plan.weight, torch.tensor([0.5] * 4 + [2**-0.5] * 2 + [1.0]))
    assert torch.equal(torch.cat([s.labels[s.labels >= 0] for s in samples]), plan.targets)


def test_collator_takes_a_trainers_batch():
    samples = [sample([4]), sample([5])]
    one, other = Collator(reduction="sample")(samples), Collator(reduction="sample")([samples])
    assert all(torch.equal(one["row_plan"][name], other["row_plan"][name]) for name in one["row_plan"])
    assert "pixel_values" not in one


def test_no_labels():
    row = collate([Sample(torch.arange(3))])
    assert row["row_plan"]["rows"].numel() == 0 and row["row_plan"]["denominator"] == 0


def test_bad_samples():
    ids = torch.arange(4)
    with pytest.raises(TypeError, match="ids: got int32"):
        Sample(ids.int())
    with pytest.raises(ValueError, match="without tokens"):
        Sample(ids[:0])
    with pytest.raises(ValueError, match=r"labels: got int64 \[3\] on cpu, expected shape \[4\]"):
        Sample(ids, ids[:3])
    with pytest.raises(ValueError, match="pixels"):
        Sample(ids, pixels=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="samples: got none"):
        collate([])
    with pytest.raises(ValueError, match="pad_to: got 3, expected at least the 4"):
        collate([Sample(ids)], pad_to=3)
    with pytest.raises(ValueError, match="labels: got 3 at position 3"):
        collate([Sample(ids, ids)], vocab_size=3)


PARTS = st.lists(st.one_of(st.integers(0, 9), st.tuples(st.integers(1, 3))), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(parts=PARTS, tokens=st.integers(14, 40), tiles=st.integers(3, 5))
def test_cut(parts, tokens, tiles):
    whole = sample([2, *parts])
    limits = Limits(tokens, tiles)
    pieces = list(cut(whole, limits, IMAGE, TOKENS))
    assert torch.equal(torch.cat([p.ids for p in pieces]), whole.ids)
    assert torch.equal(torch.cat([p.labels for p in pieces]), whole.labels)
    if whole.tiles:
        assert torch.equal(torch.cat([p.pixels for p in pieces if p.tiles]), whole.pixels)
    for p in pieces:
        assert p.tokens <= tokens and p.tiles <= tiles
        assert (p.ids == IMAGE).sum() == TOKENS * p.tiles
        assert (p.ids == START).sum() == (p.ids == END).sum()
        collate([p])
    if whole.tokens <= tokens and whole.tiles <= tiles:
        assert pieces == [whole]


def test_pieces_count_their_own():
    whole = sample([20], supervised=20)
    weights = [
        RowPlan(**collate([p], reduction="square")["row_plan"]).weight for p in cut(whole, Limits(16, 1), 290, 4)
    ]
    assert [len(w) for w in weights] == [15, 3] and weights[0][0] == 0.25 and weights[1][0] == 0.5
    assert len(row_plan(whole.labels).rows) == 19


def test_an_image_too_large():
    with pytest.raises(TooLarge, match="an image with 14 tokens and 3 tiles at position 2, expected at most 10 and 5"):
        list(cut(sample([2, (3,), 2]), Limits(10, 5), IMAGE, TOKENS))
    with pytest.raises(ValueError, match="got 4 placeholders for 0 tiles"):
        list(cut(Sample(torch.full((4,), IMAGE)), Limits(10, 5), IMAGE, TOKENS))
