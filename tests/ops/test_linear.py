"""The linear layer against torch's, and the engine under it on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels.ops import linear
from ivl_kernels.testing import assert_accurate, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(rows, inputs, outputs, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def check(x, weight, bias, grad, backend=""):
    """Forward and gradients by the accuracy rule."""

    def run(function, *leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    with poisoned():
        got = run(lambda *a: linear(*a, backend=backend), x, weight, bias)
    eager = run(F.linear, x, weight, bias)
    truth = run(F.linear, x.double(), weight.double(), bias.double())
    for name, *values in zip(("out", "x", "weight", "bias"), got, truth, eager):
        # Plain torch may be exact by luck in a handful of numbers.
        assert_accurate(*values, what=name, factor=2.0 if values[0].numel() > 16 else 8.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (3, 96, 130), (6, 32, 16), (13, 70, 33), (64, 128, 65), (65, 128, 64), (150, 1100, 72)]
)
def test_every_instruction_set(isa, shape, dtype):
    check(*operands(*shape, dtype), backend="cpu")


@given(
    rows=st.integers(1, 90), inputs=st.integers(1, 300), outputs=st.integers(1, 150), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_odd_shapes(rows, inputs, outputs, dtype, seed):
    check(*operands(rows, inputs, outputs, dtype, seed), backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["transposed x", "transposed weight", "steps", "expanded"])
def test_any_strides(layout, dtype):
    x, weight, bias, grad = operands(70, 64, 40, dtype)
    if layout == "transposed x":
        x = x.t().contiguous().t()
    elif layout == "transposed weight":
        weight = weight.t().contiguous().t()
    elif layout == "steps":
        x, weight, bias = (
            torch.stack([v, v], -1).flatten(-2)[..., ::2] for v in (x, weight, bias)
        )  # every second element
    else:
        x, weight = x[:1].expand(70, 64), weight[:1].expand(40, 64)
    check(x, weight, bias, grad, backend="cpu")


@pytest.mark.parametrize("shape", [(0, 8, 5), (4, 0, 5), (4, 8, 0)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty(shape, backend):
    x, weight, bias, _ = operands(*shape, torch.float32)
    with poisoned():
        assert torch.equal(linear(x, weight, bias, backend=backend), F.linear(x, weight, bias))
        out = linear(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), backend=backend)
        out.sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, shape[0]))
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


def test_leading_dimensions_and_no_bias():
    x, weight, *_ = operands(12, 32, 20, torch.float32)
    assert torch.equal(linear(x.view(3, 4, 32), weight), linear(x, weight).view(3, 4, 20))
    assert linear(x[0], weight).shape == (20,)


@pytest.mark.parametrize("rows", [3, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_matter(rows, dtype):
    x, weight, bias, _ = operands(rows, 200, 330, dtype)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(linear(x, weight, bias))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results)


def test_long_sums_keep_their_digits(isa):
    x, weight, *_ = operands(70, 12800, 64, torch.float32)
    exact = x.double() @ weight.double().t()
    assert (linear(x, weight, backend="cpu") - exact).norm() <= 1.3 * (F.linear(x, weight) - exact).norm()


def test_only_what_is_needed():
    x, weight, bias, grad = operands(9, 16, 8, torch.float32)
    out = linear(x.requires_grad_(), weight, bias)
    (found,) = torch.autograd.grad(out, [x], grad)
    assert_accurate(found, grad.double() @ weight.double(), grad @ weight)


def gradient_after_a_write(function, values, leaf, written):
    """Of `leaf`, where another operand is written to between forward and backward; None where that is refused."""
    values = {name: v.clone().requires_grad_(name == leaf) for name, v in values.items()}
    out = function(values)
    with torch.no_grad():
        values[written].mul_(2)
    try:
        return torch.autograd.grad(out.sum(), values[leaf])[0]
    except RuntimeError:
        return None


@pytest.mark.parametrize("written", ["x", "weight", "bias"])
@pytest.mark.parametrize("leaf", ["x", "weight", "bias"])
def test_what_is_not_needed_may_be_written_to(leaf, written):
    values = dict(zip(("x", "weight", "bias"), operands(9, 16, 8, torch.float32)))
    plain = gradient_after_a_write(lambda v: F.linear(v["x"], v["weight"], v["bias"]), values, leaf, written)
    got = gradient_after_a_write(lambda v: linear(v["x"], v["weight"], v["bias"]), values, leaf, written)
    assert (got is None) == (plain is None)
    assert got is None or torch.allclose(got, plain, rtol=1e-4, atol=1e-5)


def test_rows_are_kept_for_the_weight_alone():
    x, weight, bias, _ = operands(9, 16, 8, torch.float32)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        linear(x.requires_grad_(), weight, bias)
        assert seen == [weight.shape]
        linear(x, weight.requires_grad_(), bias)
    assert x.shape in seen


def test_gradcheck():
    x, weight, bias, _ = (v.requires_grad_() for v in operands(5, 6, 4, torch.float64))
    torch.autograd.gradcheck(linear, (x, weight, bias))


def test_opcheck_and_compile():
    x, weight, bias, grad = operands(5, 6, 4, torch.float32)
    torch.library.opcheck(torch.ops.ivl.linear.default, (x, weight, bias, ""))
    torch.library.opcheck(torch.ops.ivl.linear_backward.default, (grad, x, weight, True, True, False, ""))
    out = torch.compile(linear, fullgraph=True, backend="aot_eager")(x, weight, bias)
    assert torch.equal(out, linear(x, weight, bias))


def test_autocast():
    x, weight, bias, _ = operands(5, 32, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight, bias)
    assert torch.equal(out, linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"x": torch.ones(2, 3, dtype=torch.int64)},
            TypeError,
            r"x: got int64 .* expected dtype float32",
        ),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: got float32 \[\] on cpu, expected shape \[..., K\]"),
        ({"weight": torch.ones(4, 5)}, ValueError, r"weight: got float32 \[4, 5\] on cpu, expected shape \[N, 3\]"),
        ({"weight": torch.ones(4, 3).half()}, TypeError, r"weight: got float16 .* expected the dtype of x"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: got float32 \[5\] on cpu, expected shape \[4\]"),
        ({"bias": 1}, TypeError, r"bias: got int, expected a torch.Tensor"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4)} | change
    with pytest.raises(error, match=message):
        linear(**arguments)
