"""Experts spread over processes (gloo) against the result of one process."""

import pytest
import torch
import torch.distributed as dist

from ivl_kernels.nn import ExpertParallelExperts, QuantisedExperts
from ivl_kernels.ops import moe_experts
from ivl_kernels.ops.moe_experts import formats
from tests.ranks import group

# tokens of each rank (taken in turn), experts, dtype, GPT-OSS, where the tokens go
CASES = [
    ([9, 4, 13, 1], 8, torch.float32, False, "even"),
    ([5, 0, 7, 2], 7, torch.float32, True, "even"),
    ([6, 3, 0, 8], 8, torch.float32, False, "one"),
    ([6, 5, 2, 3], 8, torch.float32, False, "nowhere"),
    ([0, 0, 0, 0], 8, torch.float32, False, "even"),
    ([12, 7, 3, 9], 5, torch.float32, False, "local"),
    ([11, 6, 8, 3], 8, torch.bfloat16, True, "even"),
]
WIDTH, INNER, TOP_K = 16, 12, 3


def tokens_of(rank, ranks, sizes, experts, dtype, kind):
    g = torch.Generator().manual_seed(rank)
    size = sizes[rank % len(sizes)]
    ids = torch.rand(size, experts, generator=g).argsort(1)[:, :TOP_K]
    if kind == "one":
        ids = torch.full_like(ids, experts // 2)
    elif kind == "nowhere":
        ids = torch.where(ids < experts // 2, ids, experts)
    elif kind == "local":
        ids = torch.full_like(ids, ExpertParallelExperts.shares(experts, ranks)[rank])
    hidden, grad = torch.randn(2, size, WIDTH, generator=g).to(dtype)
    return hidden, ids, torch.rand(size, TOP_K, generator=g).to(dtype), grad


def weights_of(experts, dtype, gpt_oss):
    g = torch.Generator().manual_seed(99)
    up = (experts, WIDTH, 2 * INNER) if gpt_oss else (experts, 2 * INNER, WIDTH)
    down = (experts, INNER, WIDTH) if gpt_oss else (experts, WIDTH, INNER)
    shapes = [up, down, (experts, 2 * INNER), (experts, WIDTH)] if gpt_oss else [up, down]
    return [(torch.randn(shape, generator=g) / 4).to(dtype) for shape in shapes]


def compare(rank, ranks, group, sizes, experts, dtype, gpt_oss, kind):
    options = dict(activation="gpt_oss", layout="interleaved") if gpt_oss else {}
    full = weights_of(experts, dtype, gpt_oss)
    module = ExpertParallelExperts.from_full(*full, group=group, **options)
    everyone = [tokens_of(r, ranks, sizes, experts, dtype, kind) for r in range(ranks)]
    hidden, ids, weights, grad = everyone[rank]
    hidden.requires_grad_()
    weights.requires_grad_()
    out = module(hidden, ids, weights)
    out.backward(grad)

    joined = [torch.cat(part).detach() for part in zip(*everyone)]
    truth = [t.double().requires_grad_() for t in (joined[0], joined[2], *full)]
    biases = dict(gate_up_bias=truth[4], down_bias=truth[5]) if gpt_oss else {}
    expected = moe_experts(truth[0], joined[1], *truth[1:4], **biases, **options, backend="reference")
    expected.backward(joined[3].double())

    first = sum(len(t[0]) for t in everyone[:rank])
    mine = slice(first, first + len(hidden))
    share = slice(*module.bounds[rank : rank + 2])
    pairs = [(out, expected[mine]), (hidden.grad, truth[0].grad[mine]), (weights.grad, truth[1].grad[mine])]
    pairs += [(p.grad, t.grad[share]) for p, t in zip(module.parameters(), truth[2:])]
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=3e-2, rtol=3e-2)
    for got, wanted in pairs:
        torch.testing.assert_close(got.double(), wanted, **tolerance)


def compare_quantised(rank, kind, gpt_oss):
    """Two ranks with half of the stored experts each, against all experts in one place."""
    g = torch.Generator().manual_seed(5)
    full = QuantisedExperts(
        6, 32, 64, quantisation=kind, activation="gpt_oss" if gpt_oss else "silu", interleaved=gpt_oss, bias=gpt_oss,
        limit=2.0,
    )  # fmt: skip
    for name, rows, columns in (("gate_up_proj", 128, 32), ("down_proj", 32, 64)):
        for tensor, value in zip(
            full.tensors(name), formats.quantise(torch.randn(6, rows, columns, generator=g), kind)
        ):
            tensor.copy_(value)
    if gpt_oss:
        for bias in (full.gate_up_proj_bias, full.down_proj_bias):
            bias.data.copy_(torch.randn(bias.shape, generator=g))
    module = ExpertParallelExperts.from_quantised(full)
    local, whole = module.gate_up_proj, full.tensors("gate_up_proj")[0]
    share = whole[3 * rank : 3 * rank + 3]
    assert local.dtype == whole.dtype and torch.equal(local.view(torch.uint8), share.view(torch.uint8))
    tokens = 7 + 4 * rank
    mine = torch.Generator().manual_seed(rank)
    hidden = torch.randn(tokens, 32, generator=mine).requires_grad_()
    ids = torch.rand(tokens, 6, generator=mine).argsort(1)[:, :2]
    weights = torch.rand(tokens, 2, generator=mine).requires_grad_()
    out = module(hidden, ids, weights)
    out.sum().backward()
    again = [t.detach().clone().requires_grad_() for t in (hidden, weights)]
    expected = full(again[0], ids, again[1])
    expected.sum().backward()
    for got, wanted in ((out, expected), (hidden.grad, again[0].grad), (weights.grad, again[1].grad)):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert module.gate_up_proj.grad is None and (not gpt_oss or module.down_proj_bias.grad is not None)


def run_quantised(rank, path):
    with group(rank, 2, path):
        compare_quantised(rank, "mxfp4", True)
        compare_quantised(rank, "fp8", False)


def run(rank, path):
    with group(rank, 4, path):
        pair = dist.new_group([0, 1])
        for case in CASES:
            compare(rank, 4, None, *case)
            if rank < 2:
                compare(rank, 2, pair, *case)
        with pytest.raises(ValueError, match="gate_up_proj: got 8 experts, expected 2"):
            ExpertParallelExperts(*weights_of(8, torch.float32, False), num_experts=8)
        with pytest.raises(ValueError, match="num_experts: got 1, expected at least one for each of 4 ranks"):
            ExpertParallelExperts(*weights_of(1, torch.float32, False), num_experts=1)


def test_equals_one_process(tmp_path):
    """Four processes, and two of them as a group of their own."""
    torch.multiprocessing.spawn(run, (tmp_path / "store",), nprocs=4)


def test_experts_in_few_bits(tmp_path):
    torch.multiprocessing.spawn(run_quantised, (tmp_path / "store",), nprocs=2)
