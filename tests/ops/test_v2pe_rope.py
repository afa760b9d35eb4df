"""The rotary kernel against transformers' functions, float64 truth, and the counters of the GPU simulator."""

import importlib
import math
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from ivl_kernels.ops import rope_frequencies, v2pe_rope, v2pe_rope_
from ivl_kernels.testing import assert_accurate, poisoned
from tests.simulator.gpu import backends, simulated_gpu

BACKENDS = backends("cpu", "triton", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def layouts(batch, tokens, heads, width, dtype, layout):
    """[B, heads, N, d] in different strides."""
    if layout == "heads first":
        return torch.randn(batch, heads, tokens, width, dtype=dtype)
    if layout == "tokens first":
        return torch.randn(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)
    if layout == "inside a wider tensor":
        return torch.randn(batch, tokens, heads + 3, width + 8, dtype=dtype).transpose(1, 2)[:, 2:-1, :, 8:]
    return torch.randn(batch, width, heads, tokens, dtype=dtype).permute(0, 2, 3, 1)  # columns not adjacent


def make(batch=2, tokens=5, q_heads=4, kv_heads=2, width=64, dtype=torch.float32, rotary=None, layout="tokens first"):
    q = layouts(batch, tokens, q_heads, width, dtype, layout)
    k = layouts(batch, tokens, kv_heads, width, dtype, layout)
    positions = torch.rand(batch, tokens) * 3000
    inv_freq, _ = rope_frequencies(rotary or width, 1e6)
    return q, k, positions, inv_freq


def stock_cos_sin(positions, inv_freq, dtype):
    freqs = positions[..., None].float() * inv_freq
    emb = torch.cat((freqs, freqs), -1)
    return emb.cos().to(dtype), emb.sin().to(dtype)


def plain(q, k, cos, sin, q_weight=None, k_weight=None, eps=EPS):
    """What transformers does, in the dtype of its inputs."""
    for_q, for_k = q, k
    if q_weight is not None:
        norms = [Qwen3RMSNorm(len(w), eps=eps) for w in (q_weight, k_weight)]
        for norm, w in zip(norms, (q_weight, k_weight)):
            del norm.weight
            norm.weight = w
        for_q, for_k = norms[0](q), norms[1](k)
    rotary = cos.shape[-1]
    out = apply_rotary_pos_emb(for_q[..., :rotary], for_k[..., :rotary], cos, sin)
    return [torch.cat((o, x[..., rotary:]), -1) for o, x in zip(out, (for_q, for_k))]


def truth(q, k, cos, sin, q_weight=None, k_weight=None, heads_dim=1):
    q, k, cos, sin = q.double(), k.double(), cos.double(), sin.double()
    weights = [w if w is None else w.double() for w in (q_weight, k_weight)]
    return v2pe_rope(
        q, k, cos=cos, sin=sin, q_weight=weights[0], k_weight=weights[1], eps=EPS, heads_dim=heads_dim,
        rotary_dim=cos.shape[-1], backend="reference",
    )  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "inside a wider tensor", "columns apart"])
def test_given_cos_sin_is_bit_identical(backend, dtype, layout):
    for width, rotary in ((64, 64), (80, 80), (128, 64), (200, 200)):
        q, k, positions, inv_freq = make(width=width, dtype=dtype, rotary=rotary, layout=layout)
        cos, sin = stock_cos_sin(positions, inv_freq, dtype)
        expected = plain(q, k, cos, sin)
        with poisoned():
            got = v2pe_rope(q, k, cos=cos, sin=sin, rotary_dim=rotary, backend=backend)
        for g, e, x in zip(got, expected, (q, k)):
            assert torch.equal(g, e) and g.stride() == torch.empty_like(x).stride()
        into = v2pe_rope_(q, k, cos=cos, sin=sin, rotary_dim=rotary, backend=backend)
        assert into[0] is q and into[1] is k and torch.equal(q, expected[0]) and torch.equal(k, expected[1])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_angles_are_rounded_as_in_the_models(backend, dtype):
    q, k, positions, inv_freq = make(dtype=dtype)
    cos, sin = stock_cos_sin(positions, inv_freq, torch.float32)
    got = v2pe_rope(q, k, cos=cos, sin=sin, backend=backend)
    for g, e in zip(got, plain(q, k, cos.to(dtype), sin.to(dtype))):
        assert torch.equal(g, e)


