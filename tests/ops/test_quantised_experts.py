"""Experts in MXFP4 and block FP8 against the reference on the weights that they stand for."""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels.ops import moe_experts
from ivl_kernels.ops.moe_experts import formats
from ivl_kernels.testing import assert_accurate, poisoned
from tests.ops.test_moe_experts import Case, eager, make
from tests.simulator.gpu import backends, simulated_gpu

BACKENDS = backends("cpu", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [("mxfp4", True), ("mxfp4", False), ("fp8", False)]  # and whether with GPT-OSS's order and activation


@dataclass
class Stored:
    """A case whose matrices are in few bits; `plain` has those that they stand for."""

    plain: Case
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scales: torch.Tensor
    down_scales: torch.Tensor

    def run(self, backend="", plain=None):
        p = plain or self.plain
        return moe_experts(
            p.hidden, p.ids, p.weights, self.gate_up, self.down, gate_up_bias=p.gate_up_bias, down_bias=p.down_bias,
            gate_up_scales=self.gate_up_scales, down_scales=self.down_scales, activation=p.activation, layout=p.layout,
            backend=backend,
        )  # fmt: skip


def stored(kind, gpt_oss, dtype, **options):
    """Every scale and value is used: blocks differ in size by up to 2^8."""
    case = make(gpt_oss=gpt_oss, dtype=torch.float32, **options)
    g = torch.Generator().manual_seed(7)
    matrices = []
    for weight in (case.gate_up, case.down):
        rows = weight.mT if gpt_oss else weight
        sizes = torch.randint(-6, 3, (*rows.shape[:2], rows.shape[2] // 32), generator=g)
        matrices.append(formats.quantise(torch.ldexp(rows, sizes.repeat_interleave(32, 2)), kind))
    expanded = [formats.dequantise(*pair, torch.float64) for pair in matrices]
    case = case.to(dtype)
    case.gate_up, case.down = (w.mT.contiguous() if gpt_oss else w for w in expanded)
    return Stored(case, matrices[0][0], matrices[1][0], matrices[0][1], matrices[1][1])


def truth_and_plain(case, dtype):
    """The reference on the expanded weights in float64, and the eager loop on them in this dtype."""
    wide = replace(case.plain.to(torch.float64), gate_up=case.plain.gate_up, down=case.plain.down)
    return wide, case.plain.to(dtype)


def gradients(plain, run, grad):
    """Of hidden states, routing weights and biases, by name."""
    names = ("hidden", "weights", "gate_up_bias", "down_bias")
    leaves = {n: getattr(plain, n).detach().clone().requires_grad_() for n in names if getattr(plain, n) is not None}
    out = run(replace(plain, **leaves))
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad, materialize_grads=True)))


def check(case, backend, dtype, slopes=True):
    wide, plain = truth_and_plain(case, dtype)
    with poisoned():
        got = case.run(backend)
    assert_accurate(got, wide.run("reference"), eager(plain))
    if not slopes:
        return got
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    with poisoned():
        found = gradients(case.plain, lambda p: case.run(backend, p), grad)
    true = gradients(wide, lambda p: p.run("reference"), grad.double())
    same = gradients(plain, lambda p: eager(p) + 0 * p.hidden, grad)
    for name, value in found.items():
        assert_accurate(value, true[name], same[name], name, 2 if value.numel() > 100 else 4)
    return got


@BACKENDS
@pytest.mark.parametrize("kind, gpt_oss", KINDS)
@given(
    tokens=st.integers(0, 70), width=st.integers(1, 5), inner=st.integers(1, 5), experts=st.integers(1, 9),
    top_k=st.integers(1, 4), bias=st.booleans(), dtype=st.sampled_from(DTYPES),
    skew=st.sampled_from(["even", "one", "zipf"]), outside=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=12)
def test_accurate(backend, kind, gpt_oss, tokens, width, inner, experts, top_k, bias, dtype, skew, outside, seed):
    case = stored(
        kind, gpt_oss, dtype, tokens=tokens, width=32 * width, inner=32 * inner, experts=experts, top_k=top_k,
        bias=bias, skew=skew, outside=outside, seed=seed,
    )  # fmt: skip
    check(case, backend, dtype, slopes=tokens < 30)


# One row, whole and broken tiles of rows, several blocks of k, packed panels, several turns.
SHAPES = [
    dict(tokens=1, width=192, inner=96, experts=9, top_k=4),
    dict(tokens=7, width=64, inner=64, skew="zipf", outside=0.2),
    dict(tokens=40, width=96, inner=160, experts=3),
    dict(tokens=90, width=64, inner=64, experts=1, top_k=1),
    dict(tokens=20, width=1152, inner=2080, experts=2, top_k=1),
    dict(tokens=1100, width=32, inner=32, experts=8, top_k=4),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, gpt_oss", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['tokens']}-{shape['width']}")
