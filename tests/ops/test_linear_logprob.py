"""Log-probabilities of a head and their gradients against softmax over whole logits."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ivl_kernels.ops import linear_candidates, linear_ce, linear_kl, linear_logprob
from ivl_kernels.testing import assert_accurate, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "reference"]


def whole(hidden, weight, targets, rows=None, *, bias=None, temperature=1.0, softcap=0.0):
    """All four results with the whole matrix of logits, products in the dtype of the inputs."""
    x = hidden if rows is None else hidden[rows]
    dtype = torch.promote_types(x.dtype, weight.dtype)
    z = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    z = z if z.dtype == torch.float64 else z.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    logp = torch.log_softmax(z, -1)
    entropy = -torch.xlogy(logp.exp(), logp.exp()).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], z.logsumexp(-1), entropy, z.mean(-1)


def operands(tokens, width, vocabulary, dtype=torch.float32, *, rows=None, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    count = tokens if rows is None else rows
    return {
        "hidden": torch.randn(tokens, width, generator=g).to(dtype),
        "weight": (torch.randn(vocabulary, width, generator=g) * scale * width**-0.5).to(dtype),
        "bias": (torch.randn(vocabulary, generator=g) * 0.3).to(dtype),
        "targets": torch.randint(vocabulary, (count,), generator=g),
        "rows": None if rows is None else torch.randperm(tokens, generator=g)[:rows].sort().values,
    }


def run(function, v, grads, **options):
    """Results, then the gradients of hidden, weight and bias."""
    leaves = {k: v[k].detach().requires_grad_() for k in ("hidden", "weight", "bias") if v[k] is not None}
    out = function(leaves["hidden"], leaves["weight"], v["targets"], v["rows"], bias=leaves.get("bias"), **options)
    used = [(o, g.to(o.dtype)) for o, g in zip(out, grads) if g is not None]
    found = torch.autograd.grad([o for o, _ in used], list(leaves.values()), [g for _, g in used])
    return [o.detach() for o in out] + list(found)


def widened(v):
    return {k: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in v.items()}


def check(v, grads, **options):
    forced = {k: options.pop(k) for k in ("backend", "save") if k in options}
    with poisoned():
        got = run(functools.partial(linear_logprob, **forced), v, grads, **options)
    truth, plain = run(whole, widened(v), grads, **options), run(whole, v, grads, **options)
    names = ("logp", "lse", "entropy", "mean", "hidden", "weight", "bias")
    for name, *values in zip(names, got, truth, plain):
        assert_accurate(*values, what=name, factor=2.0 if values[0].numel() > 64 else 8.0)
    return got, truth


def some_grads(count, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=g) for _ in range(4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save", ["nothing", "logits"])
@pytest.mark.parametrize("shape", [(70, 64, 1100), (13, 33, 61), (129, 40, 513)])
def test_every_instruction_set(isa, shape, save, dtype):
    v = operands(*shape, dtype)
    check(v, some_grads(shape[0]), save=save, backend="cpu", temperature=0.7, softcap=15.0)
    v["bias"] = None
    check(v, [some_grads(shape[0])[0], None, None, None], save=save, backend="cpu")


@given(
    tokens=st.integers(1, 40), width=st.integers(1, 70), vocabulary=st.sampled_from([1, 2, 61, 511, 512, 513, 1025]),
    dtype=st.sampled_from(DTYPES), backend=st.sampled_from(BACKENDS), softcap=st.sampled_from([0.0, 5.0]),
    save=st.sampled_from(["auto", "nothing", "logits"]), data=st.data(), seed=st.integers(0, 99),
)  # fmt: skip
def test_odd_shapes(tokens, width, vocabulary, dtype, backend, softcap, save, data, seed):
    count = data.draw(st.integers(1, tokens))
    v = operands(tokens, width, vocabulary, dtype, rows=count, seed=seed)
    grads = some_grads(count, seed)
    grads = [g if data.draw(st.booleans()) or i == 0 else None for i, g in enumerate(grads)]
    check(v, grads, backend=backend, save=save, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_weight_beside_short_hidden_states(backend, dtype):
    v = operands(50, 48, 300, torch.float32)
    v["hidden"] = v["hidden"].to(dtype)
    got, _ = check(v, some_grads(50), backend=backend)
    assert got[4].dtype == dtype and got[5].dtype == torch.float32


def test_exact_with_bfloat16_operands(isa):
    v = operands(256, 256, 5003, torch.bfloat16, scale=3.4)
    found = linear_logprob(v["hidden"], v["weight"], v["targets"], backend="cpu").logp
    exact = whole(v["hidden"].double(), v["weight"].double(), v["targets"])[0]
    assert (found - exact).square().mean().sqrt() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(isa, dtype):
    v = operands(512, 70, 1300, dtype)
    v["bias"] = None
    together = linear_logprob(**v, backend="cpu")
    reversed_rows = torch.arange(511, -1, -1)
    backwards = linear_logprob(
        v["hidden"], v["weight"], v["targets"][reversed_rows], reversed_rows, backend="cpu"
    )  # fmt: skip
    for whole_result, result in zip(together, backwards):
        assert torch.equal(whole_result[reversed_rows], result)
    for row in (0, 3, 200, 511):
        alone = linear_logprob(
            v["hidden"][row : row + 1], v["weight"], v["targets"][row : row + 1], backend="cpu"
        )  # fmt: skip
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", ["nothing", "logits"])
def test_threads_do_not_matter(dtype, save):
    v, threads, results = operands(70, 64, 2100, dtype), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(functools.partial(linear_logprob, save=save), v, some_grads(70)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_count(backend):
    """Neither their hidden states nor rows without a gradient are looked at."""
    v = operands(40, 32, 300, rows=17)
    grads = some_grads(17)
    for g in grads:
        g[5:12] = 0
    clean = run(functools.partial(linear_logprob, backend=backend), v, grads)
    out = torch.ones(40, dtype=torch.bool)
    out[v["rows"]] = False
    v["hidden"][out] = float("nan")
    got = run(functools.partial(linear_logprob, backend=backend), v, grads)
    assert all(torch.equal(a, b) for a, b in zip(clean, got))
    assert not got[4][out].any() and not got[4][v["rows"][5:12]].any()
    if backend == "cpu":  # and what has no gradient is not even multiplied by zero
        v["hidden"][v["rows"][5:12]] = float("nan")
        assert all(torch.equal(a, b) for a, b in zip(clean[4:], run(linear_logprob, v, grads)[4:]))


@pytest.mark.parametrize("rows", [1152, 1153])
def test_as_many_rows_as_a_block_of_words_is_packed_for(rows):
    check(operands(rows, 24, 130), some_grads(rows), backend="cpu", save="nothing")


@pytest.mark.parametrize("save", ["nothing", "logits"])
def test_gradients_of_short_operands_are_rounded_twice_only(save):
    """The gradient of the logits, to 16 bits, and the sum of its products: no worse than that, by more than a tenth."""
    v = operands(256, 96, 1500, torch.bfloat16)
    v["bias"] = None
    grad = torch.rand(256)
    found = run(functools.partial(linear_logprob, save=save, backend="cpu"), v, [grad, None, None, None])[4:]
    x, w = v["hidden"].double(), v["weight"].double()
    dz = F.one_hot(v["targets"], 1500) - (x @ w.t()).softmax(-1)
    dz = dz * grad.double()[:, None]
    for mine, product in zip(found, (lambda d: d @ w, lambda d: d.t() @ x)):
        exact, rounded = product(dz), product(dz.bfloat16().double()).bfloat16().double()
        assert (mine.double() - exact).norm() <= 1.1 * (rounded - exact).norm()


_CALL = """
import sys, torch
from bench.measure import peak_bytes
from ivl_kernels.ops import linear_ce, linear_logprob
kind, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.set_num_threads(2)
x, w = torch.ones(2048, 64, dtype=dtype, requires_grad=True), torch.ones(40000, 64, dtype=dtype, requires_grad=True)
y = torch.arange(2048)
def call():
    loss = linear_ce(x, w, y) if kind == "ce" else linear_logprob(x, w, y, save="nothing").logp.sum()
    return torch.autograd.grad(loss, (x, w))
