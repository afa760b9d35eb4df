"""Expert choice and the sort by expert, against transformers' routers and plain sorting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels.ops import moe_dispatch, moe_routing
from ivl_kernels.testing import assert_accurate, poisoned
from tests.simulator.gpu import backends

BACKENDS = backends("cpu", "cuda", "triton", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONVENTIONS = [("softmax_then_topk", False), ("softmax_then_topk", True), ("topk_then_softmax", False)]


def distinct_logits(tokens, experts, dtype=torch.float32, seed=0):
    """Rows without equal values, so that every top-k agrees."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, experts, generator=generator).argsort(1)
    return ((order - experts / 2) / 16).to(dtype)


def transformers_router(logits, top_k, scoring, renormalize):
    """The lines of Qwen3MoeTopKRouter and GptOssTopKRouter after their linear layer."""
    if scoring == "topk_then_softmax":
        values, ids = torch.topk(logits, top_k, dim=-1)
        return ids, torch.softmax(values, dim=1, dtype=values.dtype)
    values, ids = torch.topk(torch.softmax(logits, dtype=torch.float, dim=-1), top_k, dim=-1)
    if renormalize:
        values = values / values.sum(dim=-1, keepdim=True)
    return ids, values.to(logits.dtype)


@BACKENDS
@pytest.mark.parametrize("convention", CONVENTIONS)
@given(
    tokens=st.integers(0, 40), experts=st.integers(1, 140), share=st.floats(0, 1), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=10)
def test_equals_transformers(backend, convention, tokens, experts, share, dtype, seed):
    top_k = 1 + int(share * (min(experts, 12) - 1))
    logits = distinct_logits(tokens, experts, dtype, seed)
    with poisoned():
        ids, weights = moe_routing(logits, top_k, scoring=convention[0], renormalize=convention[1], backend=backend)
    expected_ids, expected = transformers_router(logits, top_k, *convention)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    _, truth = moe_routing(
        logits.double(), top_k, scoring=convention[0], renormalize=convention[1], backend="reference"
    )
    assert_accurate(weights, truth, expected)


@backends("cpu", "reference")
def test_nan_is_the_largest(backend):
    logits = torch.randn(3, 40)
    logits[0, 7], logits[1, 39], logits[2, 0] = torch.nan, -torch.nan, torch.inf
    ids, _ = moe_routing(logits, 3, scoring="topk_then_softmax", backend=backend)
    assert torch.equal(ids[:, 0], torch.tensor([7, 39, 0]))
    assert torch.equal(ids, logits.topk(3).indices)


@BACKENDS
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_equal_scores_take_the_lower_expert(backend, convention):
    logits = torch.zeros(5, 70)
    logits[1, 40:] = 1
    logits[2, ::3] = 2
    logits[3, 69] = 1
    ids, _ = moe_routing(logits, 4, scoring=convention[0], renormalize=convention[1], backend=backend)
    expected = [[0, 1, 2, 3], [40, 41, 42, 43], [0, 3, 6, 9], [69, 0, 1, 2], [0, 1, 2, 3]]
    assert ids.tolist() == expected
    zeros = torch.tensor([[-0.0, 0.0] * 35, [0.0, -0.0] * 35])  # which are equal, as in torch
    ids, _ = moe_routing(zeros, 4, scoring=convention[0], renormalize=convention[1], backend=backend)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_is_added_first(backend, dtype):
    logits, bias = distinct_logits(9, 32, dtype), torch.linspace(-3, 3, 32).to(dtype)
    for scoring, renormalize in CONVENTIONS:
        options = dict(scoring=scoring, renormalize=renormalize, backend=backend)
        apart = torch.zeros(32, 2, dtype=bias.dtype)[:, 0].copy_(bias)  # not contiguous
        got, expected = moe_routing(logits, 4, bias=apart, **options), moe_routing(logits + bias, 4, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


@BACKENDS
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_far_scores_at_odd_addresses(backend, convention):
    """With a bias, far from zero and elsewhere for each token; not aligned to 16 bytes, or not contiguous."""
    scores = distinct_logits(9, 44) + 300 * (torch.arange(9) % 3 - 1)[:, None]
    bias, grad = torch.zeros(44, 2)[:, 0].copy_((torch.arange(44) - 22) / 1024), torch.randn(9, 5)
    options = dict(scoring=convention[0], renormalize=convention[1])

    def run(dtype, backend, scores=scores, grad=grad):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (scores, bias)]
        weights = moe_routing(leaves[0], 5, bias=leaves[1], **options, backend=backend)[1]
        return weights.detach(), *torch.autograd.grad(weights, leaves, grad.to(dtype))

    truth, plain = run(torch.float64, "reference"), run(torch.float32, "reference")
    odd, apart = torch.zeros(1 + 9 * 44)[1:].view(9, 44), torch.zeros(44, 9).t()
    for x, g in ((odd, grad), (apart, grad.t().contiguous().t())):
        for got, true, same in zip(run(torch.float32, backend, x.copy_(scores), g), truth, plain):
            assert_accurate(got, true, same)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradcheck(convention):
    logits = distinct_logits(6, 10, torch.float64).requires_grad_()
    bias = (0.001 * torch.randn(10, dtype=torch.float64)).requires_grad_()

    def run(logits, bias):
        return moe_routing(logits, 3, scoring=convention[0], renormalize=convention[1], bias=bias, backend="reference")[
            1
        ]

    assert run(logits, bias).grad_fn is not None
    assert torch.autograd.gradcheck(run, (logits, bias))


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradient(backend, dtype, convention):
    logits, grad = distinct_logits(21, 33, dtype), torch.randn(21, 5).to(dtype)

    def gradient(logits, grad, function):
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, grad)[0]

    options = dict(scoring=convention[0], renormalize=convention[1])
    got = gradient(logits, grad, lambda x: moe_routing(x, 5, **options, backend=backend)[1])
    truth = gradient(logits.double(), grad.double(), lambda x: moe_routing(x, 5, **options, backend="reference")[1])
    plain = gradient(logits, grad, lambda x: transformers_router(x, 5, *convention)[1])
    assert_accurate(got, truth, plain)


