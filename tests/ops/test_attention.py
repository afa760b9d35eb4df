"""Attention against torch's and transformers' own and float64 truth; sequences of a pack against each other."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from ivl_kernels import _dispatch
from ivl_kernels.ops import attention
from ivl_kernels.ops.attention.op import Attention, AttentionBackward
from ivl_kernels.testing import assert_accurate, poisoned
from tests.simulator.gpu import backends

BACKENDS = backends("cpu", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layouts(tokens, heads, width, dtype, layout):
    """[N, heads, d] in different strides."""
    if layout == "tokens first":
        return torch.randn(tokens, heads, width).to(dtype)
    if layout == "heads first":
        return torch.randn(heads, tokens, width).to(dtype).transpose(0, 1)
    if layout == "inside a fused projection":
        return torch.randn(tokens, 3, heads + 1, width + 8).to(dtype)[:, 1, 1:, 8:]
    return torch.randn(width, heads, tokens).to(dtype).permute(2, 1, 0)  # columns not adjacent


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def make(q_lengths, k_lengths, q_heads=4, kv_heads=2, width=64, dtype=torch.float32, layout="tokens first"):
    q = layouts(sum(q_lengths), q_heads, width, dtype, layout)
    k, v = (layouts(sum(k_lengths), kv_heads, width, dtype, layout) for _ in range(2))
    return q, k, v, offsets(q_lengths), offsets(k_lengths, torch.int64)


def seen(queries, keys, causal, window):
    position = torch.arange(queries)[:, None] + keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        mask &= torch.arange(keys) <= position
    if window:
        mask &= torch.arange(keys) > position - window
    return mask


def plain(q, k, v, cu_q, cu_k, causal=False, window=None, sinks=None, scale=None):
    """A loop over sequences in the dtype of the inputs, as eager attention does it: products, softmax, products."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    results = []
    for i in range(len(cu_q) - 1):
        query = q[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
        key, value = (x[cu_k[i] : cu_k[i + 1]].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        mask = seen(query.shape[1], key.shape[1], causal, window)
        scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
        if sinks is not None:
            sink = sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:2], 1)
            scores = torch.cat((scores, sink), -1)
        weights = scores.softmax(-1)[..., : key.shape[1]]
        weights = torch.where(mask, weights, 0.0)
        results.append((weights @ value).transpose(0, 1))
    return torch.cat(results)


