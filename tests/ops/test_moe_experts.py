"""Experts against transformers' loop over experts, in both checkpoint layouts."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels.ops import moe_experts, moe_experts_list
from ivl_kernels.testing import assert_accurate, poisoned
from ivl_kernels.testing.cases.moe_experts import limited
from tests.simulator.gpu import backends

BACKENDS = backends("cpu", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: str
    layout: str

    @property
    def tensors(self):
        return (self.hidden, self.weights, self.gate_up, self.down, self.gate_up_bias, self.down_bias)

    def to(self, dtype):
        hidden, weights, *rest = (t if t is None else t.detach().to(dtype) for t in self.tensors)
        return Case(hidden, self.ids, weights, *rest, self.activation, self.layout)

    def leaves(self):
        hidden, weights, *rest = (t if t is None else t.detach().clone().requires_grad_() for t in self.tensors)
        return Case(hidden, self.ids, weights, *rest, self.activation, self.layout)

    def run(self, backend=""):
        return moe_experts(
            self.hidden, self.ids, self.weights, self.gate_up, self.down, gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias, activation=self.activation, layout=self.layout, backend=backend,
        )  # fmt: skip


def make(
    tokens=11, width=24, inner=16, experts=5, top_k=2, gpt_oss=False, bias=None, dtype=torch.float32, skew="even",
    outside=0.0, seed=0,
):  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g).to(dtype)

    if skew == "one":
        ids = torch.full((tokens, top_k), experts // 2)
    else:
        power = 4.0 if skew == "zipf" else 0.0
        scores = torch.rand(tokens, experts, generator=g) - power * torch.arange(experts) / experts
        ids = scores.topk(min(top_k, experts), dim=1).indices
    ids = torch.where(torch.rand(ids.shape, generator=g) < outside, experts, ids)
    scale_up, scale_down = width**-0.5, inner**-0.5
    if gpt_oss:
        # Reaches the clamps; not in 16 bits, where rounding decides on which side of a clamp a value is.
        gate_up = normal(experts, width, 2 * inner) * scale_up * (4 if dtype.itemsize > 2 else 1)
        down = normal(experts, inner, width) * scale_down
    else:
        gate_up = normal(experts, 2 * inner, width) * scale_up
        down = normal(experts, width, inner) * scale_down
    with_bias = gpt_oss if bias is None else bias
    return Case(
        normal(tokens, width), ids, torch.rand(ids.shape, generator=g).to(dtype), gate_up, down,
        normal(experts, 2 * inner) if with_bias else None, normal(experts, width) if with_bias else None,
        "gpt_oss" if gpt_oss else "silu", "interleaved" if gpt_oss else "concatenated",
    )  # fmt: skip


def eager(case):
    """The loops of Qwen3MoeExperts and GptOssExperts."""
    out = torch.zeros_like(case.hidden)
    for e in case.ids.unique().tolist():
        if not 0 <= e < len(case.gate_up):
            continue
        token, slot = torch.where(case.ids == e)
        gate_up, down = case.gate_up[e], case.down[e]
        if case.layout == "concatenated":
            gate_up, down = gate_up.T, down.T
        value = case.hidden[token] @ gate_up
        if case.gate_up_bias is not None:
            value = value + case.gate_up_bias[e]
        if case.layout == "concatenated":
            gate, up = value.chunk(2, dim=-1)
        else:
            gate, up = value[:, ::2], value[:, 1::2]
        if case.activation == "silu":
            value = torch.nn.functional.silu(gate) * up
        else:
            gate, up = limited(gate, -math.inf, 7.0), limited(up, -7.0, 7.0)
            value = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
        value = value @ down
        if case.down_bias is not None:
            value = value + case.down_bias[e]
        out = out.index_add(0, token, (value * case.weights[token, slot, None]).to(out.dtype))
    return out


@BACKENDS
@pytest.mark.parametrize("gpt_oss", [False, True])
@given(
    tokens=st.integers(0, 70), width=st.integers(1, 90), inner=st.integers(1, 70), experts=st.integers(1, 9),
    top_k=st.integers(1, 4), bias=st.booleans(), dtype=st.sampled_from(DTYPES),
    skew=st.sampled_from(["even", "one", "zipf"]), outside=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_accurate(backend, gpt_oss, tokens, width, inner, experts, top_k, bias, dtype, skew, outside, seed):
    case = make(tokens, width, inner, experts, top_k, gpt_oss, bias, dtype, skew, outside, seed)
    with poisoned():
        got = case.run(backend)
    assert_accurate(got, case.to(torch.float64).run("reference"), eager(case))


def gradients(case, run, grad):
    """Gradients of every differentiable tensor of the case, by name."""
    case = case.leaves()
    names = ("hidden", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
    leaves = {name: t for name, t in zip(names, case.tensors) if t is not None}
    return dict(zip(leaves, torch.autograd.grad(run(case), list(leaves.values()), grad, materialize_grads=True)))


@BACKENDS
@pytest.mark.parametrize("gpt_oss", [False, True])
@given(
    tokens=st.sampled_from([0, 4, 9, 40]), width=st.integers(5, 50), inner=st.integers(5, 40),
    experts=st.integers(1, 6), top_k=st.integers(1, 3), bias=st.booleans(), dtype=st.sampled_from(DTYPES),
    skew=st.sampled_from(["even", "one", "zipf"]), outside=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15)
def test_gradients(backend, gpt_oss, tokens, width, inner, experts, top_k, bias, dtype, skew, outside, seed):
    case = make(tokens, width, inner, experts, top_k, gpt_oss, bias, dtype, skew, outside, seed)
    grad = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with poisoned():
        got = gradients(case, lambda c: c.run(backend), grad)
    truth = gradients(case.to(torch.float64), lambda c: c.run("reference"), grad.double())
    plain = gradients(case, lambda c: eager(c) + 0 * c.hidden, grad)
    for name, value in got.items():  # of few numbers, luck decides which is nearer
        assert_accurate(value, truth[name], plain[name], name, 2 if value.numel() > 100 else 4)


# Every form of the products: dot, stream and packed, with whole and broken panels, one and several chunks of rows; the
# last takes several turns.
SHAPES = [
    dict(tokens=1, width=192, inner=96, experts=9, top_k=4),
    dict(tokens=7, width=64, inner=64, skew="zipf", outside=0.2),
    dict(tokens=50, width=96, inner=160, experts=3),
    dict(tokens=26, width=48, inner=40, experts=4),
    dict(tokens=33, width=65, inner=33, experts=3, top_k=3, skew="zipf"),
    dict(tokens=90, width=64, inner=64, experts=2, top_k=2),
    dict(tokens=700, width=64, inner=96, experts=2, top_k=1, skew="one"),
    dict(tokens=1100, width=40, inner=32, experts=8, top_k=4),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpt_oss", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['tokens']}-{shape['width']}")
def test_every_instruction_set(isa, shape, gpt_oss, dtype):
    case = make(**shape, gpt_oss=gpt_oss, bias=True, dtype=dtype)
    wide = case.to(torch.float64)
    grad = torch.randn(case.hidden.shape).to(dtype)
    with poisoned():
        got, slopes = case.run("cpu"), gradients(case, lambda c: c.run("cpu"), grad)
    assert_accurate(got, wide.run("reference"), eager(case))
    truth = gradients(wide, lambda c: c.run("reference"), grad.double())
    plain = gradients(case, eager, grad)
    for name, value in slopes.items():
        assert_accurate(value, truth[name], plain[name], name, 2 if value.numel() > 100 else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gpt_oss", [False, True])
@pytest.mark.parametrize("tokens", [3, 20, 300])
@pytest.mark.parametrize("width, inner", [(2880, 32), (32, 2880)])
def test_long_sums(isa, width, inner, tokens, gpt_oss, dtype):
    """Sums over many columns or rows are no chains of as many additions: about as near as the BLAS."""
    case = make(tokens, width, inner, 1, 1, gpt_oss, dtype=dtype, skew="one")
    wide, grad = case.to(torch.float64), torch.randn(case.hidden.shape).to(dtype)
    assert_accurate(case.run("cpu"), wide.run("reference"), eager(case), factor=1.3)
    got = gradients(case, lambda c: c.run("cpu"), grad)
    truth = gradients(wide, lambda c: c.run("reference"), grad.double())
    plain = gradients(case, eager, grad)
    for name, value in got.items():
        assert_accurate(value, truth[name], plain[name], name, 1.3 if value.numel() > 100 else 2)


def test_thread_count_does_not_change_the_result():
    case = make(tokens=900, width=96, inner=160, gpt_oss=True)
    grad = torch.randn(case.hidden.shape)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([case.run("cpu"), *gradients(case, lambda c: c.run("cpu"), grad).values()])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@backends("cpu", "reference")
@pytest.mark.parametrize("dtype", DTYPES)
def test_list_of_experts(backend, dtype):
    """One tensor a matrix: the values and gradients of stacked weights, bit for bit."""
    case = make(26, 48, 40, 4, dtype=dtype)
    gate, up = case.gate_up.chunk(2, dim=1)
    leaves = [t.clone().requires_grad_() for part in (gate, up, case.down) for t in part]
    hidden, weights = case.hidden.clone().requires_grad_(), case.weights.clone().requires_grad_()
    got = moe_experts_list(hidden, case.ids, weights, leaves[:4], leaves[4:8], leaves[8:], backend=backend)
    with torch.no_grad():
        assert torch.equal(got, case.run(backend))
        plain = moe_experts_list(hidden, case.ids, weights, leaves[:4], leaves[4:8], leaves[8:], backend=backend)
        assert torch.equal(plain, got)
    grad = torch.randn(case.hidden.shape).to(dtype)
    expected = gradients(case, lambda c: c.run(backend), grad)
    slopes = torch.autograd.grad(got, [hidden, weights, *leaves], grad)
    assert torch.equal(slopes[0], expected["hidden"]) and torch.equal(slopes[1], expected["weights"])
    assert torch.equal(torch.cat([torch.stack(slopes[2:6]), torch.stack(slopes[6:10])], 1), expected["gate_up"])
    assert torch.equal(torch.stack(slopes[10:]), expected["down"])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gpt_oss", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 700])
def test_sum_over_experts_is_rounded_once(backend, tokens, gpt_oss, dtype):
    """One large term and fifteen that a 16-bit sum would swallow one by one; 700 tokens take several turns."""
    if tokens > 3 and backend not in ("cpu", "reference"):
        tokens = 5
    experts, width, inner = 16, 8, 8
    case = make(tokens, width, inner, experts, experts, gpt_oss, bias=True, dtype=dtype)
    big = 256.0 if dtype == torch.bfloat16 else 2048.0
    case.ids = torch.arange(experts).expand(tokens, experts).contiguous()
    case.weights = torch.full((tokens, experts), 0.75).to(dtype)
    case.weights[:, 0] = big
    case.down = torch.zeros_like(case.down)
    case.down_bias = torch.ones_like(case.down_bias)
    exact = torch.full((tokens, width), big + 0.75 * (experts - 1))
    assert torch.equal(case.run(backend), exact.to(dtype))
    # Backward: every expert hands the same change to the token, times its weight.
    case.gate_up = case.gate_up[:1].expand(case.gate_up.shape).contiguous()
    case.gate_up_bias = case.gate_up_bias[:1].expand(case.gate_up_bias.shape).contiguous()
    case.down = make(1, width, inner, 1, 1, gpt_oss, bias=True, dtype=dtype).down.expand(case.down.shape).contiguous()
    grad = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = gradients(case, lambda c: c.run(backend), grad)["hidden"].double()
    truth = gradients(case.to(torch.float64), lambda c: c.run("reference"), grad.double())["hidden"]
    assert (got - truth).norm() <= 0.01 * truth.norm()


@backends("cpu", "reference")
@pytest.mark.parametrize("frozen", [False, True])
def test_list_without_tokens_for_some(backend, frozen):
    """An expert that no token chose has no gradient, as in a loop over those that were chosen."""
    case = make(6, 24, 16, 5)
    case.ids = torch.where(case.ids == 3, 1, case.ids)
    case.ids[0] = torch.tensor([0, 5])  # outside
    gate, up = case.gate_up.chunk(2, dim=1)
    lists = [[t.clone().requires_grad_() for t in part] for part in (gate, up, case.down)]
    if frozen:
        lists[0][1].requires_grad_(False)
    moe_experts_list(case.hidden, case.ids, case.weights, *lists, backend=backend).sum().backward()
    chosen = set(case.ids.unique().tolist())
    assert 3 not in chosen
    for part in lists:
        assert [t.grad is not None for t in part] == [e in chosen and t.requires_grad for e, t in enumerate(part)]


@pytest.mark.parametrize("gpt_oss", [False, True])
def test_gradcheck(gpt_oss):
    case = make(5, 6, 4, 3, 2, gpt_oss, True, torch.float64, outside=0.2).leaves()

    def run(*tensors):
        hidden, weights, *rest = tensors
        return Case(hidden, case.ids, weights, *rest, case.activation, case.layout).run("reference")

    assert run(*case.tensors).grad_fn is not None
    assert torch.autograd.gradcheck(run, case.tensors)


@BACKENDS
@pytest.mark.parametrize("inner", [15, 24, 33, 48])
@pytest.mark.parametrize("gpt_oss", [False, True])
def test_whole_vectors_of_one_width_only(backend, gpt_oss, inner):
    """bfloat16 pairs need an even depth in both products."""
    case = make(37, 64, inner, 3, 2, gpt_oss, False, torch.bfloat16)
    grad = torch.randn_like(case.hidden)
    with poisoned():
        got = gradients(case, lambda c: c.run(backend), grad)
    truth = gradients(case.to(torch.float64), lambda c: c.run("reference"), grad.double())
    usual = gradients(case, lambda c: eager(c) + 0 * c.hidden, grad)
    assert_accurate(case.run(backend), case.to(torch.float64).run("reference"), eager(case))
    for name, value in got.items():
        assert_accurate(value, truth[name], usual[name], name, 2 if value.numel() > 100 else 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpt_oss", [False, True])
def test_scratch_of_an_earlier_call_does_not_matter(gpt_oss, dtype):
    """Which is full of NaN and had a row more; now every expert has an odd number of rows."""
    case = make(7, 64, 64, 3, 3, gpt_oss, gpt_oss, dtype)

    def run(case):
        return gradients(case, lambda c: c.run("cpu"), torch.ones_like(case.hidden))

    expected = run(case)
    broken = make(8, 64, 64, 3, 3, gpt_oss, gpt_oss, dtype)
    for tensor in broken.tensors:
        if tensor is not None:
            tensor.fill_(torch.nan)
    assert run(broken)["gate_up"].isnan().all()
    for name, value in run(case).items():
        assert torch.equal(value, expected[name]), name


@backends("cpu", "triton", "reference")
def test_gradient_at_the_limit_of_the_activation(backend):
    """Clamping passes on the gradient of a value that is the limit."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    gate_up = torch.tensor([[[7.0, 7.0, 7.5, -7.0], [7.0, -7.5, 6.0, 7.5]]])  # gate, up, gate, up
    down = torch.tensor([[[1.0, -0.5], [0.25, 2.0]]])
    ids, grad = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.5, 1.0]])

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, gate_up, down)]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    def plain(hidden, gate_up, down):
        pre = hidden @ gate_up[0]
        gate, up = limited(pre[:, ::2], -math.inf, 7.0), limited(pre[:, 1::2], -7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ down[0]

    def ours(hidden, gate_up, down):
        options = dict(activation="gpt_oss", layout="interleaved", backend=backend)
        return moe_experts(hidden, ids, torch.ones(3, 1), gate_up, down, **options)

    with poisoned():
        got = run(ours, torch.float32)
    for g, e in zip(got, run(plain, torch.float64)):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-4)