@BACKENDS
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("width, rotary", [(64, 64), (80, 40), (128, 96)])
def test_in_place_is_the_same_arithmetic(backend, norm, width, rotary):
    q, k, positions, inv_freq = make(width=width, rotary=rotary)
    weights = dict(q_weight=torch.rand(width) + 0.5, k_weight=torch.rand(width) + 0.5) if norm else {}
    cos, sin = stock_cos_sin(positions, inv_freq, torch.float32)
    expected = v2pe_rope(q, k, cos=cos, sin=sin, rotary_dim=rotary, **weights, backend=backend)
    v2pe_rope_(q, k, cos=cos, sin=sin, rotary_dim=rotary, **weights, backend=backend)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


@BACKENDS
@pytest.mark.parametrize("eps", [1e-2, 1e-5])
def test_eps_of_the_norm(backend, eps):
    q, k, positions, inv_freq = make()
    q, k = 0.05 * q, 0.05 * k
    weights = [torch.rand(64) + 0.5 for _ in range(2)]
    cos, sin = stock_cos_sin(positions, inv_freq, torch.float32)
    got = v2pe_rope(q, k, cos=cos, sin=sin, q_weight=weights[0], k_weight=weights[1], eps=eps, backend=backend)
    for x, weight, g, heads in zip((q, k), weights, got, (4, 2)):
        normed = x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
        exact = apply_rotary_pos_emb(normed, normed, cos.double(), sin.double())[0]
        assert g.shape[1] == heads
        torch.testing.assert_close(g.double(), exact, rtol=0, atol=2e-6)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt_oss_half_width_cos_sin(backend, dtype):
    q, k, positions, inv_freq = make(q_heads=8, kv_heads=1, dtype=dtype)
    cos, sin = stock_cos_sin(positions, inv_freq, dtype)
    cos, sin = cos[..., :32], sin[..., :32]
    expected = modeling_gpt_oss.apply_rotary_pos_emb(q, k, cos, sin)
    got = v2pe_rope(q, k, cos=cos, sin=sin, backend=backend)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@BACKENDS
@pytest.mark.parametrize("norm", [False, True])
def test_more_heads_than_a_program_holds_at_once(backend, norm):
    q, k, positions, inv_freq = make(1, 1, 72, 66, 64, torch.bfloat16)
    cos, sin = stock_cos_sin(positions, inv_freq, torch.bfloat16)
    weights = [torch.rand(64).bfloat16() + 0.5 if norm else None for _ in range(2)]
    given = dict(cos=cos, sin=sin, q_weight=weights[0], k_weight=weights[1], eps=EPS)
    got, expected = (v2pe_rope(q, k, **given, backend=b) for b in (backend, "reference"))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@backends("cpu", "triton", "reference")
