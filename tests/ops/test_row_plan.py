"""Row plans against the shift, weights and denominators written out label by label."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivl_kernels.ops import row_plan


def by_hand(labels, borders, reduction, counting, boundary):
    """Rows, targets, samples and weights of a packed row, one label at a time."""
    segments = [range(a, b) for a, b in zip(borders, borders[1:])]
    sample_of = {t: i for i, segment in enumerate(segments) for t in segment}
    found = []
    for t in range(1, len(labels)):
        same = sample_of[t] == sample_of[t - 1]
        if labels[t] != -100 and (same or boundary == "internvl"):
            found.append((t - 1, labels[t], sample_of[t]))
    counts = []
    for i, segment in enumerate(segments):
        if counting == "internvl":
            counts.append(sum(labels[t] != -100 for t in segment))
        else:
            counts.append(sum(sample_of[row] == i for row, _, _ in found))
    power = {"token": 0, "sample": 1, "square": 0.5}[reduction]
    return [(row, target, i, max(1, counts[i]) ** -power) for row, target, i in found]


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    data=st.data(),
    reduction=st.sampled_from(["token", "sample", "square"]),
    counting=st.sampled_from(["internvl", "xtuner"]),
    boundary=st.sampled_from(["masked", "internvl"]),
)
def test_packed(lengths, data, reduction, counting, boundary):
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    labels = data.draw(st.lists(st.sampled_from([-100, -100, 3, 7]), min_size=borders[-1], max_size=borders[-1]))
    plan = row_plan(
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(borders, dtype=torch.int32),
        reduction=reduction,
        counting=counting,
        boundary=boundary,
    )
    expected = by_hand(labels, borders, reduction, counting, boundary)
    assert list(zip(plan.rows.tolist(), plan.targets.tolist(), plan.sample.tolist())) == [e[:3] for e in expected]
    assert torch.allclose(plan.weight, torch.tensor([e[3] for e in expected], dtype=torch.float32))
    assert float(plan.denominator) == pytest.approx(sum(e[3] for e in expected), rel=1e-6)
    assert plan.offsets.tolist() == [sum(e[2] < i for e in expected) for i in range(len(lengths) + 1)]
    assert plan.weight.dtype == plan.denominator.dtype == torch.float32


@given(batch=st.integers(1, 3), length=st.integers(0, 7), seed=st.integers(0, 99))
def test_batch_is_transformers_shift(batch, length, seed):
    labels = torch.randint(0, 9, (batch, length), generator=torch.Generator().manual_seed(seed))
    labels[labels < 4] = -100
    plan = row_plan(labels, reduction="square")
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    rows = (shifted != -100).nonzero().squeeze(1)
    assert torch.equal(plan.rows, rows) and torch.equal(plan.targets, shifted[rows])
    assert torch.equal(plan.sample, rows // max(1, length))
    joined = row_plan(labels.reshape(1, -1), torch.arange(batch + 1) * length, reduction="square")
    if length:
        assert all(torch.equal(a, b) for a, b in zip(plan, joined))


def test_internvl_loss_to_the_last_bit():
    """The weights and denominator that InternVL's packed datasets and model make: python numbers, then float32."""
    torch.manual_seed(0)
    borders = [0, 7, 7, 19, 32]
    labels = torch.randint(0, 50, (32,))
    labels[torch.rand(32) < 0.4] = -100
    weights = []
    for begin, end in zip(borders, borders[1:]):
        count = int((labels[begin:end] != -100).sum())
        weights += [1 / count**0.5 if int(label) != -100 else 0.0 for label in labels[begin:end]]
    weights = torch.tensor(weights, dtype=torch.float32)
    nats = torch.rand(31)
    expected = (nats * weights[1:]).sum() / weights[1:].sum()
    plan = row_plan(labels, torch.tensor(borders), reduction="square", boundary="internvl")
    assert torch.equal(plan.weight, weights[1:][labels[1:] != -100])
    assert (nats[plan.rows] * plan.weight).sum() / plan.denominator == pytest.approx(float(expected), rel=1e-6)


def test_a_padding_segment_and_nothing_supervised():
    plan = row_plan(torch.full((1, 6), -100), torch.tensor([0, 4, 6]))
    assert plan.rows.numel() == 0 and float(plan.denominator) == 0 and plan.offsets.tolist() == [0, 0, 0]
    assert row_plan(torch.zeros(0, dtype=torch.int64)).offsets.tolist() == [0]


def test_to():
    plan = row_plan(torch.tensor([1, 2, 3])).to("meta")
    assert all(t.device.type == "meta" for t in plan)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"labels": torch.ones(3)}, TypeError, "labels: got float32 .* expected int64 on cpu"),
        ({"labels": torch.ones(3, device="meta").long()}, TypeError, "labels: got int64 .* on meta"),
        ({"labels": torch.tensor([1, 2, 11])}, ValueError, r"labels: got 11 at position 2, expected -100 or in \[0, 9"),
        ({"labels": torch.tensor([1, -2, 3])}, ValueError, "labels: got -2 at position 1"),
        ({"reduction": "mean"}, ValueError, "reduction: got 'mean', expected one of 'token', 'sample', 'square'"),
        ({"counting": "x"}, ValueError, "counting: got 'x'"),
        ({"boundary": "x"}, ValueError, "boundary: got 'x'"),
        ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, r"cu_seqlens: got \[0, 2\], expected .* to the 3 labels"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 3])}, ValueError, "cu_seqlens: .* expected ascending"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens: got float32"),
    ],
)
def test_errors(change, error, message):
    arguments = {"labels": torch.tensor([1, 2, 3]), "vocab_size": 9} | change
    with pytest.raises(error, match=message):
        row_plan(arguments.pop("labels"), arguments.pop("cu_seqlens", None), **arguments)