@BACKENDS
@pytest.mark.parametrize("which", range(6))
def test_only_needed_gradients(backend, which):
    case = make(bias=True, gpt_oss=True)
    every = list(gradients(case, lambda c: c.run(backend), torch.ones_like(case.hidden)).values())
    leaf = case.tensors[which].requires_grad_()
    (got,) = torch.autograd.grad(case.run(backend), leaf, torch.ones_like(case.hidden))
    assert torch.equal(got, every[which])


@BACKENDS
def test_every_slot_outside_gives_zero(backend):
    case = make(gpt_oss=True)
    case.ids.fill_(5)
    assert torch.equal(case.run(backend), torch.zeros_like(case.hidden))


@BACKENDS
@pytest.mark.parametrize("gpt_oss", [False, True])
def test_strided_inputs(backend, gpt_oss):
    case = make(gpt_oss=gpt_oss)
    expected = case.run(backend)

    def spread(t):
        return torch.zeros(*t.shape[:-1], t.shape[-1] * 2, dtype=t.dtype)[..., ::2].copy_(t)

    case.ids, case.hidden, case.weights = spread(case.ids), spread(case.hidden), spread(case.weights)
    if gpt_oss:
        case.gate_up_bias, case.down_bias = spread(case.gate_up_bias), spread(case.down_bias)
    torch.testing.assert_close(case.run(backend), expected)


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_matrices_that_would_be_copied_at_every_call(name):
    case = make()
    setattr(case, name, getattr(case, name).mT.contiguous().mT)
    with pytest.raises(ValueError, match=rf"{name}: got .* with strides \[\d+, 1, \d+\], expected contiguous memory"):
        case.run()
    gate, up, down = ([m.contiguous() for m in t] for t in (*make().gate_up.chunk(2, 1), make().down))
    (gate if name == "gate_up" else down)[2] = (gate if name == "gate_up" else down)[2].mT.contiguous().mT
    listed = "gate" if name == "gate_up" else "down"
    with pytest.raises(ValueError, match=rf"{listed}\[2\]: got .*, expected contiguous memory"):
        moe_experts_list(case.hidden, case.ids, case.weights, gate, up, down)