def test_every_instruction_set(isa, shape, kind, gpt_oss, dtype):
    check(stored(kind, gpt_oss, dtype, bias=True, **shape), "cpu", dtype)


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_every_byte_of_a_value_and_a_scale(isa, kind):
    """A row of ones picks out every weight: exactly what it stands for, sums of one term being exact in float32."""
    if kind == "mxfp4":
        values = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(1, 4, 1, 1)  # [1, 64, 1, 16]
        scales = torch.arange(2, 66, dtype=torch.uint8).view(1, 64, 1) * 3 + 40  # 46 to 235
    else:
        values = torch.arange(256).to(torch.uint8).view(1, 8, 32).repeat(1, 8, 1)
        values = torch.where((values & 127) == 127, 1, values).view(torch.float8_e4m3fn)  # but for NaN
        scales = torch.full((1, 1, 1), 2.0**-3)
    down, down_scales = formats.quantise(torch.eye(32).unsqueeze(0), kind)
    hidden = torch.eye(32)
    ids, weights = torch.zeros(32, 1, dtype=torch.long), torch.ones(32, 1)
    got = moe_experts(
        hidden, ids, weights, values, down, gate_up_scales=scales, down_scales=down_scales, activation="gpt_oss",
        alpha=0.0, limit=3.0e38, layout="concatenated", backend="cpu",
    )  # fmt: skip
    gate, up = formats.dequantise(values, scales)[0].chunk(2)
    assert torch.equal(got, ((gate * 0.5) * (up + 1)).T)


def test_nan_stays_nan(isa):
    """A NaN of E4M3 or a scale that is infinite reaches the result."""
    weight = torch.ones(1, 64, 32)
    down, down_scales = formats.quantise(torch.ones(1, 32, 32), "fp8")
    hidden, ids, weights = torch.ones(2, 32), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    values, scales = formats.quantise(weight, "fp8")
    values.view(torch.uint8)[0, 3, 5] = 0xFF
    for dtype in (torch.float32, torch.bfloat16):
        out = moe_experts(hidden.to(dtype), ids, weights, values, down, gate_up_scales=scales, down_scales=down_scales)
        assert bool(out.isnan().all())


def test_rows_of_a_token_do_not_depend_on_the_others(isa):
    """In dot products of float32 a token's result is the same alone and among others."""
    case = stored("mxfp4", True, torch.float32, tokens=6, width=64, inner=96, experts=1, top_k=1)
    one = replace(case.plain, **{n: getattr(case.plain, n)[2:3] for n in ("hidden", "ids", "weights")})
    assert torch.equal(case.run("cpu")[2:3], case.run("cpu", one))