print(peak_bytes(call) - x.nbytes - w.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not say what a call takes")
@pytest.mark.parametrize("kind, dtype", [("ce", "bfloat16"), ("logprob", "bfloat16"), ("logprob", "float32")])
def test_memory_of_a_call(kind, dtype):
    """Over its gradients, in a fresh process: a fraction of the 328 MB of the logits."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", _CALL, kind, dtype]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=root)
    assert said.returncode == 0, said.stderr[-2000:]
    assert float(said.stdout) < 4 * 2048 * 40000 / 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_twice_gets_both_gradients(backend):
    v = operands(20, 32, 300)
    g = torch.Generator().manual_seed(3)
    v["rows"], v["targets"] = torch.randint(20, (60,), generator=g), torch.randint(300, (60,), generator=g)
    check(v, some_grads(60), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [20.0, 40.0, 100.0])
def test_targets_near_certainty(backend, gap):
    """1 - p keeps its digits where p rounds to 1; log-probabilities far below zero stay finite."""
    weight = torch.zeros(600, 4)
    weight[7, 0] = 1.0
    hidden = torch.tensor([[gap, 0.0, 0.0, 0.0]])
    leaf = weight.clone().requires_grad_()
    found = linear_logprob(hidden, leaf, torch.tensor([7]), backend=backend)
    (grad,) = torch.autograd.grad(found.logp.sum(), leaf)
    rest = 599 * torch.exp(torch.tensor(-gap, dtype=torch.float64))
    expected = rest / (1 + rest) * gap
    assert float(grad[7, 0]) == pytest.approx(float(expected), rel=1e-6, abs=1e-37)
    assert float(found.logp) == pytest.approx(-float(torch.log1p(rest)), rel=1e-6, abs=1e-7) and found.logp <= 0
    low = linear_logprob(hidden, weight, torch.tensor([0]), backend=backend).logp
    assert float(low) == pytest.approx(-gap, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_logits(backend):
    flat = linear_logprob(torch.zeros(1, 3), torch.ones(700, 3), torch.tensor([0]), backend=backend)
    assert float(flat.logp) == pytest.approx(-float(torch.log(torch.tensor(700.0))), rel=1e-6)
    assert float(flat.entropy) == pytest.approx(float(torch.log(torch.tensor(700.0))), rel=1e-6)
    bias = torch.zeros(700)
    bias[5] = float("inf")
    ones = torch.ones(1, 3), torch.zeros(700, 3), torch.tensor([0])
    assert torch.isnan(linear_logprob(*ones, bias=bias, backend=backend).logp).all()
    bias[:600], bias[600:] = -float("inf"), 1e4
    masked = linear_logprob(*ones[:2], torch.tensor([650]), bias=bias, backend=backend)
    expected = float(torch.log(torch.tensor(100.0)))
    assert float(masked.logp) == pytest.approx(-expected, rel=1e-5)
    assert float(masked.entropy) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    v = operands(4, 8, 30, rows=0)
    with poisoned():
        found = run(functools.partial(linear_logprob, backend=backend), v, some_grads(0))
        leaf = v["weight"].clone().requires_grad_()
        loss = linear_ce(v["hidden"], leaf, v["targets"], v["rows"], backend=backend)
        loss.backward()
    assert all(f.numel() == 0 for f in found[:4])
    assert not any(g.any() for g in found[4:]) and found[5].shape == v["weight"].shape
    assert float(loss) == 0 and not leaf.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", [1.0, -0.3])
def test_cross_entropy(backend, dtype, upstream, monkeypatch):
    from ivl_kernels.ops.linear_logprob import cpu

    monkeypatch.setattr(cpu, "CHUNK", 4 * 300 * 33)  # several chunks of rows
    v = operands(150, 48, 300, dtype, rows=101)
    weight = torch.rand(101)
    weight[::7] = 0

    def fused(hidden, w, targets, rows, bias):
        return (linear_ce(hidden, w, targets, rows, weight, bias=bias, backend=backend),)

    def plain(hidden, w, targets, rows, bias):
        logits = F.linear(hidden[rows], w, bias)
        nats = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), targets, reduction="none")
        return ((nats * weight.to(nats.dtype)).sum(),)

    grads = [torch.tensor(upstream)]
    with poisoned():
        got = run(fused, v, grads)
    truth = run(lambda *a, **k: (plain(*a, **k)[0].double(),), widened(v), grads)
    for name, *values in zip(("loss", "hidden", "weight", "bias"), got, truth, run(plain, v, grads)):
        assert_accurate(*values, what=name, factor=2.0 if values[0].numel() > 64 else 8.0)


def test_gradcheck():
    v = operands(6, 5, 9, torch.float64, rows=4)
    leaves = [v[k].requires_grad_() for k in ("hidden", "weight", "bias")]

    def function(hidden, weight, bias, **options):
        return tuple(linear_logprob(hidden, weight, v["targets"], v["rows"], bias=bias, **options))

    for options in ({}, {"softcap": 2.0, "temperature": 0.6, "save": "nothing"}):
        torch.autograd.gradcheck(functools.partial(function, **options), leaves)
        for i in range(4):
            torch.autograd.gradcheck(lambda *a, i=i, o=options: function(*a, **o)[i], leaves)
    weight = torch.tensor([0.3, 0.0, 2.0, 1.0])
    torch.autograd.gradcheck(lambda h, w, b: linear_ce(h, w, v["targets"], v["rows"], weight, bias=b) * 3, leaves)


def test_tied_embeddings_and_only_what_is_needed():
    v = operands(9, 16, 40)
    weight = v["weight"].clone().requires_grad_()
    ids = torch.arange(9)
    loss = linear_logprob(F.embedding(ids, weight), weight, v["targets"]).logp.sum()
    (found,) = torch.autograd.grad(loss, weight)
    exact = v["weight"].double().requires_grad_()
    whole(F.embedding(ids, exact), exact, v["targets"])[0].sum().backward()
    assert torch.allclose(found.double(), exact.grad, atol=1e-5)
    hidden = v["hidden"].requires_grad_()
    loss = linear_logprob(hidden, v["weight"], v["targets"]).logp.sum()
    (alone,) = torch.autograd.grad(loss, hidden)
    again = run(linear_logprob, v | {"bias": None}, [torch.ones(9), None, None, None])[4]
    assert torch.equal(alone, again)


@pytest.mark.parametrize("op", ["ce", "kl"])
@pytest.mark.parametrize("upstream", [1, 2])
def test_twice_through_the_graph(upstream, op):
    """Whoever changes the gradients that he got, as clipping does, does not change the next ones."""
    v = operands(9, 16, 40)
    leaf = v["weight"].requires_grad_()
    if op == "ce":
        loss = linear_ce(v["hidden"], leaf, v["targets"]) * upstream
    else:
        teacher = v["hidden"] + 1, v["weight"].detach()
        loss = linear_kl(v["hidden"], leaf, *teacher, row_weight=torch.ones(9)) * upstream
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    for _ in range(2):
        leaf.grad = None
        loss.backward(retain_graph=True)
        assert torch.equal(first, leaf.grad)
        leaf.grad.mul_(3)
    leaf.grad = None
    loss.backward()
    assert torch.equal(first, leaf.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    v = operands(12, 16, 50)
    grads = some_grads(12)
    expected = run(functools.partial(linear_logprob, backend=backend), v, grads)
    w = dict(v)
    w["weight"] = v["weight"].t().contiguous().t()
    w["hidden"] = torch.stack([v["hidden"]] * 2, -1)[..., 0]
    w["targets"] = torch.stack([v["targets"]] * 2, -1)[:, 0]
    got = run(functools.partial(linear_logprob, backend=backend), w, grads)
    assert all(torch.equal(a, b) for a, b in zip(expected, got))
    shaped = linear_logprob(v["hidden"].view(3, 4, 16), v["weight"], v["targets"], bias=v["bias"], backend=backend)
    assert torch.equal(shaped.logp, expected[0])


def test_opcheck_and_compile():
    v = operands(9, 8, 20, rows=5)
    head = v["hidden"], v["weight"], v["bias"], v["targets"], v["rows"]
    raw = torch.ops.ivl
    found = raw.linear_logprob(*head, 1.0, 0.0, True, "")
    torch.library.opcheck(raw.linear_logprob.default, (*head, 1.0, 0.0, True, ""))
    grad = torch.ones(5)
    torch.library.opcheck(
        raw.linear_logprob_backward.default,
        (grad, None, grad, None, *head, *found[:3], found[4], 1.0, 0.0, True, True, True, ""),
    )
    torch.library.opcheck(raw.linear_ce.default, (*head, grad, 0.0, True, True, False, ""))
    for function in (lambda *a, **k: tuple(linear_logprob(*a, **k)), lambda *a, **k: (linear_ce(*a, **k) * 2,)):
        graph = torch.compile(function, fullgraph=True, backend="aot_eager")
        grads = some_grads(5)[:1] if len(function(v["hidden"], v["weight"], v["targets"], v["rows"])) > 1 else [None]
        grads = grads + [None] * 3 if grads[0] is not None else [torch.tensor(1.0)]
        assert all(torch.equal(a, b) for a, b in zip(run(function, v, grads), run(graph, v, grads)))


def test_autocast():
    v = operands(20, 32, 90)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(linear_logprob, v, some_grads(20))
    half = v | {"hidden": v["hidden"].bfloat16()}
    expected = run(linear_logprob, half, some_grads(20))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, expected))
    assert got[4].dtype == got[5].dtype == torch.float32


def test_candidates():
    v = operands(12, 16, 50, rows=7)
    words = torch.tensor([4, 49, 4])
    found = linear_candidates(v["hidden"], v["weight"], words, v["rows"], bias=v["bias"])
    expected = F.linear(v["hidden"][v["rows"]].double(), v["weight"].double(), v["bias"].double())[:, words]
    assert torch.allclose(found.double(), expected, atol=1e-5) and found.dtype == torch.float32
    alone = linear_candidates(v["hidden"], v["weight"], words, v["rows"][2:3], bias=v["bias"])
    assert torch.equal(alone, found[2:3])
    leaves = [v["hidden"].double().requires_grad_(), v["weight"].double().requires_grad_()]
    torch.autograd.gradcheck(lambda h, w: linear_candidates(h, w, words, v["rows"]), leaves)
    assert linear_candidates(v["hidden"], v["weight"], words[:0]).shape == (12, 0)


class DTensor(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": torch.ones(2, 3).long()}, TypeError, "hidden: got int64"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden: got float32 \[\] .* expected \[..., H\] with H > 0"),
        ({"weight": torch.ones(4, 5)}, ValueError, r"weight: got float32 \[4, 5\] on cpu, expected shape \[V, 3\]"),
        ({"weight": torch.ones(0)}, ValueError, r"weight: got float32 \[0\] .*a sharded parameter is gathered"),
        ({"weight": torch.ones(4, 3).half()}, TypeError, "weight: got float16 .* expected the dtype of hidden"),
        ({"weight": torch.ones(4, 3).as_subclass(DTensor)}, TypeError, "weight: got a DTensor, expected a whole"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: got float32 \[5\] on cpu, expected shape \[4\]"),
        ({"targets": torch.tensor([0, 4])}, ValueError, r"targets: got 4, expected tokens in \[0, 4\)"),
        ({"targets": torch.tensor([-100, 0])}, ValueError, "targets: got -100"),
        ({"targets": torch.tensor([0, 1]).int()}, TypeError, "targets: got int32"),
        ({"targets": torch.tensor([0])}, ValueError, "rows: got None for 2 hidden states and 1 targets"),
        ({"rows": torch.tensor([0, 2])}, ValueError, r"rows: got 2, expected rows of the hidden states in \[0, 2\)"),
        ({"rows": torch.tensor([0])}, ValueError, r"rows: got int64 \[1\] on cpu, expected shape \[2\]"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a finite number > 0"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0, expected a finite number >= 0"),
        ({"save": "x"}, ValueError, "save: got 'x', expected one of 'auto', 'nothing', 'logits'"),
    ],
)
def test_errors(change, error, message):
    arguments = {"hidden": torch.ones(2, 3), "weight": torch.ones(4, 3), "targets": torch.tensor([0, 1])} | change
    with pytest.raises(error, match=message):
        linear_logprob(**arguments)


def test_row_weights_are_constants():
    hidden, weight, targets = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="row_weight: got one that requires gradients"):
        linear_ce(hidden, weight, targets, None, torch.ones(2, requires_grad=True))
    with pytest.raises(TypeError, match="row_weight: got bfloat16"):
        linear_ce(hidden, weight, targets, None, torch.ones(2).bfloat16())