@BACKENDS
@pytest.mark.parametrize("gpt_oss", [False, True])
def test_opcheck(backend, gpt_oss):
    case = make(gpt_oss=gpt_oss)
    dispatch = torch.ops.ivl.moe_dispatch(case.ids, 5, 16, "reference")
    tensors = (case.hidden, case.weights, dispatch[0], dispatch[1], *dispatch[3:], *case.tensors[2:], None, None)
    options = (case.activation, 1.702, 7.0, case.layout)
    torch.library.opcheck(torch.ops.ivl.moe_experts.default, (*tensors, *options, False, backend))
    torch.library.opcheck(torch.ops.ivl.moe_experts.default, (*tensors, *options, True, backend))
    _, pre = torch.ops.ivl.moe_experts(*tensors, *options, True, "reference")
    needs = [True, False, True, True, gpt_oss, False]
    args = (case.hidden, *tensors, *options, True, pre, needs, backend)
    torch.library.opcheck(torch.ops.ivl.moe_experts_backward.default, args)


@backends("cpu", "reference")
def test_opcheck_list(backend):
    case = make()
    permutation, inverse, _, offsets, _ = torch.ops.ivl.moe_dispatch(case.ids, 5, 0, "reference")
    lists = [[t.clone() for t in part] for part in (*case.gate_up.chunk(2, dim=1), case.down)]
    tensors = (case.hidden, case.weights, permutation, inverse, offsets, *lists)
    torch.library.opcheck(torch.ops.ivl.moe_experts_list.default, (*tensors, True, backend))
    _, pre = torch.ops.ivl.moe_experts_list(*tensors, True, "reference")
    needs = [True, True, False, True]
    torch.library.opcheck(
        torch.ops.ivl.moe_experts_list_backward.default, (case.hidden, *tensors, True, pre, needs, backend)
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(gate=[]), ValueError, "gate, up, down: got 0, 5 and 5 matrices"),
        (
            dict(up=[torch.zeros(16, 24)] * 4 + [torch.zeros(16, 23)]),
            ValueError,
            r"up\[4\]: .*expected shape \[16, 24\]",
        ),
        (dict(down=[torch.zeros(24, 16).bfloat16()] * 5), TypeError, r"down\[0\]: .*expected the dtype of hidden"),
    ],
)
def test_wrong_list(change, error, message):
    case = make()
    gate, up = (list(part) for part in case.gate_up.chunk(2, dim=1))
    arguments = dict(gate=gate, up=up, down=list(case.down)) | change
    with pytest.raises(error, match=message):
        moe_experts_list(case.hidden, case.ids, case.weights, **arguments)