def test_thread_count_does_not_change_the_result():
    case = stored("mxfp4", True, torch.bfloat16, tokens=300, width=96, inner=160)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(case.run("cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kind, gpt_oss", KINDS)
def test_gradcheck(kind, gpt_oss):
    case = stored(kind, gpt_oss, torch.float64, tokens=3, width=32, inner=32, experts=2, top_k=2, bias=True)
    plain = case.plain
    leaves = [t.requires_grad_() for t in (plain.hidden, plain.weights, plain.gate_up_bias, plain.down_bias)]

    def run(hidden, weights, gate_up_bias, down_bias):
        replaced = dict(hidden=hidden, weights=weights, gate_up_bias=gate_up_bias, down_bias=down_bias)
        return case.run("reference", replace(plain, **replaced))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@BACKENDS
@pytest.mark.parametrize("kind, gpt_oss", KINDS)
def test_opcheck(backend, kind, gpt_oss):
    case = stored(kind, gpt_oss, torch.float32, width=64, inner=32)
    p = case.plain
    dispatch = torch.ops.ivl.moe_dispatch(p.ids, 5, 16, "reference")
    tensors = (p.hidden, p.weights, dispatch[0], dispatch[1], *dispatch[3:], case.gate_up, case.down, p.gate_up_bias,
               p.down_bias, case.gate_up_scales, case.down_scales)  # fmt: skip
    options = (p.activation, 1.702, 7.0, p.layout)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # Whether inputs were written is asked with a product, which torch has not for float8.
    run = functools.partial(torch.library.opcheck, test_utils=checks[1 if kind == "fp8" else 0 :])
    run(torch.ops.ivl.moe_experts.default, (*tensors, *options, False, backend))
    run(torch.ops.ivl.moe_experts.default, (*tensors, *options, True, backend))
    _, pre = torch.ops.ivl.moe_experts(*tensors, *options, True, "reference")
    needs = [True, True, False, False, gpt_oss, gpt_oss]
    args = (p.hidden, *tensors, *options, True, pre, needs, backend)
    run(torch.ops.ivl.moe_experts_backward.default, args)


@BACKENDS
def test_compiles_whole(backend):
    case = stored("mxfp4", True, torch.float32, tokens=9, width=64, inner=32)
    run = torch.compile(lambda p: case.run(backend, p), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(case.plain), case.run(backend))
    hidden = case.plain.hidden.clone().requires_grad_()
    run(replace(case.plain, hidden=hidden)).sum().backward()
    again = case.plain.hidden.clone().requires_grad_()
    case.run(backend, replace(case.plain, hidden=again)).sum().backward()
    assert torch.equal(hidden.grad, again.grad)


def test_autocast_casts_the_tokens_alone():
    case = stored("mxfp4", True, torch.float32, tokens=40, width=64, inner=32, experts=2)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.run()
    cast = replace(case.plain.to(torch.bfloat16), weights=case.plain.weights)
    assert out.dtype == torch.bfloat16 and torch.equal(out, case.run("", cast))


BAD = {
    "no scales": (dict(gate_up_scales=None), ValueError, "gate_up_scales: got None"),
    "scales of another shape": (
        dict(down_scales=torch.zeros(5, 64, 3, dtype=torch.uint8)),
        ValueError,
        r"down_scales: got uint8 \[5, 64, 3\] on cpu, expected shape \[5, 64, 1\]",
    ),
    "scales of another dtype": (
        dict(gate_up_scales=torch.zeros(5, 64, 2)), TypeError, "gate_up_scales: got float32",
    ),
    "too many blocks": (
        dict(gate_up=torch.zeros(5, 64, 3, 16, dtype=torch.uint8)),
        ValueError,
        r"gate_up: got uint8 \[5, 64, 3, 16\] on cpu, expected shape \[E, 2I, 2, 16\]",
    ),
    "short blocks": (dict(down=torch.zeros(5, 64, 1, 8, dtype=torch.uint8)), ValueError, "down: got uint8"),
    "mixed formats": (dict(down=torch.zeros(5, 64, 32)), TypeError, "down: got float32.*the dtype of gate_up"),
    "plain weights with scales": (
        dict(gate_up=torch.zeros(5, 64, 64), down=torch.zeros(5, 64, 32)),
        TypeError,
        "gate_up: got float32.*with scales",
    ),
    "odd width": (dict(hidden=torch.zeros(11, 48)), ValueError, "multiples of 32, not 48"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_inputs(case):
    changes, kind, message = BAD[case]
    good = stored("mxfp4", False, torch.float32, width=64, inner=32)
    arguments = dict(
        hidden=good.plain.hidden, ids=good.plain.ids, weights=good.plain.weights, gate_up=good.gate_up, down=good.down,
        gate_up_scales=good.gate_up_scales, down_scales=good.down_scales,
    )  # fmt: skip
    moe_experts(**arguments)
    with pytest.raises(kind, match=message):
        moe_experts(**(arguments | changes))


def test_fp8_has_no_interleaved_rows():
    case = stored("fp8", False, torch.float32, width=64, inner=32)
    with pytest.raises(ValueError, match="layout: got 'interleaved'"):
        case.run("", replace(case.plain, layout="interleaved"))


def test_scales_may_not_ask_for_gradients():
    case = stored("fp8", False, torch.float32, width=64, inner=32)
    case.down_scales.requires_grad_()
    with pytest.raises(ValueError, match="down_scales: got a tensor that requires gradients"):
        case.run()


# ---- GPU ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, gpt_oss", KINDS)
@pytest.mark.parametrize("shape", [
    dict(tokens=3, width=64, inner=96, experts=4, top_k=2, outside=0.2),
    dict(tokens=40, width=160, inner=32, experts=2, top_k=1),
], ids=["few", "many"])  # fmt: skip
def test_accurate_from_ptx(shape, kind, gpt_oss, dtype):
    case = stored(kind, gpt_oss, dtype, bias=True, **shape)
    with simulated_gpu(preferred=True) as log:
        check(case, "", dtype)
    assert {"moe_experts_gate_up_kernel", "moe_experts_rows_kernel", "moe_experts_down_backward_kernel"} <= {
        r.kernel for r in log
    }


@pytest.mark.parametrize("kind, most", [("mxfp4", 0.28), ("fp8", 0.52)])
def test_bytes_and_bits_of_decode(kind, most):
    """A few tokens read the weights as they are stored, and get what expanded weights give, bit for bit."""
    gpt_oss = kind == "mxfp4"
    case = stored(kind, gpt_oss, torch.bfloat16, tokens=2, width=256, inner=256, experts=4, top_k=2, bias=gpt_oss)
    plain = case.plain.to(torch.bfloat16)
    with simulated_gpu(preferred=True, cta_sectors=True) as log:
        got = case.run()
    with simulated_gpu(preferred=True, cta_sectors=True) as expanded:
        same = plain.run()
    if kind == "mxfp4":
        assert torch.equal(got, same)
    read, plainly = (
        sum(
            r.unique_load_bytes
            for r in reports
            if r.kernel in ("moe_experts_gate_up_kernel", "moe_experts_rows_kernel")
        )
        for reports in (log, expanded)
    )
    assert read <= most * plainly