def wide(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


@backends("cpu", "reference")
@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 70)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 2), group=st.sampled_from([1, 2, 3, 8]), width=st.sampled_from([8, 24, 64, 72, 80, 128]),
    dtype=st.sampled_from(DTYPES), causal=st.booleans(), window=st.sampled_from([None, 1, 7, 40]), sinks=st.booleans(),
    layout=st.sampled_from(["tokens first", "heads first", "inside a fused projection", "columns apart"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_accurate(backend, lengths, kv_heads, group, width, dtype, causal, window, sinks, layout, seed):
    torch.manual_seed(seed)
    q_lengths, k_lengths = zip(*lengths)
    inputs = make(q_lengths, k_lengths, kv_heads * group, kv_heads, width, dtype, layout)
    options = dict(
        causal=causal, window=window if causal else None, sinks=torch.randn(kv_heads * group) if sinks else None
    )
    with poisoned():
        got = attention(*inputs, **options, backend=backend)
    assert_accurate(got, plain(*wide(*inputs), **options), plain(*inputs, **options))


SHAPES = {
    "vision": dict(q_lengths=[1025, 300], k_lengths=[1025, 300], q_heads=2, kv_heads=2, width=64),
    "prefill": dict(q_lengths=[700, 1, 33], k_lengths=[700, 1, 33], q_heads=4, kv_heads=2, width=128, causal=True),
    "later turn": dict(q_lengths=[50], k_lengths=[900], q_heads=4, kv_heads=2, width=128, causal=True),
    "decode": dict(q_lengths=[1, 1, 2], k_lengths=[1345, 7, 600], q_heads=4, kv_heads=2, width=128, causal=True),
    "gpt-oss": dict(
        q_lengths=[300, 20], k_lengths=[300, 500], q_heads=8, kv_heads=1, width=64, causal=True, window=128, sinks=True
    ),
    "gpt-oss decode": dict(q_lengths=[1], k_lengths=[1700], q_heads=16, kv_heads=2, width=64, causal=True, sinks=True),
    "odd head": dict(q_lengths=[261], k_lengths=[270], q_heads=3, kv_heads=1, width=80, causal=True),
    "one query, all keys": dict(q_lengths=[1], k_lengths=[1200], q_heads=2, kv_heads=2, width=200),
}


def shape(name, dtype):
    kinds = dict(SHAPES[name])
    options = {key: kinds.pop(key) for key in ("causal", "window") if key in kinds}
    if kinds.pop("sinks", False):
        options["sinks"] = torch.randn(kinds["q_heads"]).to(dtype)
    return make(**kinds, dtype=dtype), options


def gradients(function, inputs, options, dtype):
    """(result, gradients of q, k, v and sinks); the same numbers for each dtype."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs[:3]]
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(dtype).requires_grad_()
    out = function(*leaves, *inputs[3:], **options)
    assert out.grad_fn is not None
    torch.manual_seed(5)
    grad = torch.randn(out.shape).to(inputs[0].dtype).to(dtype)
    leaves += [options["sinks"]] if "sinks" in options else []
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_result_and_gradients(backend, dtype, name):
    inputs, options = shape(name, dtype)
    with poisoned():
        got = gradients(lambda *a, **o: attention(*a, **o, backend=backend), inputs, options, dtype)
    true, eager = gradients(plain, inputs, options, torch.float64), gradients(plain, inputs, options, dtype)
    # Of sinks, and of one query to all keys, luck decides which is nearer: the error is that of a few numbers.
    few = "decode" in name or "one query" in name
    for what, g, t, e in zip(("out", "q", "k", "v", "sinks"), got, true, eager):
        if few and what == "sinks":
            torch.testing.assert_close(g, t.to(dtype))
        else:
            assert_accurate(g, t, e, what, factor=4 if what == "sinks" or (few and what != "out") else 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for name in ("prefill", "decode", "gpt-oss", "odd head"):
        inputs, options = shape(name, dtype)
        got = gradients(lambda *a, **o: attention(*a, **o, backend="cpu"), inputs, options, dtype)
        true, eager = gradients(plain, inputs, options, torch.float64), gradients(plain, inputs, options, dtype)
        for what, g, t, e in zip(("out", "q", "k", "v", "sinks"), got, true, eager):
            few = what == "sinks" or (name == "decode" and what != "out")
            assert_accurate(g, t, e, f"{name} {what}", factor=4 if few else 2)


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
def test_large_scores(backend, causal):
    """Differences far over the range of exp, first small then large and the other way around."""
    q, k, v, cu_q, cu_k = make([600], [600])
    for order in (1, -1):
        ramp = torch.linspace(0.01, 40, 600)[:, None, None]
        inputs = (q, k * (ramp if order == 1 else ramp.flip(0)), v, cu_q, cu_k)
        got = attention(*inputs, causal=causal, backend=backend)
        assert_accurate(got, plain(*wide(*inputs), causal=causal), plain(*inputs, causal=causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries, keys", [(1, 5), (40, 40), (1, 700)])
def test_scores_far_below_zero(isa, queries, keys, dtype):
    """Whatever the scores are, as long as they are numbers: the weights are of their differences."""
    q = torch.full((1, queries, 2, 16), 1e16).to(dtype)
    k = (-1e16 * (1 + torch.arange(keys) / 100))[None, :, None, None].expand(1, keys, 2, 16).to(dtype)
    v = torch.randn(1, keys, 2, 16).to(dtype)
    assert torch.equal(attention(q, k, v), v[:, :1].expand_as(q))


@BACKENDS
@pytest.mark.parametrize("name", SHAPES)
def test_batch_rows_are_sequences(backend, name):
    kinds = SHAPES[name]
    n, m = kinds["q_lengths"][0], kinds["k_lengths"][0]
    inputs, options = shape(name, torch.float32)
    q, k, v = (torch.stack([x[:length], x[:length] * 0.5]) for x, length in zip(inputs, (n, m, m)))
    got = attention(q, k, v, **options, backend=backend)
    for row in range(2):
        alone = attention(q[row], k[row], v[row], **options, backend=backend)
        assert torch.equal(got[row], alone)


@BACKENDS
def test_agrees_with_sdpa_and_gpt_oss(backend):
    q, k, v = (torch.randn(2, heads, 90, 64) for heads in (4, 2, 2))
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    got = attention(*turned, causal=True, scale=0.2, backend=backend)
    torch.testing.assert_close(
        got.transpose(1, 2), scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)
    )
    sinks = torch.randn(4)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    mask = torch.zeros(90, 90).masked_fill(~seen(90, 90, True, 16), -torch.inf)
    expected, _ = eager_attention_forward(module, q, k, v, mask, 0.125)
    got = attention(*turned, causal=True, window=16, sinks=sinks, backend=backend)
    torch.testing.assert_close(got, expected)


@BACKENDS
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(causal=True, window=9, sinks=True)], ids=str)
@pytest.mark.parametrize("lengths", [[5, 130, 1, 300, 17], [2, 1, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_never_see_each_other(backend, options, lengths, dtype):
    """Whatever stands in one sequence, NaN too, the others' results and gradients are the same bits."""
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.randn(4)
    q, k, v, cu_q, cu_k = make(lengths, lengths, dtype=dtype)
    grad = torch.randn(q.shape).to(dtype)

    def run(q, k, v, grad):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, cu_q, cu_k, **options, backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    expected = run(q, k, v, grad)
    for changed in range(len(lengths)):
        inside = slice(int(cu_q[changed]), int(cu_q[changed + 1]))
        for value in (7.0, float("nan"), float("inf")):
            inputs = [x.clone() for x in (q, k, v, grad)]
            for x in inputs:
                x[inside] = value
            for got, same in zip(run(*inputs), expected):
                outside = torch.ones(len(q), dtype=torch.bool)
                outside[inside] = False
                assert torch.equal(got[outside], same[outside])


def test_odd_strides():
    """No pair of bfloat16 starts at a multiple of 4 bytes."""
    q, k, v = (torch.randn(40, 2 * 17 + 1).bfloat16()[:, 1:].unflatten(1, (2, 17))[..., :16] for _ in range(3))
    got = attention(q, k, v, backend="cpu")
    cu = offsets([40])
    assert_accurate(got, plain(*wide(q, k, v), cu, cu), plain(q, k, v, cu, cu))


@BACKENDS
def test_nan_stays_in_its_row(backend):
    q, k, v, cu_q, cu_k = make([40], [40])
    q[3] = float("nan")
    out = attention(q, k, v, cu_q, cu_k, backend=backend)
    assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("sinks", [False, True])
def test_queries_without_keys_give_zeros(backend, sinks):
    q, k, v, cu_q, cu_k = make([40, 3, 0, 30], [25, 0, 4, 30])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = dict(sinks=torch.randn(4)) if sinks else {}
    with poisoned():
        out = attention(q, k, v, cu_q, cu_k, causal=True, **options, backend=backend)
        grads = torch.autograd.grad(out, leaves, torch.randn(out.shape))
    assert not out[:15].any() and not out[40:43].any() and out[15:40].all() and out[43:].all()
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:15].any() and not grads[1][25:29].any() and not grads[2][25:29].any()


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(backend, shape):
    q, k = torch.randn(shape[0], 2, 8, requires_grad=True), torch.randn(shape[1], 1, 8, requires_grad=True)
    out = attention(q, k, k, backend=backend)
    assert out.shape == q.shape and not out.any()
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k))] == [q.shape, k.shape]
    batch = attention(torch.randn(0, 3, 2, 8), torch.randn(0, 4, 2, 8), torch.randn(0, 4, 2, 8), backend=backend)
    assert batch.shape == (0, 3, 2, 8)


