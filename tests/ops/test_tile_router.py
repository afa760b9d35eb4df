"""The tile router against the shipped code, and the decision rules against torch.quantile."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivl_kernels import _gpu
from ivl_kernels.ops.tile_router import Attention, Block, Gate, op, reference, select_tiles, tile_router, triton_router
from ivl_kernels.ops.tile_router.op import FewRows, FewRowsTransposed, Pool, PoolBackward
from ivl_kernels.testing import assert_accurate, poisoned
from ivl_kernels.testing.shipped import ShippedRouter, shipped_decision
from tests.simulator import aot
from tests.simulator.gpu import OLD_TRITON, backends, simulated_gpu
from tests.simulator.idle import idle_gpu, no_host_reads

ALL = backends("cpu", "triton", "reference")
CPU = backends("cpu", "reference")
GPU = backends("triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def parameters(router):
    from ivl_kernels.nn import TileRouter

    return TileRouter.from_modules(router.pooling_before_gating, router.gating).parameters_of_op()


def shipped(width=64, heads=4, dtype=torch.float32, gain=4.0):
    """A shipped router whose attentions look at something: larger weights than at initialisation, random biases."""
    router = ShippedRouter(width, heads).eval()
    with torch.no_grad():
        for name, p in router.named_parameters():
            p.copy_(torch.randn_like(p) * 0.1 if "bias" in name else p * (gain if "in_proj" in name else 1.0))
    return router.to(dtype)


def pool_inputs(tiles, rows, width, heads, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tiles, rows, width, generator=generator).to(dtype)
    u = torch.randn(tiles, heads, width, generator=generator) * 2 / width**0.5
    return z, u.to(op.sum_dtype(dtype))


@CPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, heads, tokens, tiles", [(64, 4, 65, 3), (48, 16, 33, 1), (40, 5, 7, 2)])
def test_as_accurate_as_shipped(backend, dtype, width, heads, tokens, tiles):
    z = torch.randn(tiles, tokens + 1, width).to(dtype)
    eager = shipped(width, heads, dtype)
    truth = copy.deepcopy(eager).double()
    with torch.no_grad(), poisoned():
        got = tile_router(z, **parameters(eager), skip=1, backend=backend)
        if dtype == torch.float64:
            torch.testing.assert_close(got, eager(z), rtol=1e-13, atol=0)
        else:
            assert_accurate(got, truth(z.double()), eager(z), factor=4)  # of few numbers, luck decides which is nearer


def test_released_width():
    router = ShippedRouter(1024).eval()
    z = torch.randn(1, 130, 1024)
    with torch.no_grad():
        got = tile_router(z, **parameters(router), skip=1)
        eager = router(z)
        truth = router.double()(z.double())
    assert_accurate(got, truth, eager)


@pytest.mark.parametrize("width", [1024, 3200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_released_widths(width, dtype):
    z, u = pool_inputs(1, 1024, width, 16, dtype)
    truth = reference.tile_pool(Pool(z.double(), u.double()))
    assert_accurate(op._pool(Pool(z, u), "cpu")[0], truth[0], reference.tile_pool(Pool(z, u))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unfolded_is_the_shipped_arithmetic(dtype):
    router = shipped(dtype=dtype)
    z = torch.randn(3, 50, 64).to(dtype)
    with torch.no_grad():
        got = tile_router(z, **parameters(router), skip=1, folded=False)
    tolerance = {"rtol": 0, "atol": 1e-14 if dtype == torch.float64 else 0}
    torch.testing.assert_close(got, router(z).detach(), **tolerance)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    tiles=st.integers(1, 4), rows=st.integers(1, 80), width=st.integers(1, 70), heads=st.integers(1, 20),
    seed=st.integers(0, 99), shared=st.booleans(),
)  # fmt: skip
def test_pool_native(isa, dtype, tiles, rows, width, heads, seed, shared):
    z, u = pool_inputs(tiles, rows, width, heads, dtype, seed)
    if shared:
        u = u[:1].expand(tiles, -1, -1)
    grad = torch.randn(u.shape, dtype=u.dtype)
    wide = torch.zeros(tiles, rows + 2, width + 3, dtype=dtype)
    view = wide[:, 1:-1, 2:-1]
    view.copy_(z)
    with poisoned():
        pooled, lse = op._pool(Pool(view, u), "cpu")
        grad_z, grad_u = op._pool_backward(PoolBackward(Pool(view, u), pooled, lse, grad, True), "cpu")
        none, same = op._pool_backward(PoolBackward(Pool(view, u), pooled, lse, grad, False), "cpu")
    truth = reference.tile_pool(Pool(z.double(), u.double()))
    exact = reference.tile_pool_backward(PoolBackward(Pool(z.double(), u.double()), *truth, grad.double(), True))
    eps = torch.finfo(u.dtype).eps
    for got, want, roundings in (
        (pooled, truth[0], 30 * eps),
        (lse, truth[1], 30 * eps),
        (grad_u, exact[1], 100 * eps),
        (grad_z, exact[0], 100 * eps + torch.finfo(dtype).eps),
    ):
        atol = roundings * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)
    assert none.numel() == 0 and torch.equal(same, grad_u)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(0, 15), groups=st.integers(1, 4), each=st.integers(1, 11), width=st.integers(1, 70),
    seed=st.integers(0, 99), bias=st.booleans(),
)  # fmt: skip
def test_few_rows_native(isa, dtype, rows, groups, each, width, seed, bias):
    generator = torch.Generator().manual_seed(seed)
    sums = op.sum_dtype(dtype)
    w = torch.randn(groups * each, width + 2, generator=generator).to(dtype)[:, 1:-1]
    b = torch.randn(groups * each, generator=generator).to(dtype) if bias else None
    x = torch.randn(rows, groups, width, generator=generator, dtype=sums)
    y = torch.randn(rows, groups, each, generator=generator, dtype=sums)
    with poisoned():
        forward, back = op._linear(FewRows(x, w, b), "cpu"), op._linear_transposed(FewRowsTransposed(y, w), "cpu")
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 3e-5}
    wide = None if b is None else b.double()
    torch.testing.assert_close(
        forward.double(), reference.few_rows_linear(FewRows(x.double(), w.double(), wide)), **tolerance
    )
    torch.testing.assert_close(
        back.double(), reference.few_rows_linear_transposed(FewRowsTransposed(y.double(), w.double())), **tolerance
    )


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tiles, rows, width, heads",
    [
        (2, 37, 40, 4),
        (1, 130, 300, 16),
        (1, 390, 20, 3),
        (1, 20, 1000, 16),
        (2, 33, 1030, 16),
        (1, 20, 48, 17),
        (1, 1, 5, 1),
        (0, 9, 32, 4),
    ],
)
def test_pool_triton(backend, dtype, tiles, rows, width, heads):
    z, u = pool_inputs(tiles, rows + 1, width, heads, dtype)
    z, shared = z[:, 1:], u[:1].expand(tiles, -1, -1)
    grad = torch.randn(u.shape)
    # TF32 keeps 11 bits of what is not in 16 bits already.
    roundings = 3e-5 if dtype == torch.float32 else 5e-3
    for queries in (u, shared):
        truth = reference.tile_pool(Pool(z.double(), queries.double()))
        exact = reference.tile_pool_backward(
            PoolBackward(Pool(z.double(), queries.double()), *truth, grad.double(), True)
        )
        with poisoned():
            pooled, lse = op._pool(Pool(z, queries), backend)
            grad_z, grad_u = op._pool_backward(PoolBackward(Pool(z, queries), pooled, lse, grad, True), backend)
        for got, want in ((pooled, truth[0]), (lse, truth[1]), (grad_u, exact[1]), (grad_z, exact[0])):
            atol = (roundings + torch.finfo(got.dtype).eps) * max([1.0, *want.abs().flatten().tolist()])
            torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, groups, each, width", [(3, 1, 70, 1100), (17, 3, 20, 33), (1, 4, 3, 5), (40, 1, 16, 64), (0, 2, 4, 16)]
)
def test_few_rows_triton(backend, dtype, rows, groups, each, width):
    w, b = torch.randn(groups * each, width).to(dtype), torch.randn(groups * each).to(dtype)
    x, y = torch.randn(rows, groups, width), torch.randn(rows, groups, each)
    with poisoned():
        apart = torch.zeros(len(b), 2, dtype=dtype)[:, 0].copy_(b)  # not contiguous
        forward, back = (
            op._linear(FewRows(x, w, apart), backend),
            op._linear_transposed(FewRowsTransposed(y, w), backend),
        )
        plain = op._linear(FewRows(x, w, None), backend)
    atol = (2e-6 if dtype == torch.float32 else 1e-3) * width**0.5 * 4
    exact = reference.few_rows_linear(FewRows(x.double(), w.double(), b.double()))
    torch.testing.assert_close(forward.double(), exact, rtol=0, atol=atol)
    torch.testing.assert_close(plain.double(), exact - b.double(), rtol=0, atol=atol)
    exact = reference.few_rows_linear_transposed(FewRowsTransposed(y.double(), w.double()))
    torch.testing.assert_close(back.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "dtype, target", [(torch.bfloat16, 80), (torch.float16, 80), (torch.bfloat16, 90), (torch.bfloat16, 100)]
)
def test_triton_router_as_accurate_as_shipped(dtype, target):
    eager = shipped(64, 16, dtype)
    z = torch.randn(2, 41, 64).to(dtype)
    with torch.no_grad(), simulated_gpu(target=target), poisoned():
        got = tile_router(z, **parameters(eager), skip=1, backend="triton")
    with torch.no_grad():
        assert_accurate(got, copy.deepcopy(eager).double()(z.double()), eager(z))


@pytest.mark.parametrize(
    "dtype, width, heads, tiles, tokens, blocks, pooling",
    [
        (torch.bfloat16, 40, 4, 2, 9, 4, 3),  # pooled in three launches, as wide tokens are
        (torch.bfloat16, 272, 16, 17, 20, 1, 1),  # more tiles than a block of rows
        (torch.float16, 64, 16, 1, 300, 0, 1),
        (torch.bfloat16, 48, 3, 2, 5, 5, 1),  # a second launch for the fifth block
    ],
)
def test_triton_router_in_few_launches(dtype, width, heads, tiles, tokens, blocks, pooling, monkeypatch):
    if pooling == 3:
        monkeypatch.setattr(triton_router, "fused", lambda *shape: False)
    p = parameters(shipped(width, heads, dtype))
    p["blocks"] = (p["blocks"] * 2)[:blocks]
    z = torch.randn(tiles, tokens, width).to(dtype)
    exact = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in p.items()}
    exact |= {n: [type(part)(*(t.double() for t in part)) for part in p[n]] for n in ("attentions", "blocks")}
    exact["gate"] = Gate(*(t.double() for t in p["gate"]))
    with torch.no_grad():
        _, truth = tile_router(z.double(), **exact, return_logits=True, backend="reference")
        with simulated_gpu() as log, poisoned():
            probabilities, logits = tile_router(z, **p, return_logits=True, backend="triton")
    assert len(log) == 5 + max(1, -(-blocks // 4)) + 4 * pooling
    torch.testing.assert_close(logits.double(), truth, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(probabilities.float(), logits.softmax(-1), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_triton_router_takes_parameters_that_lie_anyhow():
    p = parameters(shipped(32, 4, torch.bfloat16))
    apart = [t.mT.contiguous().mT if t.dim() == 2 else torch.zeros(len(t), 2).to(t)[:, 0].copy_(t) for t in p["gate"]]
    z = torch.randn(2, 9, 64).to(torch.bfloat16)[..., ::2]
    with torch.no_grad(), simulated_gpu():
        expected = tile_router(z.contiguous(), **p, backend="triton")
        assert torch.equal(tile_router(z, **(p | {"gate": Gate(*apart)}), backend="triton"), expected)


@pytest.mark.parametrize("target", [t for t in aot.TARGETS if isinstance(t, int)])
@pytest.mark.parametrize("width, tiles", [(1024, 13), (3200, 40)])
def test_triton_router_compiles_without_spills(target, width, tiles):
    def empty(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    matrices = ((3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,))
    gating = ((4 * width, width), (4 * width,), (width, 4 * width), (width,), (width,), (width,))
    tensors = [empty(*s) for s in (*matrices * 2, *gating * 4, (width,), (width,), (2, width), (2,))]
    seen = {}

    def compiled(launch):
        if "attend" in launch.key or "gate" in launch.key:  # the pooling's are those of its op
            seen.setdefault(launch.key, launch)

    with _gpu.stand_in("compiler", capability=target), aot.compiling(target, make=compiled):
        triton_router.tile_router(op.Route(empty(tiles, 1024, width), empty(1, width), tensors, 16, 1e-5))
    for launch in seen.values():
        found = launch.compile()
        assert found.spills == 0 and found.shared <= aot.SHARED_LIMIT[target], found.kernel


def test_triton_router_is_few_launches_on_the_host():
    p, z = parameters(shipped(64, 4, torch.bfloat16)), torch.zeros(13, 33, 64, dtype=torch.bfloat16)
    with idle_gpu() as idle, no_host_reads():
        tile_router(z, **p, skip=1)
    assert idle.launches + 1 <= 12  # and the counters' zeros


def test_triton_reads_each_tile_once():
    z, u = pool_inputs(1, 65, 1024, 16, torch.bfloat16)
    z = z[:, 1:]
    with simulated_gpu() as log:
        op._pool(Pool(z, u), "triton")
    pool = log[0]
    assert pool.kernel == "tile_router_pool_kernel"
    read = pool.tensors["z"]
    assert read["load_bytes"] <= 1.05 * z.numel() * 2
    assert read["load_sectors"] * 32 == read["load_bytes"]
    assert pool.store_efficiency == 1
    # A wider tile is read once for the scores (in a backward both kinds at once) and once more for the sums.
    z, u = pool_inputs(1, 32, 3200, 16, torch.bfloat16)
    saved = op._pool(Pool(z, u), "reference")
    with simulated_gpu() as log:
        op._pool(Pool(z, u), "triton")
        op._pool_backward(PoolBackward(Pool(z, u), *saved, torch.randn_like(u), False), "triton")
    assert [r.kernel for r in log] == [
        "tile_router_scores_kernel",
        "tile_router_weights_kernel",
        "tile_router_weighted_sum_kernel",
    ] * 2
    for report in log[::3] + log[2::3]:
        assert report.tensors["z"]["load_bytes"] == z.numel() * 2
        assert report.load_efficiency == 1 and report.store_efficiency == 1
        assert report.bank_conflicts == 0 or OLD_TRITON


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_streams_weights_once(dtype):
    x, w = torch.randn(13, 1, 1024), torch.randn(64, 1024).to(dtype)
    with simulated_gpu() as log:
        op._linear(FewRows(x, w, None), "triton")
        op._linear_transposed(FewRowsTransposed(torch.randn(13, 4, 16), w), "triton")
    assert [r.kernel for r in log] == ["tile_router_linear_kernel", "tile_router_linear_transposed_kernel"]
    for report in log:
        read = report.tensors["w"]
        assert read["load_bytes"] == w.numel() * w.element_size() == read["load_sectors"] * 32
        assert report.store_efficiency == 1 and (report.bank_conflicts == 0 or OLD_TRITON)


def test_pool_large_scores_and_nan():
    for backend in ("cpu", "reference"):
        z, u = pool_inputs(2, 300, 33, 5, torch.float32)
        got = op._pool(Pool(z, u * 1000), backend)[0]
        torch.testing.assert_close(
            got.double(), reference.tile_pool(Pool(z.double(), (u * 1000).double()))[0], rtol=0, atol=5e-4
        )
        z[1, 17, 3] = torch.nan
        pooled = op._pool(Pool(z, u), backend)[0]
        assert pooled[0].isfinite().all() and pooled[1].isnan().all()


def test_same_bits_for_any_thread_count():
    router = shipped(128, 16)
    z = torch.randn(3, 200, 128)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        with torch.no_grad():
            results.append(tile_router(z, **parameters(router), backend="cpu"))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_no_tiles():
    p = parameters(shipped())
    assert tile_router(torch.zeros(0, 10, 64), **p, skip=1).shape == (0, 2)


def test_weights_are_never_cached():
    router = shipped()
    z = torch.randn(2, 20, 64)
    with torch.no_grad():
        tile_router(z, **parameters(router))
        for p in router.parameters():
            p.mul_(1.1)
        torch.testing.assert_close(tile_router(z, **parameters(router)), router(z, skip=0))


def flat_parameters(router):
    """Names and tensors of the parameters that are used, and a function that calls the op with replacements."""
    p = parameters(router)
    fields = [p["query"], *p["attentions"][0], *p["attentions"][1]]
    for block in p["blocks"]:
        fields += block
    fields += p["gate"]

    def call(z, *tensors, **kwargs):
        rest = list(tensors)
        take = lambda n: tuple(rest.pop(0) for _ in range(n))  # noqa: E731
        (query,), attentions = take(1), [take(6), take(6)]
        blocks, gate = [take(6) for _ in p["blocks"]], take(4)
        return tile_router(
            z, query, [Attention(*a) for a in attentions], [Block(*b) for b in blocks], Gate(*gate),
            heads=p["heads"], eps=p["eps"], **kwargs,
        )  # fmt: skip

    return fields, call


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_as_shipped(backend, dtype):
    width, tokens = (32, 20) if backend == "triton" else (64, 40)
    eager = shipped(width, 4, dtype)
    truth = copy.deepcopy(eager).double()
    z = torch.randn(2, tokens, width).to(dtype)
    weight = torch.randn(2, 2).to(dtype)

    def gradients(p, z, weight):
        (p * weight).sum().backward()
        return z.grad

    exact_z = gradients(truth(x := z.double().requires_grad_(), skip=0), x, weight.double())
    exact = {n: p.grad for n, p in truth.named_parameters()}
    plain_z = gradients(eager(x := z.clone().requires_grad_(), skip=0), x, weight)
    plain = {n: p.grad for n, p in eager.named_parameters()}
    eager.zero_grad()
    p = tile_router(x := z.clone().requires_grad_(), **parameters(eager), backend=backend)
    assert p.grad_fn is not None
    got_z = gradients(p, x, weight)
    assert_accurate(got_z, exact_z, plain_z, "z", factor=4)
    for name, parameter in eager.named_parameters():
        if any(f"{kind}{i}" in name for kind in ("attn", "norm") for i in (3, 4)):
            assert parameter.grad is None, name
        else:
            assert_accurate(parameter.grad, exact[name], plain[name], name, factor=4)


@CPU
def test_gradcheck(backend):
    router = shipped(8, 2, torch.float64, gain=1.0)
    fields, call = flat_parameters(router)
    z = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)

    def run(z, *tensors):
        return call(z, *tensors, skip=1, return_logits=True, backend=backend)

    assert torch.autograd.gradcheck(run, (z, *fields), fast_mode=True)


@CPU
def test_gradcheck_of_each_op(backend):
    z, u = (t.requires_grad_() for t in pool_inputs(2, 5, 6, 3, torch.float64))
    assert torch.autograd.gradcheck(lambda z, u: op.pool(op.Pool(z, u), backend).pooled, (z, u))
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 5), (6, 5), (6,)))
    assert torch.autograd.gradcheck(lambda x, w, b: op.linear(op.FewRows(x, w, b), backend), (x, w, b))
    y = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: op.linear_transposed(op.FewRowsTransposed(*a), backend), (y, w))


@ALL
def test_pool_backward_of_strided_gradients(backend):
    z, u = pool_inputs(2, 20, 32, 4, torch.float32)
    pooled, lse = reference.tile_pool(Pool(z, u))
    backward, grad = torch.ops.ivl.tile_pool_backward, torch.randn_like(u)
    expected = backward(z, u, pooled, lse, grad, True, backend)
    got = backward(z, u, pooled.mT.contiguous().mT, lse.t().contiguous().t(), grad.mT.contiguous().mT, True, backend)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


@ALL
def test_opcheck(backend):
    z, u = pool_inputs(2, 20, 32, 4, torch.float32)
    pooled, lse = reference.tile_pool(Pool(z, u))
    ops = torch.ops.ivl
    torch.library.opcheck(ops.tile_pool.default, (z, u, backend))
    for need in (True, False):
        args = (z, u, pooled, lse, torch.randn_like(u), need, backend)
        torch.library.opcheck(ops.tile_pool_backward.default, args)
    w = torch.randn(16, 32)
    torch.library.opcheck(ops.few_rows_linear.default, (torch.randn(3, 2, 32), w, torch.randn(16), backend))
    torch.library.opcheck(ops.few_rows_linear_transposed.default, (torch.randn(3, 2, 8), w, backend))


@CPU
@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch.quantile breaks a compiled graph before torch 2.12")
@pytest.mark.parametrize("skip", [0, 1])
def test_compiles_whole(backend, skip):
    router = shipped()
    fields, call = flat_parameters(router)
    z = torch.randn(2, 20, 64, requires_grad=True)

    def run(z, *tensors):
        p, logits = call(z, *tensors, skip=skip, return_logits=True, backend=backend)
        return p, logits, select_tiles(p[:, 0], relative_threshold=0.5, absolute_threshold=0.1)

    plain = run(z, *fields)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(z, *fields)
    for a, b in zip(plain, compiled):
        torch.testing.assert_close(a, b)
    expected = torch.autograd.grad(plain[1].square().sum(), (z, *fields))
    got = torch.autograd.grad(compiled[1].square().sum(), (z, *fields))
    for a, b in zip(expected, got):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_draws_as_shipped():
    router = shipped().train()
    z = torch.randn(2, 20, 64)
    for folded in (True, False):
        torch.manual_seed(3)
        expected = router(z, skip=0)
        torch.manual_seed(3)
        torch.testing.assert_close(tile_router(z, **parameters(router), folded=folded), expected)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(z=torch.zeros(2, 64)), ValueError, "z: got float32"),
        (dict(z=torch.zeros(2, 9, 64, dtype=torch.int64)), TypeError, "z: .*expected dtype"),
        (dict(z=torch.zeros(2, 9, 32)), ValueError, "heads: got 5|query: .*expected shape"),
        (dict(z=torch.zeros(2, 9, 64, dtype=torch.bfloat16)), TypeError, "query: .*expected the dtype of z"),
        (dict(skip=9), ValueError, "skip: got 9"),
        (dict(skip=-1), ValueError, "skip: got -1"),
        (dict(heads=5), ValueError, "heads: got 5, expected a divisor of the width 64"),
        (dict(attentions=[]), ValueError, "attentions: got 0, expected 2"),
        (dict(query=[1.0]), TypeError, "query: got list"),
        (dict(folded=False, backend="cpu"), RuntimeError, "folded=False"),
    ],
)
def test_wrong_input(change, error, message):
    p = parameters(shipped())
    with pytest.raises(error, match=message):
        tile_router(**{**p, "z": torch.zeros(2, 9, 64), **change})


# ---- decisions ----

scores_of = st.lists(
    st.sampled_from([0.1, 0.25, 0.5, 0.9, 0.98046875, 0.98828125, 0.9961, 1.0]), min_size=1, max_size=20
)


@given(values=scores_of, q=st.sampled_from([0.0, 0.1, 0.5, 0.73, 1.0]), a=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
       dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_released_rule(values, q, a, dtype):
    scores = torch.tensor(values).to(dtype)
    expected = shipped_decision(torch.stack([scores, 1 - scores], 1), q, a)
    together = torch.zeros(len(values), dtype=torch.int64)
    assert torch.equal(select_tiles(scores, relative_threshold=q, absolute_threshold=a), expected)
    assert torch.equal(select_tiles(scores, relative_threshold=q, absolute_threshold=a, groups=together), expected)


def test_threshold_is_rounded_to_the_scores():
    scores = torch.tensor([0.9961, 0.9922, 0.9883, 0.9805], dtype=torch.bfloat16)
    assert select_tiles(scores, relative_threshold=0.5, absolute_threshold=0.0).sum() == 1
    assert select_tiles(scores.float(), relative_threshold=0.5, absolute_threshold=0.0).sum() == 2
    many = select_tiles(scores.repeat(2), relative_threshold=0.5, absolute_threshold=0.0, groups=torch.arange(8) // 4)
    assert many.view(2, 4).sum(1).tolist() == [1, 1]


@given(
    values=scores_of, q=st.sampled_from([0.0, 0.3, 0.5, 1.0]), seed=st.integers(0, 99),
    rule=st.sampled_from(["released", "older"]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_groups_do_not_see_each_other(values, q, seed, rule, dtype):
    scores = torch.tensor(values).to(dtype)
    groups = torch.randint(-2, 3, (len(values),), generator=torch.Generator().manual_seed(seed))
    got = select_tiles(scores, relative_threshold=q, absolute_threshold=0.5, rule=rule, groups=groups)
    for g in groups.unique():
        alone = select_tiles(scores[groups == g], relative_threshold=q, absolute_threshold=0.5, rule=rule)
        assert torch.equal(got[groups == g], alone)


def test_older_rule_and_single_tile():
    one = torch.tensor([0.9])
    assert not select_tiles(one, relative_threshold=0.5, absolute_threshold=0.5).any()
    assert select_tiles(one, relative_threshold=0.5, absolute_threshold=0.5, rule="older").all()
    ties = torch.full((4,), 0.5)
    assert not select_tiles(ties, relative_threshold=0.5, absolute_threshold=0.5).any()
    assert not select_tiles(ties, relative_threshold=0.5, absolute_threshold=0.5, rule="older").any()
    assert select_tiles(ties, relative_threshold=0.5, absolute_threshold=0.4, rule="older").all()


@given(values=scores_of, budget=st.integers(64, 5200), seed=st.integers(0, 99))
def test_budget(values, budget, seed):
    scores = torch.tensor(values)
    n = len(values)
    if budget < 64 * n:
        with pytest.raises(ValueError, match=f"budget: got {budget} tokens for {n} tiles"):
            select_tiles(scores, budget=budget)
        return
    got = select_tiles(scores, budget=budget)
    tokens = 256 * n - 192 * int(got.sum())
    assert tokens <= budget and (not got.any() or tokens + 192 > budget)
    best = sorted(range(n), key=lambda i: (-values[i], i))[: int(got.sum())]
    assert sorted(best) == got.nonzero().squeeze(1).tolist()
    groups = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))
    each = select_tiles(scores, budget=max(budget, 1280), groups=groups)
    for g in groups.unique():
        inside = groups == g
        assert torch.equal(each[inside], select_tiles(scores[inside], budget=max(budget, 1280)))


def test_nan_scores():
    scores = torch.tensor([0.9, torch.nan, 0.1, 0.8])
    assert not select_tiles(scores, relative_threshold=0.1, absolute_threshold=0.0).any()
    got = select_tiles(scores, relative_threshold=0.1, absolute_threshold=0.0, groups=torch.tensor([0, 0, 1, 1]))
    assert got.tolist() == [False, False, False, True]
    assert select_tiles(scores, budget=3 * 64 + 256).tolist() == [True, False, True, True]


def test_mask_and_empty():
    mask = torch.tensor([True, False])
    got = select_tiles(None, mask=mask)
    assert torch.equal(got, mask) and got.data_ptr() != mask.data_ptr()
    assert select_tiles(torch.zeros(0), relative_threshold=0.5, absolute_threshold=0.5).shape == (0,)
    assert select_tiles(torch.zeros(0), budget=0).shape == (0,)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(), ValueError, "got none, expected one of thresholds, budget and mask"),
        (dict(budget=9999, mask=torch.zeros(3).bool()), ValueError, "got budget and mask"),
        (dict(relative_threshold=0.5), ValueError, "absolute_threshold: got None"),
        (dict(absolute_threshold=0.5), ValueError, "relative_threshold: got None"),
        (dict(relative_threshold=1.5, absolute_threshold=0.5), ValueError, "relative_threshold: got 1.5"),
        (dict(relative_threshold=0.5, absolute_threshold=0.5, rule="new"), ValueError, "rule: got 'new'"),
        (dict(mask=torch.zeros(2).bool()), ValueError, r"mask: .*expected shape \[3\]"),
        (dict(mask=torch.zeros(3)), TypeError, "mask: .*expected dtype bool"),
        (dict(budget=999, groups=torch.zeros(3)), TypeError, "groups: .*expected dtype int64"),
        (dict(budget=999, groups=torch.zeros(2).long()), ValueError, "groups: .*expected shape"),
        (dict(budget=999, tokens=(64, 256)), ValueError, "tokens: got"),
        (dict(budget=999, scores=None), TypeError, "scores: got None"),
    ],
)
def test_wrong_decision_input(change, error, message):
    with pytest.raises(error, match=message):
        select_tiles(**{"scores": torch.rand(3), **change})


AOT_SHAPES = [
    (13, 1024, 1024, torch.bfloat16),
    (2, 1024, 1024, torch.float32),
    (5, 1024, 3200, torch.bfloat16),
    (5, 1024, 3200, torch.float16),
]


@pytest.mark.parametrize("target", [80, 90, 100, 120, "gfx942"])
def test_triton_compiles_for(target, monkeypatch):
    aot = pytest.importorskip("tests.simulator.aot")
    from ivl_kernels.ops.tile_router import triton as kernels

    number = 0 if target == "gfx942" else target
    monkeypatch.setattr(kernels, "capability", lambda tensor: number)
    if not number:
        monkeypatch.setattr(kernels, "precision", lambda dtype: "ieee")
    with aot.compiling(target) as log:
        for tiles, rows, width, dtype in AOT_SHAPES:
            z = torch.empty(tiles, rows + 1, width, dtype=dtype, device="meta")[:, 1:]
            u = torch.empty(tiles, 16, width, device="meta")
            pooled, lse = kernels.tile_pool(Pool(z, u))
            kernels.tile_pool_backward(PoolBackward(Pool(z, u), pooled, lse, torch.empty_like(u), True))
            w = torch.empty(4 * width, width, dtype=dtype, device="meta")
            kernels.few_rows_linear(FewRows(torch.empty(tiles, 1, width, device="meta"), w, w[:, 0]))
            kernels.few_rows_linear_transposed(
                FewRowsTransposed(torch.empty(tiles, 16, width // 16, device="meta"), w[:width])
            )
    used = {
        "tile_router_scores_kernel",
        "tile_router_weights_kernel",
        "tile_router_weighted_sum_kernel",
        "tile_router_linear_kernel",
        "tile_router_linear_transposed_kernel",
    }
    if number:
        used |= {"tile_router_pool_kernel", "tile_router_combine_kernel"}
    assert {c.kernel for c in log} == used
    for compiled in log:
        assert compiled.shared <= aot.SHARED_LIMIT[target], compiled.kernel
        assert compiled.spills <= aot.SPILL_LIMIT, (compiled.kernel, compiled.spills)


@pytest.mark.parametrize("target", [86, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tiles_do_not_spill(target, dtype):
    aot = pytest.importorskip("tests.simulator.aot")
    from ivl_kernels.ops.tile_router import triton as kernels

    with aot.compiling(target) as log:
        for tiles, width in [(20, 1024), (40, 1024), (40, 3200)]:
            w = torch.empty(width, width, dtype=dtype, device="meta")
            kernels.few_rows_linear(FewRows(torch.empty(tiles, 1, width, device="meta"), w, w[:, 0]))
            kernels.few_rows_linear_transposed(FewRowsTransposed(torch.empty(tiles, 16, width // 16, device="meta"), w))
    assert len(log) == 6
    for compiled in log:
        assert compiled.shared <= aot.SHARED_LIMIT[target], compiled.kernel
        assert compiled.spills <= aot.SPILL_LIMIT, (compiled.kernel, compiled.spills)
