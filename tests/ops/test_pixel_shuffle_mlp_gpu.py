"""The projector's Triton kernels: executed in the simulator, counted, and compiled ahead of time for every chip."""

import re
from unittest import mock

import pytest
import torch
from triton.runtime.jit import JITFunction

from bench.inspect import machine
from ivl_kernels.ops import pixel_shuffle_mlp
from ivl_kernels.ops.pixel_shuffle_mlp import config
from ivl_kernels.ops.pixel_shuffle_mlp import triton as kernels
from ivl_kernels.ops.pixel_shuffle_mlp.op import Projector, ProjectorBackward, ProjectorInto
from ivl_kernels.testing import MODELS, assert_accurate
from ivl_kernels.testing.cases import Numbers, cast
from ivl_kernels.testing.cases import pixel_shuffle_mlp as cases
from tests.ops.test_pixel_shuffle_mlp import check, flat, make
from tests.simulator import aot
from tests.simulator.gpu import OLD_TRITON, Tf32Products, simulated_gpu

TENSOR_CORE = {
    80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma", 120: r"mma\.sync", "gfx942": r"v_mfma"
}  # fmt: skip
LOW = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[True, False], ids=["implicit", "rows"])
def implicit(request, monkeypatch):
    """Whether the first GEMM gathers and normalises its own operand."""
    monkeypatch.setattr(kernels, "implicit", lambda *args: request.param)
    return request.param


@pytest.mark.parametrize("merge", [2, 4])
def test_what_it_is_compared_with_computes_the_same(merge):
    """Our pass over the rows and torch's products: a peer of the benchmark, on GPUs only."""
    v = cases.inputs(Numbers(torch.float64), merge, 3, 8, (12 * merge**2, 20, 28))
    low = cast(v, torch.bfloat16, "cpu")
    with simulated_gpu(), torch.no_grad():
        got = cases.row_pass_and_products(low, merge)
    assert_accurate(got, cases.plain(cast(low, torch.float64, "cpu"), merge), cases.plain(low, merge))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_accuracy(dtype, implicit):
    with simulated_gpu() as log:
        check(make(dtype=dtype), "triton", grid=(4, 6), skip=1)
        check(make(dtype=dtype), "triton", grid=(4, 6), skip=1, order="v1")
        options = dict(skip=1, order="v1", tile_indices=torch.tensor([1, 0, 1]))
        check(make(2, (8, 8), 24, (72, 40), 2, 1, dtype), "triton", **options)
    assert all(report.shared_races == 0 for report in log)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_on_newer_gpus(dtype, implicit, newer_gpu):
    with simulated_gpu() as log:
        check(make(3, (8, 8), 40, (136, 72), 2, 0, dtype), "triton")
    assert all(re.search(TENSOR_CORE[newer_gpu], r._ptx) for r in log if r.kernel == "pixel_shuffle_mlp_linear_kernel")