@settings(max_examples=16)
@given(
    few=st.booleans(), batch=st.integers(0, 2), tokens=st.integers(0, 9), kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3), width=st.sampled_from([2, 6, 64, 80, 128, 200]), partial=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    norm=st.booleans(), rounding=st.sampled_from(["transformers", "float32"]), heads_dim=st.sampled_from([1, 2]),
    table=st.booleans(), shared=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_accurate(
    backend, few, batch, tokens, kv_heads, groups, width, partial, dtype, norm, rounding, heads_dim, table, shared, seed
):
    """few: with the GPU kernel's tiles for few tokens, or with those for many."""
    torch.manual_seed(seed)
    rotary = width // 4 * 2 if partial and width >= 4 else width
    q, k, positions, inv_freq = make(batch, tokens, kv_heads * groups, kv_heads, width, dtype, rotary)
    positions = positions[:1] if shared and batch else positions
    weights = [torch.rand(width).to(dtype) + 0.5 if norm else None for _ in range(2)]
    exact = stock_cos_sin(positions, inv_freq, torch.float32 if rounding == "float32" else dtype)
    angles = (
        dict(cos=exact[0], sin=exact[1], rotary_dim=rotary) if table else dict(positions=positions, inv_freq=inv_freq)
    )
    eager = plain(q, k, *stock_cos_sin(positions, inv_freq, dtype), *weights)
    true = truth(q, k, *exact, *weights)
    turn = (lambda x: x.transpose(1, 2)) if heads_dim == 2 else (lambda x: x)
    kernels = importlib.import_module("ivl_kernels.ops.v2pe_rope.triton") if backend == "triton" else None
    chosen = kernels and (kernels.few_config if few else lambda *sizes: None)
    with poisoned(), mock.patch.object(kernels, "few_config", chosen) if kernels else nullcontext():
        got = v2pe_rope(
            turn(q), turn(k), **angles, q_weight=weights[0], k_weight=weights[1], eps=EPS, heads_dim=heads_dim,
            rounding=rounding, backend=backend,
        )  # fmt: skip
    for name, g, t, e in zip("qk", got, true, eager):
        if g.numel():
            assert_accurate(turn(g), t, e, name)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_instruction_set(isa, dtype):
    for width in (64, 80, 128, 200, 14):
        q, k, positions, inv_freq = make(tokens=21, width=width, dtype=dtype)
        q[0, 0, 0, 0], q[0, 0, 1, 1] = float("inf"), float("nan")
        cos, sin = stock_cos_sin(positions, inv_freq, dtype)
        for got, expected in zip(v2pe_rope(q, k, cos=cos, sin=sin, backend="cpu"), plain(q, k, cos, sin)):
            assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
        w = torch.rand(width).to(dtype)
        for rounding in ("transformers", "float32"):
            options = dict(q_weight=w, k_weight=w, rounding=rounding)
            got = v2pe_rope(k, k, positions, inv_freq, **options, backend="cpu")
            same = v2pe_rope(k, k, positions, inv_freq, **options, backend="reference")
            scale = torch.finfo(dtype).eps * same[0].abs().max()
            assert (got[0] - same[0]).abs().max() <= 2 * scale


@backends("cpu", "triton")
def test_angles_within_one_ulp_of_stock(backend):
    inv_freq, _ = rope_frequencies(32, 1e6)
    starts = [0.0, 300.0, 65000.0, 131000.0]
    positions = torch.cat([start + torch.arange(100) * 0.71875 for start in starts])[None]
    q = torch.zeros(1, 1, positions.shape[1], 32)
    q[..., :16] = 1
    got, _ = v2pe_rope(q, q, positions, inv_freq, backend=backend)
    angles = positions[0][:, None] * inv_freq
    for g, exact, stock in (
        (got[0, 0, :, :16], angles.double().cos(), angles.cos()),
        (got[0, 0, :, 16:], angles.double().sin(), angles.sin()),
    ):
        size = exact.float().abs()
        ulp = (torch.nextafter(size, size + 1) - size).double()
        assert ((g.double() - exact).abs() / ulp).max() <= (0.501 if backend == "cpu" else 0.9)
        assert ((g.double() - stock.double()).abs() / ulp).max() <= 1


