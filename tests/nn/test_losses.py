"""Losses against their formulas in float64, their gradients, and what their denominators make of a split batch."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels import nn as ours
from ivl_kernels import ops
from ivl_kernels.nn.losses import loss_ratio, per_sequence, shared
from tests.ranks import group

H, V = 12, 40


def randn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def pack(lengths, seed=0, supervised=0.6):
    """hidden, weight, labels and cu_seqlens of a pack."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    labels = torch.randint(0, V, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) > supervised] = -100
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return randn(total, H, seed=seed).requires_grad_(), randn(V, H, seed=99).requires_grad_(), labels, starts


def by_hand(hidden, weight, labels, starts, reduction):
    """Sum of the weighted losses, sum of the weights."""
    total, weights = 0.0, 0.0
    logp = (hidden @ weight.T).log_softmax(-1)
    for begin, end in zip(starts.tolist(), starts.tolist()[1:]):
        count = int((labels[begin:end] != -100).sum())
        for t in range(begin, end - 1):
            if labels[t + 1] != -100:
                w = {"token": 1.0, "sample": 1 / count, "square": count**-0.5}[reduction]
                total, weights = total - w * logp[t, labels[t + 1]], weights + w
    return total, weights


def check(value, expected, *leaves, rtol=1e-6):
    torch.testing.assert_close(value.double(), expected.double(), rtol=rtol, atol=1e-7)
    got = torch.autograd.grad(value, leaves, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(expected, leaves, retain_graph=True)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_next_token(reduction):
    hidden, weight, labels, starts = pack([7, 1, 12, 4])
    loss = ours.NextTokenLoss(reduction)
    plan = loss.plan(labels, starts)
    total, weights = by_hand(hidden, weight, labels, starts, reduction)
    check(loss(hidden, weight, plan), total / weights, hidden, weight)
    check(loss(hidden, weight, plan, denominator=17.0), total / 17, hidden, weight)
    check(loss(hidden, weight, plan, denominator=torch.tensor(17.0)), total / 17, hidden, weight)


def test_smoothing_and_z_loss():
    hidden, weight, labels, starts = pack([9, 6])
    loss = ours.NextTokenLoss(label_smoothing=0.1, z_loss=1e-2)
    plan = loss.plan(labels, starts)
    z = (hidden @ weight.T)[plan.rows]
    expected = F.cross_entropy(z, plan.targets, label_smoothing=0.1) + 1e-2 * z.logsumexp(-1).square().mean()
    check(loss(hidden, weight, plan), expected, hidden, weight)


def test_nothing_supervised():
    hidden, weight, labels, starts = pack([5, 4], supervised=0.0)
    for options in ({}, {"label_smoothing": 0.1}):
        loss = ours.NextTokenLoss(**options)
        value = loss(hidden, weight, loss.plan(labels, starts))
        grads = torch.autograd.grad(value, (hidden, weight))
        assert value.item() == 0 and not any(g.any() for g in grads)


def logps(lengths, seed=0):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return randn(sum(lengths), seed=seed, scale=0.5).requires_grad_(), offsets


def sums(values, offsets):
    return torch.stack([values[a:b].sum() for a, b in zip(offsets.tolist(), offsets.tolist()[1:])])


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_per_sequence(lengths):
    values, offsets = logps(lengths)
    torch.testing.assert_close(per_sequence(values, offsets), sums(values, offsets))
    if sum(lengths):
        assert torch.autograd.gradcheck(lambda v: per_sequence(v, offsets), (values,))


def mpo_by_hand(logp, offsets, reference, delta, beta=0.1, weights=(0.8, 0.2, 1.0)):
    total, half = sums(logp, offsets), (len(offsets) - 1) // 2
    r = beta * (total - reference)
    u, v = r[:half], r[half:]
    preference = -F.logsigmoid(u - v).mean()
    quality = (-F.logsigmoid(u - delta) - F.logsigmoid(delta - v)).mean()
    generation = -total[:half].sum() / offsets[half]
    return weights[0] * preference + weights[1] * quality + weights[2] * generation, u, v


def test_mpo():
    loss, seen = ours.MPOLoss(), []
    for call in range(4):
        logp, offsets = logps([3, 5, 1, 4, 2, 6], seed=call)
        reference = randn(6, seed=call + 50, scale=20)
        _, u, v = mpo_by_hand(logp, offsets, reference, 0.0)
        seen.append(torch.cat([u, v]).mean().detach())
        delta = torch.stack(seen).mean()  # every call so far, this one too
        out = loss(logp, offsets, reference)
        expected, u, v = mpo_by_hand(logp, offsets, reference, delta)
        check(out.loss, expected, logp)
        torch.testing.assert_close(out.shift, delta)
        torch.testing.assert_close(out.chosen_rewards, u.detach())
    restored = ours.MPOLoss()
    restored.load_state_dict(loss.state_dict())
    assert restored.shift._state.tolist() == loss.shift._state.tolist()
    # Per-token references are their sums.
    per_token = randn(21, seed=7)
    a = loss.eval()(logp, offsets, per_token, per_token=True).loss
    assert torch.equal(a, loss(logp, offsets, sums(per_token, offsets)).loss)


def test_mpo_gradient_is_one_number_a_response():
    logp, offsets = logps([3, 4, 2, 5])
    loss = ours.MPOLoss(weights=(0.8, 0.2, 1.0))
    out = loss(logp, offsets, randn(4, scale=10))
    (grad,) = torch.autograd.grad(out.loss, logp)
    for a, b in zip(offsets.tolist(), offsets.tolist()[1:]):
        assert torch.allclose(grad[a:b], grad[a].expand(b - a))
    m, u, v = (
        x.detach() for x in (out.chosen_rewards - out.rejected_rewards, out.chosen_rewards, out.rejected_rewards)
    )
    chosen = -0.05 * (0.8 * (-m).sigmoid() + 0.2 * (out.shift - u).sigmoid()) - 1 / 7
    rejected = 0.05 * (0.8 * (-m).sigmoid() + 0.2 * (v - out.shift).sigmoid())
    torch.testing.assert_close(grad[offsets[:-1]], torch.cat([chosen, rejected]))


def test_shift():
    shift = ours.RewardShift()
    pairs = [(randn(3, seed=i), randn(3, seed=i + 9)) for i in range(5)]
    means = [torch.cat(pair).mean() for pair in pairs]
    for i, pair in enumerate(pairs):
        torch.testing.assert_close(shift.update(*pair), torch.stack(means[: i + 1]).mean())
    before = shift.update(*pairs[0]) * 0 + shift._state[0]
    shift.eval()
    assert shift.update(*pairs[3]) == before  # evaluation leaves it
    shift.update_in_eval = True
    assert shift.update(*pairs[3]) != before
    shift.train()
    before = shift._state.clone()
    assert torch.isfinite(shift.update(torch.tensor([torch.nan]), torch.tensor([1.0])))
    assert torch.equal(shift._state, before)
    decayed = ours.RewardShift(momentum=0.9)
    assert decayed.update(*pairs[0]) == means[0]
    torch.testing.assert_close(decayed.update(*pairs[1]), 0.9 * means[0] + 0.1 * means[1])
    half = ours.MPOLoss().to(torch.bfloat16)
    assert half.shift._state.dtype == torch.float64
    with pytest.raises(ValueError, match="momentum: got 1"):
        ours.RewardShift(momentum=1.0)


def test_mpo_bad_input():
    logp, offsets = logps([3, 4, 2])
    with pytest.raises(ValueError, match="offsets: got 3 responses, expected pairs"):
        ours.MPOLoss()(logp, offsets, randn(3))
    with pytest.raises(ValueError, match=r"reference: got float64 \[3\] on cpu, expected shape \[2\]"):
        ours.MPOLoss()(logp[:7], offsets[:3], randn(3))
    with pytest.raises(ValueError, match="offsets: got 7 at the end, expected the 9 values"):
        ours.MPOLoss()(logp, offsets[:3], randn(2))
    with pytest.raises(ValueError, match="pairs: got -1"):
        ours.MPOLoss()(logp[:7], offsets[:3], randn(2), pairs=-1)
    empty = ours.MPOLoss()(logp[:0], torch.zeros(3, dtype=torch.int64), torch.zeros(2))
    assert torch.isfinite(empty.loss)


def gspo_by_hand(logp, old, offsets, advantages, low, high, count):
    total = 0.0
    for i, (a, b) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        if b > a:
            s = (logp[a:b] - old[a:b]).mean().exp()
            total = total - torch.minimum(s * advantages[i], s.clamp(1 - low, 1 + high) * advantages[i])
    return total / count


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("empty", ["exclude", "zero"])
@pytest.mark.parametrize("low, high", [(3e-4, 4e-4), (0.2, 0.2)])
def test_gspo(per_token, empty, low, high):
    lengths = [4, 0, 7, 3, 5, 2]
    logp, offsets = logps(lengths)
    old = logp.detach() + randn(21, seed=5, scale=0.3)
    advantages = torch.tensor([1.0, 0.5, -1.0, 0.0, -2.0, 0.3], dtype=torch.float64)
    out = ours.GSPOLoss(low, high, per_token=per_token, empty=empty)(logp, old, offsets, advantages)
    count = 5 if empty == "exclude" else 6
    check(out.loss, gspo_by_hand(logp, old, offsets, advantages, low, high, count), logp)
    (grad,) = torch.autograd.grad(out.loss, logp)
    for i, (a, b) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        s, A = float(out.ratio[i]), float(advantages[i])
        clipped = (s > 1 + high and A > 0) or (s < 1 - low and A < 0) or A == 0
        assert (grad[a:b] == 0).all() if clipped else True
        if not clipped and b > a:
            torch.testing.assert_close(grad[a:b], torch.full((b - a,), -s * A / (count * (b - a)), dtype=grad.dtype))
    assert out.ratio.shape == (6,) and 0 <= out.clipped <= 1


def test_gspo_on_policy():
    logp, offsets = logps([3, 5])
    out = ours.GSPOLoss()(logp, logp.detach(), offsets, torch.tensor([1.0, -3.0]))
    assert float(out.loss) == 1.0 and out.clipped == 0


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_grpo(aggregate):
    lengths = [4, 0, 7, 3]
    logp, offsets = logps(lengths)
    old, reference = logp.detach() + randn(14, seed=5, scale=0.3), logp.detach() + randn(14, seed=6, scale=0.3)
    advantages = torch.tensor([1.0, 0.5, -1.0, 2.0], dtype=torch.float64)
    A = advantages.repeat_interleave(torch.tensor(lengths))
    ratio = (logp - old).exp()
    value = torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
    value = torch.where(A < 0, torch.maximum(value, 1.1 * A), value)
    value = value - 0.04 * ((reference - logp).exp() - (reference - logp) - 1)
    n = torch.tensor(lengths).clamp(min=1)
    expected = -(sums(value, offsets) / n).sum() / 3 if aggregate == "sequence" else -value.sum() / 14
    loss = ours.GRPOLoss(0.2, 0.28, aggregate=aggregate, kl=0.04, dual_clip=1.1)
    check(loss(logp, old, offsets, advantages, reference_logp=reference).loss, expected, logp)
    check(loss(logp, old, offsets, A, reference_logp=reference).loss, expected, logp)
    with pytest.raises(ValueError, match="reference_logp: got None"):
        loss(logp, old, offsets, advantages)
    with pytest.raises(ValueError, match=r"advantages: got \[3\], expected \[4\] or \[14\]"):
        loss(logp, old, offsets, advantages[:3], reference_logp=reference)
    with pytest.raises(ValueError, match="old_logp: got"):
        loss(logp, old[:3], offsets, advantages, reference_logp=reference)


def test_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    found = ours.group_advantages(rewards, 3)
    group = rewards.view(2, 3).double()
    expected = (group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(found, expected.flatten().float())
    assert (found[3:] == expected.flatten()[3:].float()).all()
    mixed = torch.tensor([7, 3, 3, 7, 7, 3])
    assert torch.equal(ours.group_advantages(rewards, mixed)[mixed == 3], ours.group_advantages(rewards[mixed == 3], 3))
    assert ours.group_advantages(torch.full((4,), 0.1), 4).tolist() == [0] * 4
    torch.testing.assert_close(ours.group_advantages(torch.tensor([2.0]), 1), torch.tensor([2.0]))  # a lone response
    assert ours.group_advantages(rewards, 3, scale="none").tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    assert ours.group_advantages(rewards, 3, scale="batch")[0] == pytest.approx(2 / 3 / (float(rewards.std()) + 1e-6))
    assert ours.group_advantages(rewards[:0], 4).shape == (0,)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"rewards: got {bad} at 1"):
            ours.group_advantages(torch.tensor([1.0, bad]), 2)
    with pytest.raises(ValueError, match="groups: got 4 a group for 6"):
        ours.group_advantages(rewards, 4)


def test_consistency():
    hidden, weight, labels, starts = pack([9, 4, 6], seed=1)
    labels[9:13] = -100  # a sample without targets
    # The teacher's sequences are longer: more visual tokens before the same answers.
    wide = torch.cat([torch.full((5,), -100), labels[:9], torch.full((2,), -100), labels[9:13], labels[13:]])
    plan, teacher_plan = ops.row_plan(labels, starts), ops.row_plan(wide, torch.tensor([0, 14, 20, 26]))
    teacher, head = randn(26, 7, seed=3), randn(V, 7, seed=4)
    p = (hidden @ weight.T)[plan.rows].log_softmax(-1)
    q = (teacher @ head.T)[teacher_plan.rows].log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1)
    means = sums(kl, plan.offsets) / plan.offsets.diff().clamp(min=1)
    loss = ours.ConsistencyLoss()
    given = (hidden, weight, plan, teacher, head, teacher_plan)
    check(loss(*given), means.sum() / 2, hidden, weight)
    check(loss(*given, samples=5), means.sum() / 5, hidden, weight)
    torch.testing.assert_close(loss.per_sample(*given).double(), means.detach())
    other = ops.row_plan(torch.where(wide == -100, wide, (wide + 1) % V), torch.tensor([0, 14, 20, 26]))
    with pytest.raises(ValueError, match="teacher_plan: got"):
        loss(*given[:-1], other)