@pytest.mark.parametrize("options", [{}, dict(causal=True, window=3, sinks=True)], ids=str)
def test_gradcheck(options):
    q, k, v = (torch.randn(n, heads, 8, dtype=torch.float64) for n, heads in ((6, 2), (7, 1), (7, 1)))
    sinks = [torch.randn(2, dtype=torch.float64)] if "sinks" in options else []
    leaves = [x.requires_grad_() for x in (q, k, v, *sinks)]
    cu_q, cu_k = offsets([2, 4]), offsets([4, 3])
    rest = {key: value for key, value in options.items() if key != "sinks"}

    def run(q, k, v, sinks=None):
        return attention(q, k, v, cu_q, cu_k, sinks=sinks, backend="reference", **rest)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("name", SHAPES)
def test_does_not_depend_on_threads(name):
    before, results = torch.get_num_threads(), []
    inputs, options = shape(name, torch.bfloat16)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(attention, inputs, options, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_saves_no_matrix_of_weights():
    q, k, v, cu_q, cu_k = make([500], [500])
    saved = {}
    keep = lambda t: saved.update({t.untyped_storage().data_ptr(): t}) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = attention(q.requires_grad_(), k, v, cu_q, cu_k)
    given = {x.data_ptr() for x in (q, k, v, cu_q, cu_k, out)}
    assert sum(t.numel() for pointer, t in saved.items() if pointer not in given) == 4 * 500


@BACKENDS
def test_opcheck(backend):
    q, k, v, cu_q, cu_k = make([9, 30], [9, 33])
    q, k, v, sinks = q[None], k[None], v[None], torch.randn(4)
    out, lse = torch.ops.ivl.attention(q, k, v, cu_q, cu_k, sinks, 0.125, True, 5, 0, 0, backend)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for rest in ((cu_q, cu_k, sinks, 0.125, True, 5, 0, 0), (None, None, None, 0.125, False, 0, 0, 0)):
        torch.library.opcheck(torch.ops.ivl.attention.default, (q, k, v, *rest, backend), test_utils=tests)
        args = (out, q, k, v, *rest, out, lse, backend)
        torch.library.opcheck(torch.ops.ivl.attention_backward.default, args, test_utils=tests)


def test_compiles_to_one_graph():
    q, k, v, cu_q, cu_k = make([9, 30], [9, 33])
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4))]

    def run(q, k, v, sinks):
        return attention(q * 2, k, v, cu_q, cu_k, causal=True, window=20, sinks=sinks) + 1

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(q=torch.zeros(9, 64)), ValueError, r"q: got float32 \[9, 64\] on cpu, expected \[N, heads, d\]"),
        (dict(q=torch.zeros(9, 4, 60)), ValueError, "q: got head_dim 60, expected a multiple of 8 up to 256"),
        (dict(q=torch.zeros(9, 4, 264)), ValueError, "q: got head_dim 264"),
        (dict(q=torch.zeros(9, 4, 64, dtype=torch.int32)), TypeError, "q: .*expected dtype"),
        (dict(k=torch.zeros(9, 2, 32)), ValueError, r"k: .*expected shape \[M, key heads, 64\]"),
        (dict(k=torch.zeros(9, 3, 64)), ValueError, "k: got 3 heads, expected a divisor of the 4 heads of q"),
        (dict(k=torch.zeros(9, 2, 64).half()), TypeError, "k: .*expected the dtype of q"),
        (dict(k=None), TypeError, "k: got NoneType, expected a torch.Tensor"),
        (dict(v=torch.zeros(8, 2, 64)), ValueError, r"v: .*expected shape \[9, 2, 64\]"),
        (dict(cu_seqlens_q=offsets([4, 4])), ValueError, r"cu_seqlens_q: got \[0, 4, 8\], .* from 0 to 9"),
        (dict(cu_seqlens_q=torch.tensor([0, 5, 4, 9])), ValueError, "cu_seqlens_q: .*never decrease"),
        (dict(cu_seqlens_q=torch.tensor([1, 9])), ValueError, "cu_seqlens_q: .*from 0"),
        (dict(cu_seqlens_q=offsets([9]).float()), TypeError, "cu_seqlens_q: .*expected dtype int32, int64"),
        (dict(cu_seqlens_q=offsets([9])[None]), ValueError, r"cu_seqlens_q: .*expected shape \[S \+ 1\]"),
        (dict(cu_seqlens_k=offsets([9])), ValueError, "cu_seqlens_q: got None, expected it with cu_seqlens_k"),
        (dict(cu_seqlens_q=offsets([9]), cu_seqlens_k=offsets([4, 5])), ValueError, r"cu_seqlens_k: .*shape \[2\]"),
        (dict(cu_seqlens_q=offsets([4, 5]), cu_seqlens_k=offsets([9, 9])), ValueError, "cu_seqlens_k: got .*to 9"),
        (dict(window=4), ValueError, "window: got 4 with causal=False, expected at least 1, with causal=True"),
        (dict(window=0, causal=True), ValueError, "window: got 0"),
        (dict(sinks=torch.zeros(3)), ValueError, r"sinks: .*expected shape \[4\]"),
        (dict(sinks=torch.zeros(4).half()), TypeError, "sinks: .*expected dtype float32"),
    ],
)  # fmt: skip
def test_wrong_input(change, error, message):
    q, k, v, _, _ = make([9], [9])
    for backend in ("cpu", "reference"):
        with pytest.raises(error, match=message):
            attention(**{**dict(q=q, k=k, v=v, backend=backend), **change})
    with pytest.raises(ValueError, match=r"cu_seqlens_q: .*expected packed \[N, heads, d\]"):
        attention(q[None], k[None], v[None], offsets([9]))