@BACKENDS
def test_compiles(backend):
    case = make(gpt_oss=True).leaves()
    compiled = torch.compile(lambda c: c.run(backend), fullgraph=True, backend="aot_eager")
    got, expected = compiled(case), case.run(backend)
    assert torch.equal(got, expected)
    leaves = case.tensors
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(hidden=torch.zeros(11, 3, 24)), ValueError, r"hidden: .*expected shape \[S, H\]"),
        (dict(hidden=torch.zeros(11, 24, dtype=torch.int64)), TypeError, "hidden: .*expected dtype"),
        (dict(hidden=torch.zeros(11, 24).double()), TypeError, "gate_up: .*expected the dtype of hidden"),
        (dict(down=torch.zeros(5, 16, 24).bfloat16()), TypeError, "down: .*expected the dtype of hidden"),
        (dict(ids=torch.zeros(10, 2, dtype=torch.int64)), ValueError, r"ids: .*expected shape \[11, k\]"),
        (dict(ids=torch.zeros(11, 2)), TypeError, "ids: .*expected dtype int64, int32"),
        (dict(weights=torch.zeros(11, 3)), ValueError, r"weights: .*expected shape \[11, 2\]"),
        (dict(gate_up=torch.zeros(5, 32, 24)), ValueError, r"gate_up: .*expected shape \[E, 24, 2I\]"),
        (dict(gate_up=torch.zeros(5, 24, 31)), ValueError, "gate_up: .*even"),
        (dict(down=torch.zeros(5, 24, 16)), ValueError, r"down: .*expected shape \[5, 16, 24\]"),
        (dict(gate_up_bias=torch.zeros(5, 16)), ValueError, r"gate_up_bias: .*expected shape \[5, 32\]"),
        (dict(down_bias=torch.zeros(4, 24)), ValueError, r"down_bias: .*expected shape \[5, 24\]"),
        (dict(activation="gelu"), ValueError, "activation: got 'gelu'"),
        (dict(layout="packed"), ValueError, "layout: got 'packed'"),
    ],
)
def test_wrong_input(changes, error, message):
    arguments = vars(make(gpt_oss=True)) | changes
    with pytest.raises(error, match=message):
        moe_experts(**arguments)