@BACKENDS
@given(
    tokens=st.integers(0, 50), top_k=st.integers(1, 8), experts=st.integers(1, 130), tile=st.sampled_from([0, 1, 16]),
    skew=st.sampled_from(["even", "one", "zipf"]), outside=st.booleans(), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)  # fmt: skip
@settings(max_examples=15)
def test_dispatch(backend, tokens, top_k, experts, tile, skew, outside, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(tokens, top_k, generator=generator)
    share = {"even": draw, "one": draw * 0 + 0.5, "zipf": draw**6}[skew]
    ids = (share * experts).long().clamp(max=experts - 1)
    if outside:
        ids = torch.where(torch.rand(tokens, top_k, generator=generator) < 0.3, experts, ids)
        ids.view(-1)[:1] = -1
    with poisoned():
        got = moe_dispatch(ids.to(dtype), experts, tile=tile, backend=backend)
    flat = ids.reshape(-1)
    flat = torch.where(flat < 0, experts, flat)
    permutation = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    assert torch.equal(got.permutation, permutation.int())
    assert torch.equal(got.inverse[permutation], torch.arange(len(flat)).int())
    assert torch.equal(got.counts, counts.int())
    assert torch.equal(got.offsets, torch.cat([torch.zeros(1), counts.cumsum(0)]).int())
    expected = [
        (e, int(got.offsets[e]) + row) for e in range(experts) for row in range(0, int(counts[e]), tile or 10**9)
    ]
    if tile:
        assert got.tiles.shape == (len(flat) // tile + experts, 2)
        assert [tuple(t) for t in got.tiles.tolist() if t[0] < experts] == expected
        assert (got.tiles[len(expected) :, 0] == experts).all()
    else:
        assert got.tiles.shape == (0, 2)


@BACKENDS
def test_dispatch_of_ids_at_odd_addresses(backend):
    ids = torch.randint(0, 7, (11, 4), dtype=torch.int32)
    for other in (torch.zeros(45, dtype=ids.dtype)[1:].view(11, 4), torch.zeros(11, 8, dtype=ids.dtype)[:, ::2]):
        got, expected = (moe_dispatch(x, 6, tile=2, backend=backend) for x in (other.copy_(ids), ids))
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


@BACKENDS
def test_opcheck(backend):
    logits, grad = distinct_logits(7, 20), torch.randn(7, 3)
    ids = logits.topk(3).indices
    torch.library.opcheck(torch.ops.ivl.moe_routing.default, (logits, None, 3, "softmax_then_topk", True, backend))
    torch.library.opcheck(
        torch.ops.ivl.moe_routing_backward.default, (grad, logits, None, ids, "softmax_then_topk", False, backend)
    )
    torch.library.opcheck(torch.ops.ivl.moe_dispatch.default, (ids, 20, 4, backend))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: moe_routing(x[0], 2), ValueError, "logits: got float32"),
        (lambda x: moe_routing(x.long(), 2), TypeError, "logits: .*expected dtype"),
        (lambda x: moe_routing(x, 0), ValueError, "top_k: got 0, expected 1 to the number of experts, 6"),
        (lambda x: moe_routing(x, 7), ValueError, "top_k: got 7"),
        (lambda x: moe_routing(x, 2, scoring="sigmoid"), ValueError, "scoring: got 'sigmoid'"),
        (lambda x: moe_routing(x, 2, scoring="topk_then_softmax", renormalize=True), ValueError, "renormalize"),
        (lambda x: moe_routing(x, 2, bias=x[0, :4]), ValueError, r"bias: .*expected shape \[6\]"),
        (lambda x: moe_routing(x, 2, bias=x[0].double()), TypeError, "bias: .*expected the dtype of logits"),
        (lambda x: moe_dispatch(x, 6), TypeError, "ids: .*expected dtype int64, int32"),
        (lambda x: moe_dispatch(x.long()[0], 6), ValueError, "ids: .*expected shape"),
        (lambda x: moe_dispatch(x.long(), 0), ValueError, "num_experts: got 0"),
        (lambda x: moe_dispatch(x.long(), 6, tile=-1), ValueError, "tile: got -1"),
    ],
)
def test_wrong_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 6))
