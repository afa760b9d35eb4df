"""The norms against torch's and transformers' own, float64 truth, and the counters of the GPU simulator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ivl_kernels.ops import layer_norm, rms_norm
from ivl_kernels.ops.norm.op import Norm, NormBackward
from ivl_kernels.testing import MODELS, assert_accurate, poisoned
from tests.simulator.gpu import backends, simulated_gpu

BACKENDS = backends("cpu", "triton", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["before_weight", "after_weight", "layer"]
EPS = 1e-6


def make(shape=(3, 5, 64), dtype=torch.float32, residual=True, scale=True, bias=True, layout="dense"):
    """x, residual, layer_scale, weight, bias; what is off is None."""

    def rows():
        if layout == "dense":
            return torch.randn(shape).to(dtype)
        if layout == "inside a wider tensor":
            return torch.randn(*shape[:-1], shape[-1] + 9).to(dtype)[..., 4:-5]
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)  # columns not adjacent

    def vector(mean):
        return (mean + torch.randn(shape[-1]) * 0.3).to(dtype)

    return [rows(), rows() if residual else None, vector(0) if scale else None, vector(1), vector(0) if bias else None]


def ours(kind, x, residual, scale, weight, bias, backend=""):
    options = dict(residual=residual, layer_scale=scale, backend=backend)
    if kind == "layer":
        return layer_norm(x, weight, bias, EPS, **options)
    return rms_norm(x, weight, EPS, rounding=kind, **options)


def plain(kind, x, residual, scale, weight, bias):
    """As the models do it, in the dtype of the inputs."""
    s = x if residual is None else residual + (x if scale is None else scale * x)
    if kind == "layer":
        y = torch.nn.functional.layer_norm(s, s.shape[-1:], weight, bias, EPS)
    elif s.dtype == torch.float64:
        y = weight * (s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS))
    else:
        module = (Qwen3RMSNorm if kind == "before_weight" else GptOssRMSNorm)(s.shape[-1], eps=EPS)
        del module.weight
        module.weight = weight
        y = module(s)
    return y if residual is None else (y, s)


def wide(values):
    return [None if v is None else v.double() for v in values]


def both(result):
    return result if isinstance(result, tuple) else (result,)


@backends("cpu", "triton", "reference")
@settings(max_examples=24)
@given(
    kind=st.sampled_from(KINDS), rows=st.integers(0, 7), width=st.sampled_from([1, 3, 16, 17, 64, 72, 200, 515]),
    dtype=st.sampled_from(DTYPES), residual=st.booleans(), scale=st.booleans(), bias=st.booleans(),
    layout=st.sampled_from(["dense", "inside a wider tensor", "columns apart"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_accurate(backend, kind, rows, width, dtype, residual, scale, bias, layout, seed):
    torch.manual_seed(seed)
    values = make((2, rows, width), dtype, residual, residual and scale, bias, layout)
    eager, true = both(plain(kind, *values)), both(plain(kind, *wide(values)))
    with poisoned():
        got = both(ours(kind, *values, backend=backend))
    assert len(got) == len(eager)
    assert_accurate(got[0], true[0], eager[0])
    if residual:
        assert torch.equal(got[1], eager[1])


@BACKENDS
@pytest.mark.parametrize("stride", [1, 7, 1 << 40])
def test_strides_where_a_size_is_1(backend, stride):
    """They mean nothing: such tensors are contiguous."""
    values = make((3, 1, 72))
    odd = [v.as_strided(v.shape, (72, stride, 1)) if v.dim() == 3 else v for v in values]
    grad = torch.randn(3, 1, 72)
    grads = []
    for x, residual, *vectors in (values, odd):
        leaves = [x.clone().as_strided(x.shape, x.stride()).requires_grad_() for x in (x, residual)]
        y, total = ours("before_weight", *leaves, *vectors, backend=backend)
        grads.append(
            (y, total, *torch.autograd.grad([y, total], leaves, [grad.as_strided(grad.shape, x.stride())] * 2))
        )
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [128, 1024, 2880, 3200])
def test_shapes_of_the_models(backend, dtype, kind, width):
    """Rows of very different size, and one far from zero, where a variance from squares would lose everything."""
    values = make((6, width), dtype)
    values[0][1] *= 1e3
    values[0][2] *= 1e-4
    values[1][3] += 300
    got, eager, true = ours(kind, *values, backend=backend), plain(kind, *values), plain(kind, *wide(values))
    assert torch.equal(got[1], eager[1])
    for row in range(6):  # each on its own: none may hide behind another
        truth = plain(kind, eager[1][row : row + 1].double(), None, None, *wide(values[3:]))
        # 4: a row's error is mostly that of one number, its standard deviation.
        assert_accurate(got[0][row : row + 1], truth, eager[0][row : row + 1], f"row {row}", factor=4)
    assert_accurate(got[0], true[0], eager[0])


@BACKENDS
def test_weights_of_gpt_oss_stay_float32(backend):
    x, residual, _, weight, _ = make((4, 64), torch.bfloat16)
    weight = weight.float() + 1e-3
    y, s = rms_norm(x, weight, residual=residual, rounding="after_weight", backend=backend)
    true = plain("after_weight", *wide([x, residual, None, weight, None]))
    eager = plain("after_weight", x, residual, None, weight, None)
    assert y.dtype == torch.bfloat16 and torch.equal(s, eager[1])
    assert_accurate(y, true[0], eager[0])
    z = layer_norm(x, weight, weight, backend=backend)
    assert_accurate(z, plain("layer", *wide([x, None, None, weight, weight])), z)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set(isa, dtype, kind):
    for width in (1, 14, 64, 200, 1030):
        values = make((70, width), dtype)
        leaves = [v.requires_grad_() for v in values if v is not None]
        got, eager = ours(kind, *values, backend="cpu"), plain(kind, *values)
        exact = [v.detach().double().requires_grad_() for v in values]
        true = plain(kind, *exact)
        assert torch.equal(got[1], eager[1])
        assert_accurate(got[0].detach(), true[0].detach(), eager[0].detach())
        into = [torch.randn(70, width).to(dtype) for _ in range(2)]
        leaves, deep = (v if kind == "layer" else v[:4] for v in (leaves, exact))
        grads = [torch.autograd.grad(o, leaves, into) for o in (got, eager)]
        for g, e, t in zip(*grads, torch.autograd.grad(true, deep, [i.double() for i in into])):
            assert_accurate(g, t, e, factor=4 if width == 1 else 2)
    x = torch.randn(2, 64).to(dtype)
    x[0, 3] = float("nan")
    y = ours(kind, x, None, None, *make((1, 64), dtype)[3:], backend="cpu")
    assert y[0].isnan().all() and y[1].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["x", "residual", "layer scale", "sum unused", "y unused"])
def test_gradients(backend, dtype, kind, given):
    def run(function, dtype):
        torch.manual_seed(3)
        values = make((2, 9, 72), torch.bfloat16, given != "x", given == "layer scale", kind == "layer")
        values = [None if v is None else v.to(dtype).requires_grad_() for v in values]
        out = both(function(kind, *values))
        assert all(o.grad_fn is not None for o in out)
        into = [torch.randn(2, 9, 72, dtype=torch.float64).bfloat16().to(dtype) for _ in out]
        if given.endswith("unused"):
            keep = slice(1, 2) if given == "y unused" else slice(1)
            out, into = out[keep], into[keep]
        leaves = [v for v in values if v is not None]
        return torch.autograd.grad(out, leaves, into, allow_unused=True)

    with poisoned():
        got = run(lambda *args: ours(*args, backend=backend), dtype)
    for g, t, e in zip(got, run(plain, torch.float64), run(plain, dtype)):
        if e is None:
            assert g is None or not g.any()  # weights that nothing came from
        else:
            assert_accurate(g, t, e)


@BACKENDS
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_rows_apart(backend, kind, residual):
    """Every operand with a stride of its own."""

    def apart(x, gap):
        wide = torch.full((*x.shape[:-1], x.shape[-1] + gap), torch.nan, dtype=x.dtype)
        return wide[..., 1 : 1 + x.shape[-1]].copy_(x)

    def run(function, dtype, lay):
        torch.manual_seed(3)
        values = [None if v is None else v.to(dtype) for v in make((9, 72), residual=residual, scale=residual)]
        values = [v if v is None or v.dim() == 1 else lay(v, 2 + i) for i, v in enumerate(values)]
        values[4] = values[4] if kind == "layer" else None
        leaves = [v.requires_grad_() for v in values if v is not None]
        out = both(function(kind, *values))
        return torch.autograd.grad(out, leaves, [lay(torch.randn(9, 72).to(dtype), 5 + 2 * i) for i in range(len(out))])

    got = run(lambda *args: ours(*args, backend=backend), torch.float32, apart)
    exact, usual = (run(plain, dtype, lambda x, gap: x) for dtype in (torch.float64, torch.float32))
    for g, t, e in zip(got, exact, usual):
        assert_accurate(g, t, e)


@BACKENDS
def test_rows_far_from_zero(backend):
    """Where float32 holds integers only, their mean is none: the variance is exact nevertheless."""
    x = 2.0**23 + torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(1))
    x[0] = 2.0**23 + torch.tensor([0, 0, 0, 1, 1])
    got = layer_norm(x, torch.ones(5), torch.zeros(5), EPS, backend=backend)
    torch.testing.assert_close(
        got, torch.nn.functional.layer_norm(x.double(), (5,), eps=EPS).float(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(kind, residual):
    values = make((2, 3, 7), torch.float64, residual, residual)
    values = [None if v is None else v.requires_grad_() for v in values]
    leaves = [v for v in values if v is not None][: None if kind == "layer" else -1]

    def run(*leaves):
        parts = iter(leaves)
        full = [None if v is None or (i == 4 and kind != "layer") else next(parts) for i, v in enumerate(values)]
        return ours(kind, *full, backend="reference")

    assert torch.autograd.gradcheck(run, leaves)


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (1, 8), (8,)])
def test_empty_and_single_rows(backend, shape):
    values = [v if v is None else v.requires_grad_() for v in make((*shape[:-1], 1, 8))]
    values[:2] = [v.detach().reshape(shape).requires_grad_() for v in values[:2]]
    y, s = ours("layer", *values, backend=backend)
    assert y.shape == s.shape == shape
    grads = torch.autograd.grad((y, s), values, (torch.ones(shape), torch.ones(shape)))
    assert [g.shape for g in grads] == [v.shape for v in values]
    assert all(g.isfinite().all() for g in grads)


def test_does_not_depend_on_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            values = [v.requires_grad_() for v in make((700, 96), torch.bfloat16)]
            out = ours("layer", *values)
            results.append([*out, *torch.autograd.grad(out, values, [torch.ones_like(o) for o in out])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_keeps_only_the_sum():
    x, residual, _, weight, bias = (v if v is None else v.requires_grad_() for v in make((40, 64), scale=False))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, s = layer_norm(x, weight, bias, residual=residual)
    inputs = {v.data_ptr() for v in (weight, bias, s)}
    assert {t.data_ptr() for t in saved} <= inputs


@BACKENDS
def test_opcheck(backend):
    x, residual, scale, weight, bias = make((3, 40))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for args in ((x, residual, scale, weight, bias), (x, None, None, weight, None)):
        torch.library.opcheck(torch.ops.ivl.norm.default, (*args, EPS, True, False, backend), test_utils=tests)
    for args in ((x, residual, x, x, scale, weight, True), (x, None, x, None, None, weight, False)):
        torch.library.opcheck(torch.ops.ivl.norm_backward.default, (*args, EPS, True, backend), test_utils=tests)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph(kind):
    values = [v.requires_grad_() for v in make((5, 64))]

    def run(*values):
        y, s = ours(kind, *values)
        return y * 2 + s

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = values if kind == "layer" else values[:4]
    results = []
    for function in (run, compiled):
        out = function(*values)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("backend", ["", "reference"])
def test_compiles_without_a_residual(backend):
    """Then the sum is no result, of which a compiled graph has a gradient all the same."""
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in ((5, 64), (64,)))

    def run(x, weight):
        return rms_norm(x * 2, weight, backend=backend)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = function(x, weight)
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 8, dtype=torch.int32)), TypeError, "x: got int32 .*expected dtype"),
        (dict(x=torch.zeros(2, 0)), ValueError, r"x: got float32 \[2, 0\] on cpu, expected \[..., C\]"),
        (dict(x=[1.0]), TypeError, "x: got list, expected a torch.Tensor"),
        (dict(weight=torch.zeros(7)), ValueError, r"weight: got float32 \[7\] on cpu, expected shape \[8\]"),
        (dict(weight=torch.zeros(8).half()), TypeError, "weight: .*expected dtype float32"),
        (dict(weight=None), TypeError, "weight: got NoneType, expected a torch.Tensor"),
        (dict(x=torch.zeros(2, 8).half()), TypeError, "weight: .*expected dtype float16"),
        (dict(residual=torch.zeros(1, 8)), ValueError, r"residual: .*expected shape \[2, 8\]"),
        (dict(residual=torch.zeros(2, 8).half()), TypeError, "residual: .*expected the dtype of x"),
        (dict(layer_scale=torch.ones(8)), ValueError, "layer_scale: got one without residual"),
        (dict(residual=torch.zeros(2, 8), layer_scale=torch.ones(9)), ValueError, r"layer_scale: .*shape \[8\]"),
        (dict(rounding="never"), ValueError, "rounding: got 'never'"),
    ],
)  # fmt: skip
def test_wrong_input(change, error, message):
    with pytest.raises(error, match=message):
        rms_norm(**{**dict(x=torch.zeros(2, 8), weight=torch.ones(8)), **change})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
def test_gpu_reads_each_row_once(kind, residual):
    rows, width = 48, 1024
    values = make((rows, width), torch.bfloat16, residual, residual)
    values = [None if v is None else v.requires_grad_() for v in values]
    with simulated_gpu() as log:
        out = both(ours(kind, *values, backend="triton"))
        leaves = [v for v in values if v is not None]
        torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out], allow_unused=True)
    forward, backward = log[:2]
    sectors = rows * width * 2 // 32
    vectors = width * 2 // 32 * 3
    assert forward.global_store_sectors == sectors * (2 if residual else 1)
    assert forward.global_load_sectors <= sectors * (2 if residual else 1) + rows * vectors
    programs = -(-rows // 4)
    # Gradients of y and of the sum, the sum, and x where layer scale wants its gradient.
    assert backward.global_load_sectors <= sectors * (4 if residual else 2) + programs * vectors
    assert backward.global_store_sectors <= sectors * (2 if residual else 1) + programs * 3 * width * 4 // 32
    for report in (forward, backward):
        assert report.load_efficiency > 0.99 and report.store_efficiency > 0.99


WIDTHS = sorted({m.hidden for m in MODELS.values()} | {m.vision for m in MODELS.values()})


@pytest.mark.parametrize("target", [80, 90, 100, 120, "gfx942"])
def test_compiles_for_every_gpu(target):
    aot = pytest.importorskip("tests.simulator.aot")
    from ivl_kernels.ops.norm import triton as kernels

    for width in WIDTHS if target == 90 else (1024, 5120):
        x = torch.empty(300, width, device="meta", dtype=torch.bfloat16)
        vector = torch.empty(width, device="meta", dtype=torch.bfloat16)
        with aot.compiling(target) as log:
            kernels.norm(Norm(x, x, vector, vector, vector, EPS, True, False))
            kernels.norm(Norm(x, x, None, vector, None, EPS, False, True))
            kernels.norm_backward(NormBackward(x, x, x, x, vector, vector, True, EPS, True))
        assert len(log) == 3
        for compiled in log:
            assert compiled.spills <= aot.SPILL_LIMIT, (compiled.kernel, width, compiled.registers, compiled.spills)
