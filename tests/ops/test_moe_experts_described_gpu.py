"""Products of the experts whose operands bulk copies bring: executed from PTX, compared bit by bit, compiled."""

import importlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from ivl_kernels import _library
from ivl_kernels._plan import unplanned
from ivl_kernels._triton import _kind
from ivl_kernels.ops import moe_dispatch
from ivl_kernels.ops.moe_experts.triton_forward import moe_experts_gate_up_kernel as gate_up_kernel
from ivl_kernels.ops.moe_experts.triton_forward import moe_experts_rows_kernel as rows_kernel
from ivl_kernels.testing import MODELS, poisoned
from tests.ops.test_moe_experts import make
from tests.ops.test_moe_experts_gpu import BF16, FP16, FP32, kernels, launch_on_meta
from tests.simulator.aot import SHARED_LIMIT
from tests.simulator.gpu import OLD_TRITON, simulated_gpu
from tests.simulator.idle import idle_gpu

described = importlib.import_module("ivl_kernels.ops.moe_experts.triton_described")
TALL = ("moe_experts_gate_up_kernel", "moe_experts_rows_kernel")
PERSISTENT = "moe_experts_rows_persistent_kernel"
LOAD = r"cp\.async\.bulk\.tensor\.\dd\.shared"
ASYNC = r"cp\.async\.c[ag]\."
# A product of what threads copied, without a fence between.
UNFENCED = r"cp\.async\.wait_group(?:(?!fence\.proxy\.async|wait_group)[\s\S])*?wgmma\.mma_async"

# Widths that no step or tile divides, all three heights of tiles, rows that no expert serves, edges between experts.
CASES = {
    "concatenated": dict(tokens=110, width=136, inner=96, experts=2, top_k=1, dtype=BF16, bias=True),
    "uneven": dict(tokens=84, width=72, inner=136, experts=3, top_k=2, dtype=FP16, skew="zipf", outside=0.1),
    "interleaved": dict(tokens=70, width=64, inner=64, experts=1, top_k=1, dtype=BF16, gpt_oss=True),
}