@backends("cpu", "triton")
def test_integer_positions_and_scale(backend):
    q, k, _, inv_freq = make(batch=1)
    positions = torch.arange(5)
    got = v2pe_rope(q, k, positions, inv_freq, scale=1.3466, backend=backend)
    cos, sin = stock_cos_sin(positions[None], inv_freq, torch.float32)
    for g, e in zip(got, plain(q, k, cos * 1.3466, sin * 1.3466)):
        torch.testing.assert_close(g, e, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "kind, rope, options",
    [
        ("default", {}, {}),
        ("linear", dict(factor=4.0), dict(factor=4.0)),
        ("dynamic", dict(factor=2.0), dict(factor=2.0, max_positions=512, length=900)),
        ("yarn", dict(factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=256),
         dict(factor=32.0, max_positions=256, truncate=False)),
    ],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(kind, rope, options):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = transformers.Qwen3Config(
        head_dim=64, max_position_embeddings=512, rope_parameters=dict(rope_type=kind, rope_theta=150000.0, **rope)
    )
    rule = Qwen3RotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    expected, factor = rule(config, device="cpu", seq_len=900)
    got, scale = rope_frequencies(64, 150000.0, kind, **options)
    assert torch.equal(got, expected) and scale == factor


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("width, rotary", [(64, 64), (80, 40)])
def test_gradients_match_eager(backend, dtype, norm, width, rotary):
    def run(function, dtype):
        torch.manual_seed(3)
        q, k, positions, inv_freq = make(width=width, rotary=rotary)
        weights = [torch.rand(width) + 0.5 for _ in range(2 if norm else 0)]
        leaves = [x.to(torch.bfloat16 if low else x.dtype).to(dtype).requires_grad_() for x in (q, k, *weights)]
        cos, sin = stock_cos_sin(positions, inv_freq, torch.bfloat16 if low else torch.float32)
        out = function(*leaves[:2], cos.to(dtype), sin.to(dtype), *leaves[2:])
        assert out[0].grad_fn is not None
        into = [torch.randn(2, h, 5, width, dtype=torch.float64).to(torch.bfloat16).to(dtype) for h in (4, 2)]
        return torch.autograd.grad(out, leaves, into)

    def ours(q, k, cos, sin, *weights):
        w = dict(zip(("q_weight", "k_weight"), weights))
        return v2pe_rope(q, k, cos=cos, sin=sin, rotary_dim=rotary, eps=EPS, **w, backend=backend)

    low = dtype == torch.bfloat16
    with poisoned():
        got = run(ours, dtype)
    for g, t, e in zip(got, run(plain, torch.float64), run(plain, dtype)):
        assert_accurate(g, t, e)


@BACKENDS
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_angles_of_one_row_for_all(backend, norm, table):
    """Models give positions, or cos and sin, of one row [1, N] to a batch."""
    q, k, positions, inv_freq = make(batch=3, tokens=70, dtype=torch.float32)
    q, k = q.requires_grad_(), k.requires_grad_()
    one = positions[:1]
    weights = dict(q_weight=torch.rand(64) + 0.5, k_weight=torch.rand(64) + 0.5, eps=EPS) if norm else {}

    def run(positions):
        cos, sin = stock_cos_sin(positions, inv_freq, q.dtype)
        angles, given = ((), dict(cos=cos, sin=sin)) if table else ((positions, inv_freq), {})
        out = v2pe_rope(q, k, *angles, **given, **weights, backend=backend)
        return *out, *torch.autograd.grad(out, (q, k), [torch.ones_like(x) for x in out])

    for got, expected in zip(run(one), run(one.expand(3, -1).contiguous())):
        assert torch.equal(got, expected)


@BACKENDS
@pytest.mark.parametrize("eps", [1e-12, 0.3])
def test_eps_counts(backend, eps):
    q, k, positions, inv_freq = make(dtype=torch.float32)
    q, k = (1e-2 * q).requires_grad_(), (1e-2 * k).requires_grad_()
    weights = [torch.rand(64) + 0.5 for _ in range(2)]
    cos, sin = stock_cos_sin(positions, inv_freq, q.dtype)
    options = dict(cos=cos, sin=sin, q_weight=weights[0], k_weight=weights[1], eps=eps, backend=backend)
    expected = plain(q, k, cos, sin, *weights, eps=eps)
    grads = [torch.randn_like(e) for e in expected]
    right = torch.autograd.grad(expected, (q, k), grads)
    got = v2pe_rope(q, k, **options)
    torch.testing.assert_close(got, tuple(expected), rtol=0, atol=1e-5)
    for g, e in zip(torch.autograd.grad(got, (q, k), grads), right):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(v2pe_rope_(q.clone(), k.clone(), **options), tuple(expected), rtol=0, atol=1e-5)


def test_a_tangent_is_not_dropped():
    q, k, positions, inv_freq = make()
    with pytest.raises(NotImplementedError, match="v2pe_rope: got an input with a tangent"):
        torch.func.jvp(lambda q: v2pe_rope(q, k, positions, inv_freq)[0], (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="v2pe_rope: got an input with a tangent"):
            v2pe_rope(dual, k, positions, inv_freq)
        v2pe_rope(q, k, positions, inv_freq)


@backends("cpu", "reference")
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(backend, norm):
    q, k, positions, inv_freq = make(1, 3, 2, 1, 10, torch.float64)
    weights = [torch.rand(10, dtype=torch.float64) for _ in range(2 if norm else 0)]
    leaves = [x.requires_grad_() for x in (q, k, *weights)]

    def run(q, k, *weights):
        w = dict(zip(("q_weight", "k_weight"), weights))
        return v2pe_rope(q, k, positions, inv_freq, **w, backend=backend)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("norm", [False, True])
def test_saves_no_more_than_eager(norm):
    q, k, positions, inv_freq = make(tokens=40)
    weights = dict(q_weight=torch.ones(64), k_weight=torch.ones(64)) if norm else {}
    q.requires_grad_()
    cos, sin = stock_cos_sin(positions, inv_freq, q.dtype)

    def saved(function):
        storages = {}
        keep = lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = function()
        del out
        return storages

    ours = saved(lambda: v2pe_rope(q, k, cos=cos, sin=sin, **weights))
    eager = saved(lambda: plain(q, k, cos, sin, *weights.values()))
    allowed = {x.untyped_storage().data_ptr() for x in (cos, sin, *([q, k, *weights.values()] if norm else []))}
    assert set(ours) <= allowed
    assert sum(ours.values()) <= sum(eager.values()) + (k.untyped_storage().nbytes() + 512 if norm else 0)


@pytest.mark.parametrize("function", [v2pe_rope, v2pe_rope_])
def test_does_not_depend_on_threads(function):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            q, k, positions, inv_freq = make(tokens=100, dtype=torch.bfloat16)
            w = torch.rand(64).to(torch.bfloat16)
            results.append(function(q, k, positions, inv_freq, q_weight=w, k_weight=w))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@BACKENDS
def test_opcheck(backend):
    q, k, positions, inv_freq = make()
    w = torch.rand(64)
    angles = (positions, inv_freq, False, w, w, 1.0, EPS, 64, 1, True, False)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.ivl.v2pe_rope.default, (q, k, *angles, backend), test_utils=tests)
    torch.library.opcheck(torch.ops.ivl.v2pe_rope_.default, (q, k, *angles, backend), test_utils=tests)
    torch.library.opcheck(
        torch.ops.ivl.v2pe_rope_norm_backward.default, (q, k, q, k, *angles, backend), test_utils=tests
    )


def test_compiles_to_one_graph():
    q, k, positions, inv_freq = make()
    q_weight, k_weight = torch.rand(64), torch.rand(64)
    leaf = q.requires_grad_()

    def run(q, k):
        return v2pe_rope(q, k, positions, inv_freq, q_weight=q_weight, k_weight=k_weight)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for function in (run, compiled):
        leaf.grad = None
        out = function(q, k)
        (out[0].sum() + out[1].square().sum()).backward()
        results = (*out, leaf.grad)
        if function is run:
            expected = results
    for g, e in zip(results, expected):
        assert torch.equal(g, e)

    @torch.no_grad()
    def into(q, k):
        return v2pe_rope_(q * 2, k * 2, positions, inv_freq)

    assert torch.equal(torch.compile(into, fullgraph=True, backend="aot_eager")(q, k)[0], into(q, k)[0])


def test_in_place_refuses_gradients_and_expanded_tensors():
    q, k, positions, inv_freq = make()
    with pytest.raises(RuntimeError, match="requires gradients; use v2pe_rope"):
        v2pe_rope_(q.clone().requires_grad_(), k, positions, inv_freq)
    with pytest.raises(ValueError, match="k: got an expanded tensor"):
        v2pe_rope_(q, k[:, :1].expand(-1, 2, -1, -1), positions, inv_freq)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(q=torch.zeros(2, 5, 64)), ValueError, r"q: got float32 \[2, 5, 64\] on cpu, expected \[B, heads, N, d\]"),
        (dict(q=torch.zeros(2, 4, 5, 63)), ValueError, "q: got head_dim 63, expected an even number"),
        (dict(q=torch.zeros(2, 4, 5, 64, dtype=torch.int32)), TypeError, "q: .*expected dtype"),
        (dict(k=torch.zeros(2, 2, 6, 64)), ValueError, "k: .*expected the batch, tokens and head_dim of q"),
        (dict(k=torch.zeros(2, 2, 5, 64).half()), TypeError, "k: .*expected the dtype of q"),
        (dict(k=None), TypeError, "k: got NoneType, expected a torch.Tensor"),
        (dict(inv_freq=None), ValueError, "got positions, expected positions and inv_freq, or cos and sin"),
        (dict(cos=torch.zeros(2, 5, 64)), ValueError, "got positions, inv_freq, cos, expected"),
        (dict(positions=torch.zeros(3, 5)), ValueError, r"positions: .*expected \[2 or 1, 5, ...\]"),
        (dict(positions=torch.zeros(2, 5).half()), TypeError, "positions: .*expected dtype float32, int32, int64"),
        (dict(positions=torch.zeros(2, 5).requires_grad_()), ValueError, "positions: it requires gradients"),
        (dict(inv_freq=torch.zeros(33)), ValueError, "rotary_dim: got 66, expected an even number up to head_dim 64"),
        (dict(rotary_dim=32), ValueError, r"rotary_dim: got 32, expected 2 \* 32"),
        (dict(inv_freq=torch.zeros(32).double()), TypeError, "inv_freq: .*expected dtype float32"),
        (dict(positions=None, inv_freq=None, cos=torch.zeros(2, 5, 48), sin=torch.zeros(2, 5, 48)), ValueError,
         r"cos, sin: .*expected two of \[B or 1, N, 64 or 32\]"),
        (dict(q_weight=torch.ones(64)), ValueError, "q_weight, k_weight: got one of them"),
        (dict(q_weight=torch.ones(64), k_weight=torch.ones(32)), ValueError, "k_weight: .*expected shape"),
        (dict(q_weight=torch.ones(64), k_weight=torch.ones(64).half()), TypeError, "k_weight: .*the dtype of q"),
        (dict(heads_dim=3), ValueError, "heads_dim: got 3"),
        (dict(rounding="none"), ValueError, "rounding: got 'none'"),
    ],
)  # fmt: skip
def test_wrong_input_writes_nothing(change, error, message):
    q, k, positions, inv_freq = make()
    before = q.clone()
    with pytest.raises(error, match=message):
        v2pe_rope_(**{**dict(q=q, k=k, positions=positions, inv_freq=inv_freq), **change})
    assert torch.equal(q, before)


