"""The projector against plain torch, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_kernels.ops import pixel_shuffle_mlp
from ivl_kernels.ops.pixel_shuffle_mlp import cpu
from ivl_kernels.testing import assert_accurate as assert_rule
from ivl_kernels.testing import poisoned
from tests.simulator.gpu import backends

BACKENDS = backends("cpu", "triton", "reference")  # more of Triton in test_pixel_shuffle_mlp_gpu.py
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ISAS = ["portable", "avx2", "avx512"]


def pixel_shuffle(x, scale, order="v2"):
    """As the remote code has it, up to names: x [T, h, w, C]."""
    tiles, h, w, c = x.shape
    x = x.reshape(tiles, h, int(w * scale), int(c / scale)).permute(0, 2, 1, 3)
    x = x.reshape(tiles, int(w * scale), int(h * scale), int(c / scale**2))
    return x.permute(0, 2, 1, 3) if order == "v2" else x


def plain(x, norm_weight, norm_bias, weights, biases, *, merge=2, grid=None, skip=0, order="v2", eps=1e-5, tiles=None):
    """What a model does today, in the dtype of the tensors."""
    x = x if tiles is None else x[tiles]
    side = int((x.shape[1] - skip) ** 0.5)
    h, w = grid or (side, side)
    y = pixel_shuffle(x[:, skip:].reshape(x.shape[0], h, w, -1), 1 / merge, order).flatten(1, 2)
    y = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        y = F.linear(F.gelu(y) if i else y, weight, bias)
    return y


def make(tiles=2, grid=(4, 6), channels=5, widths=(7, 3), merge=2, skip=1, dtype=torch.float32, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0, shift=0.0):
        value = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale + shift).to(dtype)
        return value.requires_grad_(grad)

    features = channels * merge * merge
    x = rand(tiles, skip + grid[0] * grid[1], channels, scale=2.0, shift=0.5)
    norm = rand(features, scale=0.2, shift=1.0), rand(features, scale=0.2)
    sizes = (features, *widths)
    weights = [rand(b, a, scale=a**-0.5) for a, b in zip(sizes, sizes[1:])]
    return x, *norm, weights, [rand(b, scale=0.2) for b in widths]


def assert_accurate(got, truth, same_dtype, what="result"):
    if got.dtype == torch.float64:  # plain torch is the truth itself
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-11, msg=lambda text: f"{what}: {text}")
    else:
        assert_rule(got, truth, same_dtype, what)


def wide(value):
    return [wide(v) for v in value] if isinstance(value, list) else value.detach().double()


def flat(args):
    return [*args[:3], *args[3], *args[4]]


@pytest.fixture(params=[False, True], ids=["own", "library"])
def library(request, monkeypatch):
    """Whose matrix products serve bfloat16 (float16 and float32 use ours, float64 torch's)."""
    monkeypatch.setattr(cpu, "_bfloat16_products", lambda: request.param)


def check(args, backend, *, grads=True, **options):
    dtype = args[0].dtype
    kwargs = {k: v for k, v in options.items() if k != "tile_indices"}
    tiles = options.get("tile_indices")
    truth_args, plain_args = wide(list(args)), [[t.detach().clone() for t in a] if isinstance(a, list) else
                                                a.detach().clone() for a in args]  # fmt: skip
    for tensor in (*flat(truth_args), *flat(plain_args), *flat(args)):
        tensor.requires_grad_(grads)
    with poisoned():
        got = pixel_shuffle_mlp(*args, **options, backend=backend)
    truth, same = plain(*truth_args, **kwargs, tiles=tiles), plain(*plain_args, **kwargs, tiles=tiles)
    assert_accurate(got.detach(), truth.detach(), same.detach())
    if not grads:
        return
    assert got.grad_fn is not None
    upstream = torch.randn(got.shape, dtype=torch.float64).to(dtype)
    truth_grads = torch.autograd.grad(truth, flat(truth_args), upstream.double())
    same_grads = torch.autograd.grad(same, flat(plain_args), upstream)
    with poisoned():
        got_grads = torch.autograd.grad(got, flat(args), upstream)
    for i, (g, t, s) in enumerate(zip(got_grads, truth_grads, same_grads)):
        assert_accurate(g, t, s, f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_native_every_isa(isa, library, dtype):
    check(make(dtype=dtype), "cpu", grid=(4, 6), skip=1)
    # Wider than a panel of columns, a chain of products and a block of the depth, with tails.
    check(make(3, (4, 4), 37, (133, 101, 45), 4, 0, dtype), "cpu", merge=4)


@settings(max_examples=40)
@given(
    tiles=st.integers(1, 4), cells=st.tuples(st.integers(1, 4), st.integers(1, 4)), merge=st.integers(1, 4),
    channels=st.integers(1, 40), widths=st.lists(st.integers(1, 70), min_size=1, max_size=3), skip=st.integers(0, 2),
    order=st.sampled_from(["v1", "v2"]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
    backend=st.sampled_from(["cpu", "reference"]),
)  # fmt: skip
def test_fuzz(tiles, cells, merge, channels, widths, skip, order, dtype, seed, backend):
    grid = cells[0] * merge, cells[1] * merge
    args = make(tiles, grid, channels, widths, merge, skip, dtype, seed)
    chosen = torch.randint(tiles, (3,)) if seed % 2 else None
    options = dict(merge=merge, grid=grid, skip=skip, order=order)
    if chosen is not None:
        options["tile_indices"] = chosen
    # Tiny low-precision sums make "twice plain torch's error" a lottery: gradients there are checked by other tests.
    check(args, backend, grads=dtype in (torch.float32, torch.float64), **options)


@pytest.mark.parametrize("merge, hidden", [(2, (1024, 1024)), (4, (2048, 2048, 1024))], ids=["mlp1", "mlp2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_shape(merge, hidden, dtype):
    """One tile of the 1B model."""
    check(make(1, (32, 32), 1024, hidden, merge, 1, dtype), "cpu", merge=merge, skip=1, grads=merge == 2)


@BACKENDS
@pytest.mark.parametrize("chosen", [False, True])
def test_no_tiles(backend, chosen):
    args = make(2 if chosen else 0, (4, 4), 4, (6, 8), skip=1, grad=True)
    tiles = torch.empty(0, dtype=torch.int64) if chosen else None
    y = pixel_shuffle_mlp(*args, skip=1, tile_indices=tiles, backend=backend)
    assert y.shape == (0, 4, 8)
    for grad, tensor in zip(torch.autograd.grad(y.sum(), flat(args)), flat(args)):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_many_rows():
    """More rows than one chunk of any path holds."""
    check(make(9, (32, 32), 600, (80, 40), 2, 0), "cpu")
    check(make(9, (32, 32), 600, (80, 40), 2, 0, torch.float64), "cpu", grads=False)


def test_wide_rows():
    check(make(1, (8, 8), 3200, (96, 64), 4, 1, torch.bfloat16), "cpu", merge=4, skip=1)


@backends("cpu", "reference")
def test_gradcheck(backend):
    args = make(2, (2, 4), 3, (4, 3), dtype=torch.float64, grad=True)

    def run(*flat):
        return pixel_shuffle_mlp(*flat[:3], flat[3:5], flat[5:], grid=(2, 4), skip=1, backend=backend)

    assert torch.autograd.gradcheck(run, tuple(flat(args)))


@backends("cpu", "reference")
@pytest.mark.parametrize("wanted", range(7))
def test_only_the_gradients_needed(backend, wanted):
    args = make(dtype=torch.float64, grad=True)
    options = dict(grid=(4, 6), skip=1, backend=backend)
    every = torch.autograd.grad(pixel_shuffle_mlp(*args, **options).square().sum(), flat(args))
    for i, tensor in enumerate(flat(args)):
        tensor.requires_grad_(i == wanted)
    (one,) = torch.autograd.grad(pixel_shuffle_mlp(*args, **options).square().sum(), [flat(args)[wanted]])
    torch.testing.assert_close(one, every[wanted])


@BACKENDS
def test_out(backend):
    args = make(4, (4, 4), 4, (6, 8), skip=1)
    chosen = torch.tensor([2, 0])
    expected = pixel_shuffle_mlp(*args, skip=1, tile_indices=chosen, backend=backend)
    starts = torch.tensor([9, 2])
    for target in (torch.zeros(16, 8), torch.zeros(16, 20)[:, 4:12], torch.zeros(16, 16)[:, ::2]):
        got = pixel_shuffle_mlp(
            *args, skip=1, tile_indices=chosen, out=target, out_rows=starts, backend=backend
        )  # fmt: skip
        assert got is target
        wanted = torch.zeros(16, 8)
        wanted[9:13], wanted[2:6] = expected
        torch.testing.assert_close(target, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_out_in_any_order(dtype, library):
    """Tiles larger and smaller than what one product works on."""
    args = make(5, (16, 16), 4, (6, 8), dtype=dtype, skip=0)
    target, starts = torch.zeros(5 * 64, 8, dtype=dtype), torch.tensor([64, 0, 256, 128, 192])
    pixel_shuffle_mlp(*args, out=target, out_rows=starts)
    expected = pixel_shuffle_mlp(*args)
    assert torch.equal(target.view(5, 64, 8)[starts // 64], expected)


@backends("cpu", "reference")
def test_out_gradients(backend):
    args = make(3, (2, 4), 3, (4, 3), dtype=torch.float64, grad=True)
    base = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)

    def run(base, *flat):
        return pixel_shuffle_mlp(
            *flat[:3], flat[3:5], flat[5:], grid=(2, 4), skip=1, tile_indices=torch.tensor([2, 0, 2]), out=base * 1,
            out_rows=torch.tensor([5, 0, 2]), backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (base, *flat(args)))


@pytest.mark.parametrize("view", ["tokens", "tiles", "channels"])
def test_strided_input(view):
    x, *rest = make(3, (4, 4), 6, (5, 4), skip=1)
    big = {"tokens": torch.zeros(3, 17, 9)[..., 2:8], "tiles": torch.zeros(6, 20, 6)[::2, 3:],
           "channels": torch.zeros(3, 17, 12)[..., ::2]}[view].copy_(x)  # fmt: skip
    args = (big, *rest)
    assert torch.equal(pixel_shuffle_mlp(*args, skip=1), pixel_shuffle_mlp(x, *rest, skip=1))
    check(args, "cpu", skip=1)


def test_strided_weights():
    x, nw, nb, weights, biases = make(2, (4, 4), 6, (5, 4), skip=0)
    expected = pixel_shuffle_mlp(x, nw, nb, weights, biases)
    other = [torch.zeros(w.shape[0], w.shape[1] + 3)[:, 1:-2].copy_(w) for w in weights]
    turned = [w.t().contiguous().t() for w in weights]
    twice = [torch.stack([b, b], 1)[:, 1] for b in biases]
    assert torch.equal(pixel_shuffle_mlp(x, nw, nb, other, twice), expected)
    assert torch.equal(pixel_shuffle_mlp(x, nw, nb, turned, biases), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(dtype):
    """GELU far out, rows of equal values, and infinities stay where they are."""
    x, nw, nb, weights, biases = make(1, (4, 4), 4, (6, 8), skip=0, dtype=dtype)
    biases[0] = torch.tensor([-200.0, 200.0, -14.5, 13.9, -1e4, 1e4], dtype=dtype)
    x[0, 0:2] = 3.0
    x[0, 4:6] = 3.0  # the whole first cell: variance 0
    check((x, nw, nb, weights, biases), "cpu", grads=dtype != torch.float16)
    x = x.detach().clone()
    x[0, 15] = float("inf")
    got = pixel_shuffle_mlp(x, nw, nb, weights, biases)
    assert torch.equal(got.isnan(), plain(x, nw, nb, weights, biases).isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_independent_of_threads(dtype):
    args = make(2, (8, 8), 40, (70, 33), skip=0, dtype=dtype, grad=True)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = pixel_shuffle_mlp(*args)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), flat(args))])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@BACKENDS
def test_opcheck(backend):
    x, nw, nb, weights, biases = make(2, (4, 4), 4, (6, 8), skip=1)
    tiles, starts = torch.tensor([1, 0]), torch.tensor([8, 1])
    geometry = (2, 4, 4, 1, False, 1e-5)
    utils = ("test_schema", "test_faketensor")
    for chosen in (None, tiles):
        args = (x, nw, nb, weights, biases, *geometry, chosen, True, backend)
        torch.library.opcheck(torch.ops.ivl.pixel_shuffle_mlp.default, args)
        _, pre = torch.ops.ivl.pixel_shuffle_mlp(*args)
        args = (torch.randn(2, 4, 8), *args[:-1], pre, [True] * 7, backend)
        torch.library.opcheck(torch.ops.ivl.pixel_shuffle_mlp_backward.default, args, test_utils=utils)
    args = (torch.zeros(12, 8), starts, x, nw, nb, weights, biases, *geometry, tiles, True, backend)
    torch.library.opcheck(torch.ops.ivl.pixel_shuffle_mlp_into_.default, args)


def test_compile():
    args = make(2, (4, 4), 4, (6, 8), skip=1, grad=True)

    def run(*flat):
        y = pixel_shuffle_mlp(*flat[:3], flat[3:5], flat[5:], skip=1)
        target = torch.zeros(9, 8)
        pixel_shuffle_mlp(
            *(t.detach() for t in flat[:3]), [t.detach() for t in flat[3:5]], [t.detach() for t in flat[5:]], skip=1,
            tile_indices=torch.tensor([1, 0]), out=target, out_rows=torch.tensor([4, 0]),
        )  # fmt: skip
        return y, target

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(run(*flat(args)), compiled(*flat(args))):
        assert torch.equal(eager, traced)
    grads = torch.autograd.grad(compiled(*flat(args))[0].square().sum(), flat(args))
    for a, b in zip(grads, torch.autograd.grad(run(*flat(args))[0].square().sum(), flat(args))):
        torch.testing.assert_close(a, b)


def test_saved_for_backward():
    """x, the parameters and one tensor the size of the hidden activations."""
    args = make(2, (8, 8), 32, (48, 40), skip=1, grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pixel_shuffle_mlp(*args, skip=1)
    known = {t.data_ptr() for t in flat(args)}
    assert sum(n for p, n in saved.items() if p not in known) == 2 * 16 * 48


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 5)), ValueError, r"x: got float32 \[2, 5\]"),
        (dict(x=torch.zeros(2, 17, 4, dtype=torch.int32)), TypeError, "x: .*expected dtype"),
        (dict(x=torch.zeros(2, 16, 4)), ValueError, "x: got 16 tokens a tile, expected a square number"),
        (dict(grid=(4, 5)), ValueError, "expected 4 x 5 patches"),
        (dict(grid=(2, 8), merge=4), ValueError, r"grid: got 2 x 8, expected multiples of merge"),
        (dict(merge=0), ValueError, "merge: got 0"),
        (dict(skip=-1), ValueError, "skip: got -1"),
        (dict(order="v3"), ValueError, "order: got 'v3'"),
        (dict(norm_weight=torch.zeros(4)), ValueError, r"norm_weight: .*expected shape \[16\]"),
        (dict(norm_bias=torch.zeros(16, dtype=torch.bfloat16)), TypeError, "norm_bias: .*dtype of x"),
        (dict(weights=[]), ValueError, "biases: got 2 for 0 weights"),
        (dict(weights=[torch.zeros(6, 15), torch.zeros(8, 6)]), ValueError, r"weights\[0\]: .*\[F, 16\]"),
        (dict(weights=[torch.zeros(6, 16), torch.zeros(8, 5)]), ValueError, r"weights\[1\]: .*\[F, 6\]"),
        (dict(biases=[torch.zeros(6), torch.zeros(9)]), ValueError, r"biases\[1\]: .*expected shape \[8\]"),
        (dict(biases=[None, None]), TypeError, r"biases\[0\]: got NoneType"),
        (dict(tile_indices=torch.tensor([0, 2])), ValueError, "tile_indices: got values from 0 to 2, expected 0 to 1"),
        (dict(tile_indices=torch.tensor([0], dtype=torch.int32)), TypeError, "tile_indices: .*int64"),
        (dict(out=torch.zeros(9, 8)), ValueError, "out_rows: expected together with out"),
        (dict(out=torch.zeros(9, 7), out_rows=torch.tensor([0, 4])), ValueError, r"out: .*\[M, 8\]"),
        (dict(out=torch.zeros(9, 8), out_rows=torch.tensor([0])), ValueError, r"out_rows: .*\[2\]"),
        (dict(out=torch.zeros(9, 8), out_rows=torch.tensor([0, 6])), ValueError, "out_rows: got values from 0 to 6"),
        (dict(out=torch.zeros(9, 8).half(), out_rows=torch.tensor([0, 4])), TypeError, "out: .*dtype of x"),
    ],
)  # fmt: skip
def test_wrong_input(change, error, message):
    args = dict(zip(("x", "norm_weight", "norm_bias", "weights", "biases"), make(2, (4, 4), 4, (6, 8), skip=1)))
    with pytest.raises(error, match=message):
        pixel_shuffle_mlp(**{"skip": 1, **args, **change})