def with_and_without(run, monkeypatch):
    """The result of `run`, which has the same bits without bulk copies, and the reports of its launches."""
    logs, results = [], []
    for asked in (described.describable, lambda *operands: False):
        monkeypatch.setattr(described, "describable", asked)
        with simulated_gpu(preferred=True, check_uninit="strict") as log, poisoned(), torch.no_grad():
            results.append(run())
        logs.append([r for r in log if r.kernel in (*TALL, PERSISTENT)])
        assert all(r.shared_races == 0 and r.uninit_shared_reads == 0 for r in log)
    assert torch.equal(*results)
    assert all(r.bulk_load_bytes > 0 for r in logs[0]) and all(r.bulk_load_bytes == 0 for r in logs[1])
    return results[0], logs[0]


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_without_bulk_copies(name, newer_gpu, monkeypatch):
    case = make(**CASES[name])
    out, (gate_up, down) = with_and_without(case.run, monkeypatch)
    torch.testing.assert_close(out, case.run("reference"), atol=3e-2, rtol=3e-2)
    assert ("gather4" in gate_up._ptx) == (newer_gpu == 100) and "gather4" not in down._ptx
    product = {90: "wgmma.mma_async", 100: "tcgen05.mma"}[newer_gpu]
    assert product in gate_up._ptx and product in down._ptx


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("along_k", [False, True])
def test_rows_in_order(along_k, persistent, newer_gpu, monkeypatch):
    """Down, and the backward's product with gate and up turned around; persistent: two programs for all tiles."""
    counts, K, N = torch.tensor([70, 0, 33, 129]), 128, 72
    monkeypatch.setattr(described, "persistent", lambda *args: persistent)
    monkeypatch.setattr(kernels, "multiprocessors", lambda *args: 2)
    ids = torch.arange(4).repeat_interleave(counts).view(-1, 1)
    plan = moe_dispatch(ids, 4, tile=described.TALL, backend="reference")
    rows, weights = torch.randn(len(ids), K).bfloat16(), torch.randn(4, *((N, K) if along_k else (K, N))).bfloat16()
    monkeypatch.setattr(kernels, "_plan", lambda *args: (described.TALL, len(plan.tiles)))
    a = SimpleNamespace(offsets=plan.offsets, tiles=plan.tiles, format="", mixed=False)

    def run():
        out = rows.new_empty(len(rows), N)
        options = dict(E=4, FORMAT="", TALL=True, PRECISION="ieee", UPCAST=False)
        kernels._rows(a, rows, weights, None, None, out, along_k, newer_gpu, options)
        return out

    out, (report,) = with_and_without(run, monkeypatch)
    assert report.kernel == (PERSISTENT if persistent else TALL[1])
    full = weights.transpose(1, 2) if along_k else weights
    wanted = torch.cat([part.float() @ full[e].float() for e, part in enumerate(rows.split(counts.tolist()))])
    torch.testing.assert_close(out.float(), wanted, atol=0.3, rtol=2e-2)


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype=FP32, width=64, inner=64),
        dict(dtype=BF16, width=60, inner=44),  # rows of 120 bytes
        dict(dtype=BF16, width=72, inner=72, gpt_oss=True),  # steps of 64 would cross experts
        dict(dtype=BF16, width=64, inner=64, tokens=40),  # short tiles
    ],
)
def test_served_without_bulk_copies(options, newer_gpu):
    case = make(**dict(tokens=70, experts=1, top_k=1) | options)
    with simulated_gpu(preferred=True) as log, poisoned(), torch.no_grad():
        out = case.run()
    assert all(r.bulk_load_bytes == 0 for r in log)
    torch.testing.assert_close(out, case.run("reference"), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", ["gate_up", "down", "hidden"])
def test_tensors_off_16_bytes(name, newer_gpu):
    """Are served as before; the other product by bulk copies."""
    case = make(tokens=70, width=64, inner=64, experts=1, top_k=1, dtype=BF16)
    tensor = getattr(case, name)
    moved = torch.empty(tensor.numel() + 1, dtype=BF16)[1:].view(tensor.shape).copy_(tensor)
    with simulated_gpu(preferred=True) as log, torch.no_grad():
        expected = case.run()
        setattr(case, name, moved)
        got = case.run()
    assert torch.equal(got, expected)
    used = [r.kernel for r in log[4:] if r.bulk_load_bytes]
    gathered_by_threads = name == "hidden" and newer_gpu == 90
    assert used == (list(TALL) if gathered_by_threads else [TALL[name != "down"]])


@pytest.mark.parametrize("model, target", [("InternVL3.5-30B-A3B", 90), ("InternVL3.5-GPT-OSS-20B-A4B", 100)])
def test_compiles_for(model, target, monkeypatch):
    """Both operands of down, and gate's and up's weights, by bulk copies; tokens' rows too where rows are gathered."""
    log = {kernel.kernel: kernel for kernel in launch_on_meta(MODELS[model], 4096, target, monkeypatch, backward=False)}
    gate_up, down = (log[name] for name in TALL)
    for kernel in (gate_up, down):
        assert kernel.spills == 0 and kernel.shared <= min(SHARED_LIMIT[target], 232_448)
        assert kernel.count(r"mbarrier\.try_wait") > 0
    assert down.count(LOAD) > 0 and down.count(ASYNC) == 0
    machine_code = down.machine_code(target)
    assert machine_code.count("UTMALDG") > 0 and "LDGSTS" not in machine_code
    if target == 100:
        assert gate_up.count("gather4") > 0 and gate_up.count(ASYNC) == 0
    else:
        assert gate_up.count(LOAD) > 0
        assert 0 < gate_up.count(ASYNC) <= 28  # 124 without
        assert OLD_TRITON or gate_up.count(UNFENCED) == 0


@pytest.mark.parametrize("model, target", [("InternVL3.5-30B-A3B", 90), ("InternVL3.5-GPT-OSS-20B-A4B", 100)])
def test_persistent_programs_compile_for(model, target, monkeypatch):
    log = launch_on_meta(MODELS[model], 16384, target, monkeypatch, backward=False)
    (kernel,) = (kernel for kernel in log if "rows" in kernel.kernel)
    assert kernel.kernel == PERSISTENT and kernel.spills == 0 and kernel.shared <= 232_448
    assert kernel.count(LOAD) > 0 and kernel.count(ASYNC) == 0


def test_persistent_where_tiles_are_full():
    config = dict(BK=64)
    assert [described.persistent(128 * mean, 128, 768, config) for mean in (64, 320, 384, 1024)] == [
        False,
        False,
        True,
        True,
    ]
    assert [described.persistent(32 * mean, 32, 2880, config) for mean in (384, 1024)] == [False, True]


def test_what_a_compiled_launch_depends_on():
    a = torch.zeros(64, 64, dtype=BF16)
    kinds = [_kind(described._matrix(t, *box)) for t, box in ((a, (16, 64)), (a, (32, 64)), (a.half(), (16, 64)))]
    assert len(set(kinds)) == 3
    assert _kind(described._matrix(torch.zeros(8, 128, dtype=BF16), 16, 64)) == kinds[0]


@pytest.mark.skipif(OLD_TRITON, reason="the launcher that makes tensor maps of descriptors is another")
def test_launches_find_their_compiled_kernel_again():
    """And hand it tensor maps of the tensors of that call."""
    first, second = (make(tokens=70, width=64, inner=64, experts=1, top_k=1, dtype=BF16, seed=seed) for seed in (0, 1))
    with idle_gpu() as idle:
        first.run()
        sizes = [len(kernel._compiled) for kernel in (gate_up_kernel, rows_kernel)]
        with mock.patch.object(idle, "launch") as launch:
            second.run()
        assert [len(kernel._compiled) for kernel in (gate_up_kernel, rows_kernel)] == sizes
    maps = [arg for call in launch.call_args_list for arg in call.args[10:] if isinstance(arg, tuple)]
    assert [(m[0] in (second.gate_up.data_ptr(), second.down.data_ptr())) for m in maps] == [
        True,
        False,
        False,
        False,
        True,
    ]
    assert [m[4] for m in maps] == [[64, 2, 64], [128, 64], [64, 64], [32, 64], [64, 64]]


def test_tensor_maps_that_the_driver_refuses(monkeypatch):
    """Threads copy what it does not describe: gates and ups in turns."""
    case = make(tokens=70, width=64, inner=64, experts=1, top_k=1, dtype=BF16)
    monkeypatch.setattr(described, "_ACCEPTED", {})
    with idle_gpu() as idle, unplanned():
        fill = mock.Mock(side_effect=[RuntimeError("invalid argument"), *[()] * 4])
        idle.utils.fill_tma_descriptor_tiled = fill
        case.run()
    assert fill.call_count == 5  # the first asked, the others for the product of rows
    assert list(described._ACCEPTED.values()) == [False]


def test_planned_calls():
    """A plan makes the tensor maps of its own call's tensors."""
    cases = [make(tokens=70, width=64, inner=64, experts=1, top_k=1, dtype=BF16, seed=seed) for seed in range(4)]
    with idle_gpu() as idle:
        for case in cases[:3]:
            case.run()
        with mock.patch.object(idle, "launch") as launch, mock.patch.object(_library.Op, "_serve") as serve:
            cases[3].run()
        assert not serve.called
    maps = [arg for call in launch.call_args_list for arg in call.args[10:] if isinstance(arg, tuple)]
    assert [maps[0][0], maps[4][0]] == [cases[3].gate_up.data_ptr(), cases[3].down.data_ptr()]
    assert maps[1][0] == maps[2][0] == maps[3][0] and maps[1][5] == (70, 64)


def test_planned_calls_have_the_bits(newer_gpu):
    first, second = (make(tokens=66, width=64, inner=64, experts=1, top_k=1, dtype=BF16, seed=seed) for seed in (0, 1))
    with simulated_gpu(preferred=True) as log, poisoned(), torch.no_grad():
        expected, _ = second.run(), first.run()
        with mock.patch.object(_library.Op, "_serve") as serve:
            got = second.run()
    assert not serve.called and torch.equal(got, expected)
    assert [r.bulk_load_bytes > 0 for r in log[-4:]] == [False, True, True, False]