def _counted(**options):
    q = torch.randn(1, 256, 32, 128).to(torch.bfloat16).transpose(1, 2)
    k = torch.randn(1, 256, 8, 128).to(torch.bfloat16).transpose(1, 2)
    grad = options.pop("grad", False)
    with simulated_gpu() as log, torch.set_grad_enabled(grad):
        out = v2pe_rope(q.requires_grad_(grad), k.requires_grad_(grad), backend="triton", **options)
        if grad:
            log.clear()
            torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    (report,) = log
    return report


def _angles(table):
    positions = torch.arange(256).float()[None]
    inv_freq, _ = rope_frequencies(128, 1e6)
    if not table:
        return dict(positions=positions, inv_freq=inv_freq)
    return dict(zip(("cos", "sin"), stock_cos_sin(positions, inv_freq, torch.bfloat16)))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("table, loads", [(True, 86_100), (False, 87_100)])
def test_gpu_traffic(table, loads, grad):
    report = _counted(**_angles(table), grad=grad)
    assert _warps(report) >= 4 * 132  # of each multiprocessor of an H100
    assert report.global_load_sectors <= loads
    assert report.global_store_sectors == 81_920  # q and k once
    assert report.store_efficiency == 1 and report.load_efficiency > 0.985
    assert report.bank_conflicts == 0
    if table:
        assert sum(report.instructions.values()) <= 1.14 * 256_000  # Liger-Kernel's, in half as many programs


