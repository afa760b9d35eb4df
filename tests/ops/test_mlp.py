"""The MLPs against torch's layers, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels.ops import gated_mlp, mlp
from ivl_kernels.testing import assert_accurate, poisoned
from tests.ops.test_linear import DTYPES, gradient_after_a_write
from tests.simulator.gpu import backends, simulated_gpu

NAMES = {"gelu": ("x", "up", "down", "up_bias", "down_bias"), "gated": ("x", "gate", "up", "down")}


def operands(kind, rows, width, inner, outputs, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (rows, width),
        "gate": (inner, width),
        "up": (inner, width),
        "down": (outputs, inner),
        "up_bias": (inner,),
        "down_bias": (outputs,),
    }
    scales = {"gate": 2 * width**-0.5, "up": 2 * width**-0.5, "down": max(inner, 1) ** -0.5}
    return {n: (torch.randn(*shapes[n], generator=g) * scales.get(n, 1.0)).to(dtype) for n in NAMES[kind]}


def eager(v):
    if "gate" in v:
        return F.linear(F.silu(F.linear(v["x"], v["gate"])) * F.linear(v["x"], v["up"]), v["down"])
    return F.linear(F.gelu(F.linear(v["x"], v["up"], v.get("up_bias"))), v["down"], v.get("down_bias"))


def ours(v, backend=""):
    return (gated_mlp if "gate" in v else mlp)(**v, backend=backend)


def check(values, backend=""):
    """Forward and gradients by the accuracy rule."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(*values["x"].shape[:-1], len(values["down"]), generator=generator).to(values["x"].dtype)

    def run(function, values, **options):
        leaves = {n: v.detach().requires_grad_() for n, v in values.items()}
        out = function(leaves, **options)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))]

    with poisoned():
        got = run(ours, values, backend=backend)
        with torch.no_grad():
            unsaved = ours(values, backend)
    assert torch.equal(unsaved, got[0])
    true, plain = run(eager, {n: v.double() for n, v in values.items()}), run(eager, values)
    for name, *parts in zip(("out", *values), got, true, plain):
        assert_accurate(*parts, what=name, factor=2.0 if parts[0].numel() > 64 else 64.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("shape", [(1, 64, 128, 32), (13, 70, 33, 20), (65, 128, 200, 65), (150, 96, 1100, 72)])
def test_every_instruction_set(isa, shape, kind, dtype):
    check(operands(kind, *shape, dtype), "cpu")


@given(
    kind=st.sampled_from(list(NAMES)), rows=st.integers(1, 90), width=st.integers(1, 150), inner=st.integers(1, 300),
    outputs=st.integers(1, 150), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_odd_shapes(kind, rows, width, inner, outputs, dtype, seed):
    check(operands(kind, rows, width, inner, outputs, dtype, seed), "cpu")


@backends("triton", "reference")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NAMES)
def test_other_backends(backend, kind, dtype):
    check(operands(kind, 13, 70, 33, 20, dtype), backend)
    if kind == "gated":
        check(operands(kind, 2, 16, 1100, 8, dtype), backend)


@pytest.mark.parametrize("inner", [1024, 3072])
def test_gpu_moves_each_number_once(inner):
    values = operands("gated", 6, 16, inner, 8, torch.bfloat16)
    with simulated_gpu() as log:
        leaves = {n: v.requires_grad_() for n, v in values.items()}
        ours(leaves, "triton").sum().backward()
    forward, backward = log
    matrix = 6 * inner * 2 // 32
    assert (forward.global_load_sectors, forward.global_store_sectors) == (2 * matrix, matrix)
    assert (backward.global_load_sectors, backward.global_store_sectors) == (3 * matrix, 3 * matrix)
    assert all(min(report.load_efficiency, report.store_efficiency) == 1 for report in log)


@pytest.mark.parametrize("target", [80, 90, 100, 120, "gfx942"])
def test_compiles_for_every_gpu(target):
    aot = pytest.importorskip("tests.simulator.aot")
    from ivl_kernels.ops.mlp import op
    from ivl_kernels.ops.mlp import triton as kernels

    def meta(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    x, up, down = meta(300, 1024), meta(3072, 1024), meta(1024, 3072)
    with aot.compiling(target) as log:
        _, pre = kernels.mlp(op.Mlp(x, up, up, None, down, None, True))
        kernels.mlp_backward(op.MlpBackward(x, x, up, up, down, pre, True, True, True, False, True, False))
    assert len(log) == 2 and all(compiled.spills == 0 for compiled in log)


@pytest.mark.parametrize("kind", NAMES)
def test_more_rows_than_are_worked_on_at_a_time(kind):
    values = operands(kind, 5000, 16, 1000, 8, torch.float32)  # 16 MiB are 4161 rows
    with poisoned():
        got = ours(values, "cpu")
    assert_accurate(got, eager({n: v.double() for n, v in values.items()}), eager(values))


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_strides_dimensions_and_biases(kind, backend):
    values = operands(kind, 24, 32, 40, 16, torch.float32)
    expected = ours(values, backend)
    strided = {n: torch.stack([v, v], -1).flatten(-2)[..., ::2] for n, v in values.items()}
    strided["x"] = torch.cat([values["x"], values["x"]], 1)[:, :32].view(2, 3, 4, 32)
    got = ours(strided, backend)
    assert torch.equal(got, expected.view(2, 3, 4, 16))
    assert ours(values | {"x": values["x"][0]}, backend).shape == (16,)
    if kind == "gelu":
        check({n: v for n, v in values.items() if "bias" not in n}, backend)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("shape", [(0, 8, 5, 4), (4, 8, 0, 4), (4, 8, 5, 0)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty(kind, shape, backend):
    values = operands(kind, *shape, torch.float32)
    with poisoned():
        assert torch.equal(ours(values, backend), eager(values))
        leaves = {n: v.requires_grad_() for n, v in values.items()}
        ours(leaves, backend).sum().backward()
    expected = {n: v.detach().clone().requires_grad_() for n, v in values.items()}
    eager(expected).sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name].grad), name


@pytest.mark.parametrize("kind", NAMES)
def test_threads_do_not_matter(kind):
    values = operands(kind, 300, 200, 330, 96, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ours(values))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("kind", NAMES)
def test_only_what_is_needed(kind):
    values = operands(kind, 9, 16, 24, 8, torch.float32)
    for name in values:
        leaf = values[name].clone().requires_grad_()
        (got,) = torch.autograd.grad(ours(values | {name: leaf}).sum(), [leaf])
        (expected,) = torch.autograd.grad(eager(values | {name: leaf}).sum(), [leaf])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, leaf, written", [(k, a, b) for k, names in NAMES.items() for a in names for b in names])
def test_what_is_not_needed_may_be_written_to(kind, leaf, written):
    values = operands(kind, 9, 16, 24, 8, torch.float32)
    plain, got = (gradient_after_a_write(function, values, leaf, written) for function in (eager, ours))
    assert (got is None) == (plain is None)
    assert got is None or torch.allclose(got, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_kept(kind):
    """Nothing but the activation's input when the weights are frozen."""
    values = operands(kind, 30, 16, 24, 8, torch.float32)

    def kept(*trained):
        seen = {}
        leaves = {n: v.clone().requires_grad_(n in trained) for n, v in values.items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
            ours(leaves)
        weights = {leaves[n].data_ptr() for n in leaves if n != "x"}
        return sorted(tuple(t.shape) for pointer, t in seen.items() if pointer not in weights)

    pre = (30, 24 if kind == "gelu" else 48)
    assert kept("x") == [pre] and kept("x", "down") == [pre]
    assert kept("x", "up") == sorted([pre, (30, 16)])


@pytest.mark.parametrize("kind", NAMES)
def test_gradcheck_opcheck_and_compile(kind):
    values = operands(kind, 5, 6, 7, 4, torch.float64)
    names = list(values)
    torch.autograd.gradcheck(lambda *t: ours(dict(zip(names, t))), [v.requires_grad_() for v in values.values()])
    v = {n: t.detach().float() for n, t in values.items()}
    gate, biases = v.get("gate"), (v.get("up_bias"), v.get("down_bias"))
    args = (v["x"], gate, v["up"], biases[0], v["down"], biases[1], True, "")
    torch.library.opcheck(torch.ops.ivl.mlp.default, args)
    out, pre = torch.ops.ivl.mlp.default(*args)
    needs = (True, gate is not None, True, biases[0] is not None, True, biases[1] is not None)
    saved = (v["x"], gate, v["up"], v["down"], pre)
    torch.library.opcheck(torch.ops.ivl.mlp_backward.default, (out, *saved, *needs, ""))
    compiled = torch.compile(lambda v: ours(v), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(v), ours(v))


def test_autocast():
    values = operands("gelu", 5, 32, 40, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = mlp(**values)
    assert torch.equal(out, mlp(**{n: v.bfloat16() for n, v in values.items()}))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, r"x: got int64 .* expected dtype float32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: got float32 \[\] on cpu, expected \[..., C\]"),
        ({"up": torch.ones(4, 5)}, ValueError, r"up: got float32 \[4, 5\] on cpu, expected shape \[F, 3\]"),
        ({"down": torch.ones(2, 5)}, ValueError, r"down: got float32 \[2, 5\] on cpu, expected shape \[H, 4\]"),
        ({"up": torch.ones(4, 3).half()}, TypeError, r"up: got float16 .* expected the dtype of x"),
        ({"down_bias": torch.ones(5)}, ValueError, r"down_bias: got float32 \[5\] on cpu, expected shape \[2\]"),
        ({"up_bias": 1}, TypeError, r"up_bias: got int, expected a torch.Tensor"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.ones(2, 3), "up": torch.ones(4, 3), "down": torch.ones(2, 4)} | change
    with pytest.raises(error, match=message):
        mlp(**arguments)
    with pytest.raises(ValueError, match=r"gate: got float32 \[5, 3\]"):
        gated_mlp(torch.ones(2, 3), torch.ones(5, 3), torch.ones(4, 3), torch.ones(2, 4))