def test_router():
    window = ours.RatioWindow(8, min_count=3)
    assert window(torch.tensor([1.0, 2.0])).tolist() == [-100, -100] and window.threshold is None
    assert window(torch.tensor([3.0, math.nan])).tolist() == [1, -100] and window.threshold == 2.0
    assert window(torch.tensor([1.5, 2.5, 9.0])).tolist() == [0, 1, 1]  # of 1, 2, 3, 1.5, 2.5, 9: 2.25
    assert window.threshold == 2.25
    window(torch.arange(100.0, 108.0))
    assert window.threshold == 103.5  # the oldest have left
    other = ours.RatioWindow(8, min_count=3)
    other.load_state_dict(window.state_dict())
    assert other.threshold == window.threshold
    ratio = loss_ratio(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert ratio[0] == pytest.approx(2, rel=1e-5) and ratio[1].isnan() and ratio[2] == pytest.approx(1e6, rel=1e-3)
    logits = torch.randn(5, 2, requires_grad=True)
    labels = torch.tensor([0, 1, -100, 1, 0])
    check(ours.RouterLoss()(logits, labels), F.cross_entropy(logits, labels), logits)
    nothing = ours.RouterLoss()(logits, torch.full((5,), -100))
    assert float(nothing) == 0 and not torch.autograd.grad(nothing, logits)[0].any()
    with pytest.raises(ValueError, match="labels: got 2"):
        ours.RouterLoss()(logits, labels + (labels == 1))
    with pytest.raises(ValueError, match="min_count: got 9"):
        ours.RatioWindow(8, min_count=9)


def test_step_scores():
    hidden, weight = randn(20, H), randn(V, H, seed=1)
    rows, offsets = torch.tensor([3, 7, 12, 19]), torch.tensor([0, 3, 3, 4])
    found = ours.StepScores([5, 9])(hidden, weight, rows, offsets)
    expected = (hidden[rows] @ (weight[5] - weight[9])).sigmoid()
    torch.testing.assert_close(found.steps, expected)
    torch.testing.assert_close(found.responses, torch.stack([expected[:3].mean(), expected[0] * 0, expected[3]]))
    total = ours.StepScores([5, 9], values=[0.0, -100.0], reduction="sum")(hidden, weight, rows, offsets)
    torch.testing.assert_close(total.responses[0], -100 * (1 - expected[:3]).sum())
    assert ours.StepScores([5, 9])(hidden, weight, rows).responses is None
    with pytest.raises(ValueError, match="words: got"):
        ours.StepScores([5])


def test_best_of_n():
    scores = torch.tensor([0.1, 0.9, 0.9, 0.5, 0.7, 0.2])
    assert ours.best_of_n(scores).tolist() == [1]
    assert ours.best_of_n(scores, 3).tolist() == [1, 4]
    assert ours.best_of_n(scores, torch.tensor([2, 0, 2, 0, 2, 1])).tolist() == [1, 5, 2]
    with pytest.raises(ValueError, match="scores: got none"):
        ours.best_of_n(scores[:0])
    with pytest.raises(ValueError, match="scores: got NaN at 1"):
        ours.best_of_n(torch.tensor([1.0, math.nan]))


SAMPLES = [[6, 3], [9], [2, 2, 8], [5, 7]]  # four packed rows


def split_gradient(kind, rows, group_sizes, ranks):
    """Gradient of the weight of one loss over `rows` packs, in micro-batches of `group_sizes`, summed and averaged."""
    weight = randn(V, H, seed=99).requires_grad_()
    batches, at = [], 0
    for size in group_sizes:
        lengths = [n for row in SAMPLES[at : at + size] for n in row]
        parts = [pack(row, seed=at + i) for i, row in enumerate(SAMPLES[at : at + size])]
        hidden = torch.cat([p[0].detach() for p in parts])
        labels = torch.cat([p[2] for p in parts])
        batches.append((hidden, labels, torch.tensor([0, *lengths]).cumsum(0)))
        at += size
    batches = batches[rows]
    if kind in ("token", "sample", "square"):
        loss = ours.NextTokenLoss(kind)
        plans = [loss.plan(labels, starts) for _, labels, starts in batches]
        denominator = shared([plan.denominator for plan in plans])
        for (hidden, *_), plan in zip(batches, plans):
            loss(hidden, weight, plan, denominator).backward()
    elif kind == "gspo":
        plans = [ops.row_plan(labels, starts) for _, labels, starts in batches]
        sequences = shared([(plan.offsets.diff() > 0).sum() for plan in plans])
        for (hidden, *_), plan in zip(batches, plans):
            logp = ops.linear_logprob(hidden, weight, plan.targets, plan.rows).logp
            old = logp.detach() + 0.1 * plan.targets.sin()
            advantages = hidden.sum(1)[plan.rows].sin().new_tensor([1.0 + n for n in plan.offsets.diff().tolist()])
            ours.GSPOLoss(0.3, 0.3)(logp, old, plan.offsets, advantages, sequences=sequences).loss.backward()
    elif kind == "mpo":
        # Every pack is half a pair: its samples first, then the same ones the other way round as rejected responses.
        loss = ours.MPOLoss().eval()  # the shift is what it was: it counts micro-batches
        loss.shift.set_extra_state(torch.tensor([0.3, 5.0], dtype=torch.float64))
        plans = [ops.row_plan(labels, starts) for _, labels, starts in batches]
        pairs = shared([len(plan.offsets) - 1 for plan in plans])
        tokens = shared([plan.offsets[-1] for plan in plans])
        for (hidden, *_), plan in zip(batches, plans):
            chosen = ops.linear_logprob(hidden, weight, plan.targets, plan.rows).logp
            rejected = ops.linear_logprob(hidden.neg(), weight, plan.targets, plan.rows).logp
            offsets = torch.cat([plan.offsets, plan.offsets[-1] + plan.offsets[1:]])
            reference = -4.0 * offsets.diff()
            logp = torch.cat([chosen, rejected])
            loss(logp, offsets, reference, pairs=pairs, tokens=tokens).loss.backward()
    else:
        plans = [ops.row_plan(labels, starts) for _, labels, starts in batches]
        samples = shared([(plan.offsets.diff() > 0).sum() for plan in plans])
        head = randn(V, H, seed=77)
        for (hidden, *_), plan in zip(batches, plans):
            ours.ConsistencyLoss()(hidden, weight, plan, hidden, head, plan, samples).backward()
    return weight.grad


KINDS = ("token", "sample", "square", "mpo", "gspo", "consistency")


@pytest.mark.parametrize("kind", KINDS)
def test_one_by_four_and_four_by_one(kind):
    whole = split_gradient(kind, slice(None), [4], 1)
    for sizes in ([1, 1, 1, 1], [2, 2], [3, 1]):
        torch.testing.assert_close(split_gradient(kind, slice(None), sizes, 1), whole)


def _rank(rank, store, out):
    with group(rank, 2, store):
        found = {}
        for kind in KINDS:
            grad = split_gradient(kind, slice(2 * rank, 2 * rank + 2), [1, 1, 1, 1], 2)
            dist.all_reduce(grad)
            found[kind] = grad / 2
        # A rank with nothing supervised takes part in the sum, and its gradient is 0.
        hidden, weight, labels, starts = pack([5, 4], supervised=0.6 if rank else 0.0)
        loss = ours.NextTokenLoss("square")
        plan = loss.plan(labels, starts)
        loss(hidden, weight, plan, shared([plan.denominator])).backward()
        dist.all_reduce(weight.grad)
        found["one rank"] = weight.grad / 2, bool(hidden.grad.any())
        shift = ours.RewardShift()
        found["shift"] = [float(shift.update(randn(2, seed=i + 10 * rank), randn(2, seed=i + 5))) for i in range(3)]
        window = ours.RatioWindow(10, min_count=1)
        window(torch.tensor([1.0, 2.0] if rank else [5.0, 6.0, 7.0]))
        found["window"] = window.threshold
        torch.save(found, f"{out}/{rank}.pt")


def test_two_ranks(tmp_path):
    mp.spawn(_rank, (tmp_path / "store", str(tmp_path)), 2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in KINDS:
        for rank in range(2):
            torch.testing.assert_close(found[rank][kind], split_gradient(kind, slice(None), [4], 1))
    hidden, weight, labels, starts = pack([5, 4])
    loss = ours.NextTokenLoss("square")
    loss(hidden, weight, loss.plan(labels, starts)).backward()
    for rank in range(2):
        grad, moved = found[rank]["one rank"]
        torch.testing.assert_close(grad, weight.grad)
        assert moved == bool(rank)
    numbers = [
        [torch.cat([randn(2, seed=i + 10 * r), randn(2, seed=i + 5)]).mean() for r in range(2)] for i in range(3)
    ]
    means = [torch.stack([x for pair in numbers[: i + 1] for x in pair]).mean().item() for i in range(3)]
    assert found[0]["shift"] == found[1]["shift"] == pytest.approx(means)
    assert found[0]["window"] == found[1]["window"] == 5.0


def test_shared_without_ranks():
    assert shared([1, torch.tensor(2.5)]) == 3.5 and shared([]) == 0