def _warps(report):
    return math.prod(report.grid) * report.block[0] // 32


@pytest.mark.parametrize("norm, limit", [(False, 5.1), (True, 12.0)])
@pytest.mark.parametrize("batch", [1, 64, 65, 130])
def test_a_token_costs_the_same_in_any_batch(batch, norm, limit):
    """Warp instructions for 32 elements."""
    q, k = torch.randn(batch, 32, 1, 128).bfloat16(), torch.randn(batch, 8, 1, 128).bfloat16()
    w = torch.ones(128, dtype=torch.bfloat16) if norm else None
    inv_freq, _ = rope_frequencies(128, 1e6)
    with simulated_gpu() as log:
        v2pe_rope(q, k, torch.full((batch, 1), 3.0), inv_freq, q_weight=w, k_weight=w, backend="triton")
    (report,) = log
    assert report.warp_instructions * 32 <= limit * (q.numel() + k.numel())


@pytest.mark.parametrize("grad", [False, True])
def test_gpu_norm_is_no_further_pass(grad):
    w = torch.ones(128, dtype=torch.bfloat16)
    report = _counted(**_angles(True), q_weight=w, k_weight=w, grad=grad)
    passes = 2 if grad else 1  # the backward reads the gradients and the inputs
    angles, weights = (2_048, 1_024) if grad else (4_096, 8_192)
    assert report.global_load_sectors <= 81_920 * passes + angles + weights
    if not grad:
        assert report.global_store_sectors == 81_920
