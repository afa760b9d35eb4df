"""The divergence between two heads against softmax over whole logits."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivl_kernels import _cpu
from ivl_kernels.ops import linear_kl
from ivl_kernels.testing import assert_accurate, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "reference"]


def operands(tokens, widths, vocabulary, dtype=torch.float32, *, rows=None, apart=0.3, seed=0):
    """Heads of two widths whose distributions are alike: the wider teacher has the student's features among its own."""
    g = torch.Generator().manual_seed(seed)
    width, teacher_width = widths
    hidden = torch.randn(tokens, width, generator=g)
    weight = torch.randn(vocabulary, width, generator=g) * 3 * width**-0.5
    teacher_hidden = torch.randn(tokens + 3, teacher_width, generator=g) * apart
    teacher_weight = torch.randn(vocabulary, teacher_width, generator=g) * apart
    shared = min(widths)
    teacher_hidden[:tokens, :shared] += hidden[:, :shared]
    teacher_weight[:, :shared] += weight[:, :shared]
    chosen = torch.randperm(tokens, generator=g)[: tokens if rows is None else rows]
    tensors = [t.to(dtype) for t in (hidden, weight, teacher_hidden, teacher_weight)]
    return [*tensors, chosen, chosen.clone()]


def whole(hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows, row_weight=None, *, temperature=1.0):
    def log_softmax(x, w):
        z = x @ w.t()
        return torch.log_softmax((z if z.dtype == torch.float64 else z.float()) / temperature, -1)

    log_p, log_q = log_softmax(hidden[rows], weight), log_softmax(teacher_hidden[teacher_rows], teacher_weight)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return kl if row_weight is None else (kl * row_weight.to(kl.dtype)).sum()


