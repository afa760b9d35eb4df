"""Experts of a few tokens: two launches, compiled and executed by the PTX simulator, and compiled for GPUs not here."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels.ops.moe_experts.op import FEW_SLOTS, FewTokens
from ivl_kernels.testing import MODELS, assert_accurate, poisoned
from tests.ops.test_moe_experts import eager, make
from tests.ops.test_quantised_experts import KINDS, stored, truth_and_plain
from tests.simulator.aot import SHARED_LIMIT, SPILL_LIMIT, TARGETS, compiling
from tests.simulator.gpu import simulated_gpu

kernels = importlib.import_module("ivl_kernels.ops.moe_experts.triton_few")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = ["moe_experts_few_gate_up_kernel", "moe_experts_few_down_kernel"]


def served(run, target=None):
    """What the kernels for few tokens give, twice the same; and their reports."""
    with simulated_gpu(preferred=True, target=target) as log, poisoned(), torch.no_grad():
        out, again = run(), run()
    assert [r.kernel for r in log] == 2 * KERNELS
    assert torch.equal(out, again)
    return out, log[:2]


def check(case, target=None):
    out, log = served(case.run, target)
    outside = case.ids.min() < 0 or not (case.ids < len(case.gate_up)).any()
    assert_accurate(out, case.to(torch.float64).run("reference"), out * 0 if outside else eager(case))
    return log


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize(
    "options",
    [
        dict(tokens=1, width=256, inner=144, experts=20, top_k=8, dtype=BF16),
        dict(tokens=1, width=1040, inner=272, experts=3, top_k=2, dtype=FP32, gpt_oss=True),  # narrow columns of down
        dict(tokens=8, width=96, inner=80, experts=12, top_k=4, dtype=FP16, gpt_oss=True),
        dict(tokens=7, width=45, inner=35, experts=5, top_k=3, dtype=FP32, bias=True, outside=0.3),
        dict(tokens=8, width=64, inner=1030, experts=4, top_k=4, dtype=BF16, bias=True),  # wide columns of gate_up
        dict(tokens=6, width=40, inner=24, experts=9, top_k=2, dtype=BF16, skew="one"),  # a token's choices are alike
    ],
    ids=lambda options: "-".join(str(v).removeprefix("torch.") for v in options.values()),
)
def test_accurate_from_ptx(options, target):
    for report in check(make(**options), target):
        assert report.bank_conflicts == 0 or options["dtype"] == FP32, report


@given(
    tokens=st.integers(1, 8), width=st.integers(1, 90), inner=st.integers(1, 70), experts=st.integers(1, 9),
    top_k=st.integers(1, 8), gpt_oss=st.booleans(), dtype=st.sampled_from([BF16, FP16, FP32]),
    skew=st.sampled_from(["even", "one", "zipf"]), outside=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=12)
def test_shapes(tokens, width, inner, experts, top_k, gpt_oss, dtype, skew, outside, seed):
    check(make(tokens, width, inner, experts, top_k, gpt_oss, None, dtype, skew, outside, seed))


@pytest.mark.parametrize("ids", [[[-1, 9], [3, -5]], [[4, 4], [4, 4]]])
def test_no_expert(ids):
    case = make(tokens=2, width=32, inner=16, experts=4, top_k=2, dtype=BF16, gpt_oss=True)
    case.ids = torch.tensor(ids, dtype=torch.int32)
    case.gate_up[:3] = float("nan")  # of experts that nobody chose
    out, _ = served(case.run)
    assert_accurate(out, case.to(torch.float64).run("reference"), out.double().to(BF16))


def test_non_contiguous():
    case = make(tokens=5, width=48, inner=32, experts=4, top_k=2, dtype=BF16, gpt_oss=True)
    expected, _ = served(case.run)
    for name in ("hidden", "ids", "weights", "gate_up_bias", "down_bias"):
        tensor = getattr(case, name)
        setattr(case, name, torch.stack([tensor, tensor], -1)[..., 1])
    assert torch.equal(served(case.run)[0], expected)


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind, gpt_oss", KINDS)
def test_experts_in_few_bits(kind, gpt_oss, tokens, target):
    case = stored(kind, gpt_oss, BF16, tokens=tokens, width=160, inner=96, experts=6, top_k=3, bias=True, outside=0.1)
    wide, plain = truth_and_plain(case, BF16)
    assert_accurate(served(case.run, target)[0], wide.run("reference"), eager(plain))


def test_where_others_serve():
    """Gradients, more tokens or slots, float64 and the CPU."""

    def launched(case, backend="", gradients=False):
        with simulated_gpu(preferred=True) as log, torch.set_grad_enabled(gradients):
            (case.leaves() if gradients else case).run(backend)
        return [r.kernel for r in log]

    small = dict(width=16, inner=16, experts=40)
    assert launched(make(8, top_k=8, **small, dtype=BF16)) == KERNELS
    assert len(launched(make(9, top_k=2, **small, dtype=BF16))) == 4
    assert len(launched(make(8, top_k=FEW_SLOTS // 8 + 1, **small, dtype=BF16))) == 4
    assert len(launched(make(2, **small, dtype=BF16), gradients=True)) == 4
    assert launched(make(2, **small, dtype=torch.float64)) == ["moe_dispatch_place_int64"]
    assert launched(make(2, **small), "reference") == launched(make(2, **small), "cpu") == []
    assert launched(make(2, **small), "triton") == KERNELS


def test_reference_and_schema():
    case = make(tokens=3, width=24, inner=16, experts=5, top_k=2, gpt_oss=True, outside=0.3)
    arguments = (case.hidden, case.ids, *case.tensors[1:], None, None, "gpt_oss", 1.702, 7.0, case.layout, "reference")
    op = torch.ops.ivl.moe_experts_few.default
    assert torch.equal(op(*arguments), case.run("reference"))
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("tokens", [1, 8])
def test_weights_are_read_once(tokens):
    """At most 4 % more bytes than the weights of the chosen experts, although all eight tokens choose some of them."""
    case = make(tokens, 512, 256, 16, 8, dtype=BF16)
    log = check(case)
    weights = case.ids.unique().numel() * 3 * 512 * 256 * 2
    sectors = 32 * sum(r.global_load_sectors + r.global_store_sectors for r in log)
    assert weights <= sum(r.unique_load_bytes for r in log) < 1.02 * weights
    assert sectors < (1.04 if tokens == 1 else 1.15) * weights


@pytest.mark.parametrize("dtype", [BF16, FP32, "mxfp4"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", ["InternVL3.5-30B-A3B", "InternVL3.5-GPT-OSS-20B-A4B", "InternVL3.5-241B-A28B"])
def test_compiles_for(model, target, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "capability", lambda tensor: 0 if target == "gfx942" else target)
    shape = MODELS[model]
    E, H, I = shape.experts, shape.hidden, shape.intermediate
    gpt_oss, in_bits = shape.family == "gpt_oss", dtype == "mxfp4"

    def meta(*size, dtype=BF16 if in_bits else dtype):
        return torch.empty(*size, dtype=dtype, device="meta")

    matrices = (meta(E, H, 2 * I), meta(E, I, H)) if gpt_oss else (meta(E, 2 * I, H), meta(E, H, I))
    scales: tuple = (None, None)
    if in_bits:
        blocks = (E, 2 * I, H // 32), (E, H, I // 32)
        matrices = tuple(meta(*size, 16, dtype=torch.uint8) for size in blocks)
        scales = tuple(meta(*size, dtype=torch.uint8) for size in blocks)
    biases = (meta(E, 2 * I), meta(E, H)) if gpt_oss else (None, None)
    options = ("gpt_oss", 1.702, 7.0, "interleaved") if gpt_oss else ("silu", 1.702, 7.0, "concatenated")
    for tokens in (1, 8):
        ids = meta(tokens, shape.top_k, dtype=torch.int64)
        with compiling(target) as log:
            few = meta(tokens, H), ids, meta(*ids.shape)
            kernels.moe_experts_few(FewTokens(*few, *matrices, *biases, *scales, *options))
        assert [kernel.kernel for kernel in log] == KERNELS
        for kernel in log:
            assert kernel.spills <= (SPILL_LIMIT if dtype == FP32 else 0), kernel.kernel
            assert kernel.shared <= SHARED_LIMIT[target], kernel.kernel
            if target != "gfx942" and not in_bits:
                assert kernel.count(r"cp\.async\.cg\.shared\.global.* 0x10") > 0, kernel.kernel