class Flash:
    """Stands in for flash-attn: its two functions by the reference, which also checks how they are called."""

    def __init__(self):
        self.calls = []

    def _flash_attn_varlen_forward(self, q, k, v, cu_q, cu_k, max_q, max_k, **options):
        from ivl_kernels.ops.attention import reference

        self.calls.append("forward")
        assert cu_q.dtype == cu_k.dtype == torch.int32 and options["dropout_p"] == 0
        assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
        window = options["window_size_left"] + 1
        assert options["window_size_right"] == (0 if options["causal"] else -1)
        rest = (options["softmax_scale"], options["causal"], window, 0, 0)
        out, lse = reference.attention(Attention(q[None], k[None], v[None], cu_q, cu_k, None, *rest))
        return out[0], lse, None, None

    def _flash_attn_varlen_backward(self, grad, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, **options):
        from ivl_kernels.ops.attention import reference

        self.calls.append("backward")
        assert options["deterministic"]
        rest = (options["softmax_scale"], options["causal"], options["window_size_left"] + 1, 0, 0)
        a = Attention(q[None], k[None], v[None], cu_q, cu_k, None, *rest)
        found = reference.attention_backward(AttentionBackward(grad[None], a, out[None], lse))
        for to, x in zip((dq, dk, dv), found):
            to.copy_(x[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_what_gpus_run(monkeypatch, dtype, name, packed):
    """All but the fused kernels themselves: offsets, windows, sinks and gradients around a stand-in for flash-attn."""
    from ivl_kernels.ops.attention import gpu, op

    flash = Flash()
    monkeypatch.setattr(gpu, "_flash_attn", lambda: flash)
    for each in (op._attention, op._backward):
        fused = next(i for i in each.implementations if i.backend == "torch")
        monkeypatch.setattr(each, "_usual", {})
        function = each.function(fused)
        monkeypatch.setattr(each, "_chosen", functools.partial(lambda found, *_: found, function))
    inputs, options = shape(name, dtype)
    if dtype == torch.float32 and ("sinks" in options or "window" in options):
        pytest.skip("served by the reference")
    if not packed:
        n, m = (int(cu[1]) for cu in inputs[3:])
        inputs = (*(x[:length] for x, length in zip(inputs, (n, m, m))), offsets([n]), offsets([m]))

    def run(q, k, v, cu_q, cu_k, **options):
        return attention(q, k, v, *((cu_q, cu_k) if packed else ()), **options)

    got = gradients(run, inputs, options, dtype)
    assert flash.calls == ([] if dtype == torch.float32 else ["forward", "backward"])
    true, eager = gradients(plain, inputs, options, torch.float64), gradients(plain, inputs, options, dtype)
    for what, g, t, e in zip(("out", "q", "k", "v", "sinks"), got, true, eager):
        assert_accurate(g, t, e, what, factor=4)  # a sink costs the result one more rounding


def test_torch_takes_these_arguments():
    """torch's own fused kernels run on GPUs only: their schemas at least must bind what they are called with."""
    forward = {a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments}
    backward = {a.name for a in torch.ops.aten._flash_attention_backward.default._schema.arguments}
    assert {"scale", "window_size_left", "window_size_right"} <= forward & backward
    names = [a.name for a in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    assert names[:6] == ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert names[6:14] == ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "rng_state", "unused"]


def test_fused_kernels_need_a_gpu():
    q, k, v, _, _ = make([9], [9], dtype=torch.bfloat16)
    with pytest.raises(_dispatch.BackendError, match="torch"):
        attention(q, k, v, backend="torch")