def run(function, v, grad, *args, **options):
    leaves = [t.detach().requires_grad_() for t in v[:2]]
    out = function(*leaves, *v[2:], *args, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def widened(v):
    return [t.double() if t.is_floating_point() else t for t in v]


def check(v, grad, *args, backend, **options):
    with poisoned():
        got = run(functools.partial(linear_kl, backend=backend), v, grad, *args, **options)
    truth, plain = run(whole, widened(v), grad, *args, **options), run(whole, v, grad, *args, **options)
    few = got[0].numel() <= 64
    # A divergence is what is left of logits and log-sums, however small it is itself: a floor of their rounding.
    hidden, weight, teacher_hidden, teacher_weight = widened(v)[:4]
    logits = max(float((x @ w.t()).abs().max()) for x, w in ((hidden, weight), (teacher_hidden, teacher_weight)))
    rounding = torch.finfo(torch.float32).eps * (logits + math.log(len(weight)))
    rounding *= float(args[0].abs().sum()) if args else 1.0
    if not few or float((got[0].double() - truth[0]).abs().max()) > rounding:
        assert_accurate(got[0], truth[0], plain[0], what="kl", factor=8.0 if few else 2.0)
    # p - q inherits the rounding of the logits in proportion to p, however small it is itself: a floor of such a size.
    norms = [float(t.float().norm(dim=1).max()) for t in v[:2]]
    size = (1 + norms[0] * norms[1]) * max(norms) * float(grad.abs().max())
    unit = 2 * torch.finfo(torch.float32).eps * size
    for name, mine, exact, other in zip(("hidden", "weight"), got[1:], truth[1:], plain[1:]):
        floor = 2 * torch.finfo(mine.dtype).eps * exact.abs().max()
        allowed = 2 * (other.double() - exact).abs().max() + floor + unit * exact.new_tensor(max(1.0, len(v[4])) ** 0.5)
        assert mine.dtype == other.dtype and (mine.double() - exact).abs().max() <= allowed, name


@given(
    tokens=st.integers(1, 40), widths=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    vocabulary=st.sampled_from([2, 61, 511, 512, 513, 1100]), dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(BACKENDS), temperature=st.sampled_from([1.0, 0.7]), weighted=st.booleans(),
    isa=st.sampled_from(["", "portable", "avx2", "avx512"]), data=st.data(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(tokens, widths, vocabulary, dtype, backend, temperature, weighted, isa, data, seed):
    v = operands(tokens, widths, vocabulary, dtype, rows=data.draw(st.integers(1, tokens)), seed=seed)
    grad = torch.randn(len(v[4]), generator=torch.Generator().manual_seed(seed))
    module = _cpu.module()
    before = module.cpu_features()["isa"]
    try:
        if isa:
            module.set_isa(isa)
        if weighted:
            check(v, torch.tensor(0.7), grad.abs(), backend=backend, temperature=temperature)
        else:
            check(v, grad, backend=backend, temperature=temperature)
    except ValueError as error:
        assert "isa" in str(error) or "instruction" in str(error), error
    finally:
        module.set_isa(before)


def test_several_chunks_of_rows(monkeypatch):
    from ivl_kernels.ops.linear_logprob import cpu

    monkeypatch.setattr(cpu, "CHUNK", 4 * 300 * 33)
    check(operands(120, (48, 32), 300), torch.tensor(1.0), torch.rand(120), backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_distributions(backend):
    """The gradient of nearly equal distributions is as good as the rounding of the logits allows."""
    hidden, weight, *_, rows, _ = operands(30, (32, 32), 400)
    v = [hidden, weight, hidden * (1 + 1e-3), weight, rows, rows]
    got, truth = run(functools.partial(linear_kl, backend=backend), v, torch.ones(30)), run(
        whole, widened(v), torch.ones(30)
    )  # fmt: skip
    for mine, exact in zip(got[1:], truth[1:]):
        assert (mine - exact).norm() < 3e-3 * exact.norm()
    same = [hidden, weight, hidden, weight, rows, rows]
    kl, dx, dw = run(functools.partial(linear_kl, backend=backend), same, torch.ones(30))
    assert (kl >= 0).all() and kl.max() < 1e-5 and dx.abs().max() < 1e-6 and dw.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_other_rows_do_not_matter(dtype):
    v = operands(200, (48, 64), 1300, dtype)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(linear_kl, v, torch.ones(200)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    alone = linear_kl(*v[:4], v[4][5:6], v[5][5:6])
    assert torch.equal(alone, results[0][0][5:6])


def test_rows_without_a_gradient_are_not_read():
    v = operands(20, (16, 24), 100)
    grad = torch.rand(20)
    grad[4:9] = 0
    clean = run(linear_kl, v, grad)
    v[0][v[4][4:9]] = float("nan")
    got = run(linear_kl, v, grad)
    assert all(torch.equal(a, b) for a, b in zip(clean[1:], got[1:]))


@pytest.mark.parametrize("weighted", [False, True])
def test_no_rows(weighted):
    v = operands(4, (8, 8), 30, rows=0)
    kl, dx, dw = run(
        linear_kl, v, torch.tensor(1.0) if weighted else torch.ones(0), torch.ones(0) if weighted else None
    )
    assert not kl.any() and not dx.any() and not dw.any() and dw.shape == (30, 8)


def test_gradcheck_opcheck_and_compile():
    v = operands(6, (5, 4), 9, torch.float64, rows=3)
    leaves = [t.requires_grad_() for t in v[:2]]
    torch.autograd.gradcheck(lambda h, w: linear_kl(h, w, *v[2:], temperature=0.8), leaves)
    weight = torch.tensor([0.3, 0.0, 2.0])
    torch.autograd.gradcheck(lambda h, w: linear_kl(h, w, *v[2:], weight) * 3, leaves)
    v = operands(6, (5, 4), 9, rows=3)
    found = torch.ops.ivl.linear_kl(*v, None, 1.0, False, False, "")
    torch.library.opcheck(torch.ops.ivl.linear_kl.default, (*v, weight, 1.0, True, True, ""))
    torch.library.opcheck(
        torch.ops.ivl.linear_kl_backward.default, (weight, *v, found[1], found[2], 1.0, True, True, "")
    )
    for args, grad in (((), weight), ((weight,), torch.tensor(2.0))):
        graph = torch.compile(linear_kl, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(run(linear_kl, v, grad, *args), run(graph, v, grad, *args)))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"teacher_weight": torch.ones(5, 2)}, ValueError, r"teacher_weight: got .* expected shape \[4, 2\]"),
        ({"teacher_hidden": torch.ones(2, 2).long()}, TypeError, "teacher_hidden: got int64"),
        (
            {"teacher_rows": torch.tensor([0])},
            ValueError,
            r"teacher_rows: got int64 \[1\] on cpu, expected shape \[2\]",
        ),
        ({"teacher_rows": torch.tensor([0, 9])}, ValueError, "teacher_rows: got 9"),
        ({"teacher_hidden": torch.ones(3, 2)}, ValueError, "teacher_rows: got None for 3 hidden states and 2"),
        ({"row_weight": torch.ones(3)}, ValueError, r"row_weight: got float32 \[3\] on cpu, expected shape \[2\]"),
        ({"temperature": -1.0}, ValueError, "temperature: got -1.0"),
    ],
)
def test_errors(change, error, message):
    heads = {"hidden": torch.ones(2, 3), "weight": torch.ones(4, 3)}
    teacher = {"teacher_hidden": torch.ones(2, 2), "teacher_weight": torch.ones(4, 2)}
    with pytest.raises(error, match=message):
        linear_kl(**heads | teacher | change)