def test_one_tf32_product_where_torch_may(implicit, tf32_setting):
    """A third of the tensor cores' work; plain torch, whose products also stand for the vendor's, rounds to tf32."""
    with simulated_gpu() as precise:
        check(make(2, (8, 8), 24, (72, 40), 2, 1), "triton", skip=1)
    torch.backends.cuda.matmul.allow_tf32 = True
    with simulated_gpu() as log, Tf32Products():
        check(make(2, (8, 8), 24, (72, 40), 2, 1), "triton", skip=1)
    assert sum(r.mma_flops for r in precise) == 3 * sum(r.mma_flops for r in log) > 0


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_odd_sizes_three_layers(dtype, implicit):
    with simulated_gpu():
        check(make(3, (4, 4), 37, (133, 101, 45), 4, 0, dtype), "triton", merge=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_than_one_step_sums(dtype):
    """From 512 rows on a program that sums over rows takes several steps of 16."""
    with simulated_gpu():
        check(make(9, (16, 16), 4, (16, 16), 2, 0, dtype), "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counters(dtype, implicit):
    """Bytes each kernel asks for, sectors used in full, no bank conflicts."""
    tiles, side, channels, hidden, out = 2, 16, 64, 64, 128
    args = make(tiles, (side, side), channels, (hidden, out), 2, 0, dtype, grad=True)
    size, rows, features = args[0].element_size(), tiles * side * side // 4, 4 * channels
    with simulated_gpu() as log:
        y = pixel_shuffle_mlp(*args, backend="triton")
        torch.autograd.grad(y.float().sum(), flat(args))
        with torch.no_grad():
            target, starts = torch.zeros(200, out, dtype=dtype), torch.tensor([64, 0])
            pixel_shuffle_mlp(*args, out=target, out_rows=starts, backend="triton")
    x_bytes, tile_rows = rows * features * size, -(-rows // 64)
    expected = [
        ("pixel_shuffle_mlp_norm_kernel", x_bytes),
        ("pixel_shuffle_mlp_linear_kernel", x_bytes + tile_rows * features * hidden * size),
        ("pixel_shuffle_mlp_gelu_backward_kernel", 2 * rows * hidden * size),
        ("pixel_shuffle_mlp_norm_kernel", x_bytes),  # held for the statistics, then normalised
        ("pixel_shuffle_mlp_norm_backward_kernel", 2 * x_bytes),
        ("pixel_shuffle_mlp_norm_parameters_kernel", 2 * x_bytes),
        ("pixel_shuffle_mlp_norm_kernel", x_bytes),
        ("pixel_shuffle_mlp_linear_kernel", x_bytes + tile_rows * features * hidden * size),
        ("pixel_shuffle_mlp_linear_kernel", 2 * rows * hidden * size + tile_rows * hidden * out * size),
    ]
    assert [report.kernel for report in log] == [name for name, _ in expected]
    for report, (name, least) in zip(log, expected):
        assert report.bank_conflicts == 0 or OLD_TRITON, report
        assert report.shared_races == 0, report
        assert report.load_efficiency >= 0.94, report
        loaded = {k: v["load_bytes"] for k, v in report.tensors.items()}
        big = sum(loaded.get(k, 0) for k in ("x", "a", "w", "grad", "pre"))
        assert big == least, (name, loaded)
        # The two statistics of a row are stored by one thread.
        stats_bytes = report.tensors.get("stats", {}).get("store_bytes", 0)
        if not stats_bytes:
            assert report.store_efficiency >= 0.95, report


def _launches(target, dtype=torch.bfloat16):
    """One launch of each kind that the heuristics pick over the catalogue, with meta tensors: {key: launch}."""
    log, found = [], {}

    def record(self, *args, grid, warmup=False, **kwargs):
        bound = dict(zip([p.name for p in self.params], args)) | kwargs
        log.append((self, bound, (self, args, kwargs)))

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    with mock.patch.object(JITFunction, "run", record):
        for vision, hidden in sorted({(m.vision, m.hidden) for m in MODELS.values()}):
            for merge in (2, 4):
                inside = (hidden,) if merge == 2 else (2 * hidden, 2 * hidden)
                widths = (vision * merge**2, *inside, hidden)
                weights = [empty(b, a) for a, b in zip(widths, widths[1:])]
                for tiles in (1, 13):
                    x, chosen = empty(tiles, 1025, vision), empty(tiles, dtype=torch.int64)
                    args = (x, empty(widths[0]), empty(widths[0]), weights, [empty(b) for b in widths[1:]])
                    geometry = (merge, 32, 32, 1, False, 1e-5, chosen)
                    a = Projector(*args, *geometry, keep=True)
                    y, pre = kernels.pixel_shuffle_mlp(a)
                    kernels.pixel_shuffle_mlp_into_(ProjectorInto(y.flatten(0, 1), chosen, a))
                    needs = [True] * (3 + 2 * len(weights))
                    kernels.pixel_shuffle_mlp_backward(ProjectorBackward(y, a, pre, needs))
    sizes = ("C", "K", "N", "HEIGHT", "WIDTH", "M", "SLAB", "MERGE")
    for kernel, bound, launch in log:
        block = bound.get("BK") or bound.get("BLOCK") or bound["BN"]
        if bound.get("starts") is None and bound.get("pre", 0) is None:
            continue  # the same launch with `pre` is there too
        key = [kernel.__name__]
        key += [(n, v) for n, v in bound.items() if isinstance(v, int) and n.isupper() and n not in sizes]
        key += [n for n, v in bound.items() if v is None]
        key += [
            bound.get(n, 0) % divisor == 0 for n, divisor in (("K", block), ("N", bound.get("BN", 1)), ("C", block))
        ]
        found.setdefault(str(key), launch)
    return found


def test_bulk_copies_bring_large_tiles(newer_gpu, monkeypatch):
    """The same bits as without, of sizes that no tile or step divides: sums kept for a backward, and scattered rows."""
    x, *norm, weights, biases = make(3, (8, 8), 40, (136, 72), 2, 0, torch.bfloat16)
    large = dict(BM=128, BN=128, BK=64, GROUP=8, num_warps=8, num_stages=3)
    monkeypatch.setattr(kernels, "gemm_config", lambda *sizes: large)
    a = Projector(x, *norm, weights, biases, 2, 8, 8, 0, False, 1e-5, None, keep=True)
    results = []
    for bulk in (True, False):
        if not bulk:
            monkeypatch.setattr(kernels, "describable", lambda *operands: False)
        out = torch.zeros(60, 72, dtype=torch.bfloat16)
        with simulated_gpu(check_uninit="strict") as log:
            pre = kernels.pixel_shuffle_mlp_into_(ProjectorInto(out, torch.tensor([40, 0, 17]), a))
        results.append((out, pre))
        linears = [r for r in log if r.kernel == "pixel_shuffle_mlp_linear_kernel"]
        assert len(linears) == 2 and all((r.bulk_load_bytes > 0) == bulk for r in linears)
        assert all(r.shared_races == 0 and r.uninit_shared_reads == 0 for r in linears)
    assert all(map(torch.equal, *results)) and results[0][0].count_nonzero() > 3000


@pytest.mark.parametrize("rows", [False, True], ids=["hidden layer", "scattered rows"])
@pytest.mark.parametrize("target", [90, 100])
def test_two_blocks_share_a_multiprocessor(target, rows):
    """The product of 13 tiles of InternVL3.5-8B: registers, shared memory and, on 100, tensor memory."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, chosen, K, N = empty(13, 1025, 1024), empty(13, dtype=torch.int64), 4096, 4096
    weights, biases = [empty(N, K), empty(N, N)], [empty(N), empty(N)]
    a = Projector(x, empty(K), empty(K), weights, biases, 2, 32, 32, 1, False, 1e-5, None)
    with (
        mock.patch.object(kernels, "capability", lambda tensor: target),
        mock.patch.object(torch, "addmm"),
        aot.compiling(target, make=lambda launch: launch) as log,
    ):
        if rows:
            kernels.pixel_shuffle_mlp_into_(ProjectorInto(empty(3328, N), chosen, a))
        else:
            kernels.pixel_shuffle_mlp(a)
    launch = log[-1]
    assert launch.fn.__name__ == "pixel_shuffle_mlp_linear_kernel" and not launch.constants["IMPLICIT"]
    assert ("starts" in launch.constants) != rows and launch.options["num_stages"] == 3
    compiled, threads = launch.compile(), 32 * launch.options["num_warps"]
    assert machine.blocks(target, threads, compiled.registers, compiled.shared) == 2 and compiled.spills == 0
    assert compiled.count(r"cp\.async\.bulk\.tensor") > 0 and compiled.count(r"cp\.async\.c[ag]\.") == 0
    if target == 100:
        assert 2 * int(re.search(r"tcgen05\.alloc.*, (\d+);", compiled.asm)[1]) <= 512


def test_implicit_only_where_it_wins():
    """Normalising each operand tile again: up to the column tiles that docs count; in 16 bits never on 90 and 100."""
    for target in (80, 90, 100):
        for columns in (128, 256, 257, 1024):
            taken = config.implicit(columns, dict(BN=128), 2, target)
            assert taken == (columns <= 256 and target == 80)
        assert config.implicit(448, dict(BN=64), 4, target) and not config.implicit(449, dict(BN=64), 4, target)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_ahead_of_time(target, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "capability", lambda tensor: 0 if isinstance(target, str) else target)
    for key, (kernel, args, kwargs) in _launches(target, dtype).items():
        linear = kernel.__name__ == "pixel_shuffle_mlp_linear_kernel"
        if dtype == torch.float32 and not linear:
            continue
        compiled = aot.launch(kernel, target, *args, **kwargs).compile()
        assert compiled.spills == 0, key
        assert compiled.shared <= aot.SHARED_LIMIT[target], key
        if linear:
            assert compiled.count(TENSOR_CORE[target]) > 0, key
        if isinstance(target, str):
            assert compiled.count(r"(global|buffer)_load_dwordx4") > 0, key
        elif linear:
            assert compiled.count(r"cp\.async\.(cg|bulk)\.|ld\.global\.v4|ld\.global\.L1") > 0, key
            assert compiled.count(r"st\.global\.v4|st\.global\.v2\.b64") > 0, key
            if not kwargs["IMPLICIT"]:  # there the row statistics are copied, 8 bytes each
                assert compiled.count(r"cp\.async\.ca") == 0, key
        else:
            assert (
                compiled.count(r"ld\.global\.v4\.b32") > 0 and compiled.count(r"ld\.global\.(b16|b8|v2\.b32)") == 0
            ), key
