"""Plans: repeated calls give the bits of the call as it is written, and nothing else finds a plan."""

import contextlib
import ctypes
import itertools
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ivl_kernels import _dispatch, _library, _plan, _recording, ops
from ivl_kernels._checks import autocast_dtype
from ivl_kernels._plan import planned
from ivl_kernels.testing.cases import Numbers, all_cases, cast
from ivl_kernels.testing.poison import poisoned
from tests.simulator.gpu import simulated_gpu
from tests.simulator.idle import idle_gpu

CASES = [case for case in all_cases() if case.graph]


@pytest.fixture(autouse=True)
def no_plans():
    for plans in _plan.PLANS.values():
        plans.clear()


def made():
    """Functions among what is known."""
    return [p for plans in _plan.PLANS.values() for p in plans.values() if type(p) is FunctionType]


def why():
    return [p for plans in _plan.PLANS.values() for p in plans.values() if type(p) is str and p != _plan._SEEN]


@pytest.fixture
def only_plans(monkeypatch):
    """Called, it lets nobody choose a backend any more."""

    def forbid():
        monkeypatch.setattr(_library.Op, "_serve", lambda *args: pytest.fail("a call was not planned"))

    yield forbid


def numbers(case, seed, backend):
    values = cast(case.inputs(Numbers(seed=seed)), torch.bfloat16, "cpu")
    leaves = tree_leaves(case.call(tree_map(torch.clone, values), backend))
    return values, [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(
    "case, backend",
    [(c, i.backend) for c in CASES for i in _library.OPS[c.op].implementations if i.backend in ("triton", "cuda")],
    ids=lambda value: value if isinstance(value, str) else value.title,
)
def test_a_plan_gives_the_bits_of_the_call(case, backend, only_plans):
    """Other numbers in other memory; nothing that a plan did not write is read."""
    with simulated_gpu(preferred=True) as log, torch.no_grad():
        expected = [numbers(case, seed, backend) for seed in (1, 2, 3)]
        assert made(), why()
        only_plans()
        launches = len(log)
        with poisoned():
            for values, results in expected[:2]:
                got = [t for t in tree_leaves(case.call(values, backend)) if isinstance(t, Tensor)]
                assert len(got) == len(results) and all(map(torch.equal, got, results))
        assert len(log) > launches


def variant(dtype, offset, transposed, rows):
    x = torch.randn(rows * 48 + 8, dtype=torch.float32).to(dtype)[offset : offset + rows * 48]
    return x.view(48, rows).t() if transposed else x.view(rows, 48)


VARIANTS = st.tuples(
    st.sampled_from([torch.bfloat16, torch.float32]), st.sampled_from([0, 1, 8]), st.booleans(), st.sampled_from([1, 3])
)


@settings(max_examples=6)
@given(st.lists(VARIANTS, min_size=4, max_size=8))
def test_whatever_was_called_before(calls):
    """Dtypes, alignments, strides and sizes in any order: each call has the bits of one without plans."""
    written = ops.rms_norm.__globals__["op"].norm.__wrapped__
    weights = {dtype: torch.randn(48).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    with simulated_gpu(preferred=True):
        for call in calls * 3:
            x = variant(*call)
            norm = ops.norm.op.Norm(x, None, None, weights[call[0]], None, 1e-6, False, True)
            assert torch.equal(ops.rms_norm(x, weights[call[0]]), written(norm, ""))
        assert made()


def arguments(rows=3, dtype=torch.bfloat16, **options):
    return dict(x=torch.randn(rows, 48).to(dtype), weight=torch.ones(48, dtype=dtype), **options)


def strided(t):
    return torch.empty(t.shape[0], 2 * t.shape[1], dtype=t.dtype)[:, ::2].copy_(t)


DIFFERENT = {
    "rows": dict(arguments(4)),
    "dtype": arguments(dtype=torch.float16),
    "strides": (lambda a: a | dict(x=strided(a["x"]))),
    "alignment": (lambda a: a | dict(x=torch.zeros(4 * 48, dtype=torch.bfloat16)[1:145].view(3, 48))),
    "dimensions": (lambda a: a | dict(x=a["x"].view(1, 3, 48))),
    "another argument": (lambda a: a | dict(residual=torch.ones(3, 48, dtype=torch.bfloat16))),
    "an option": arguments(rounding="after_weight"),
    "a number": arguments(eps=1e-5),
    "a number's sign": arguments(eps=-0.0),
    "a number's type": arguments(eps=1),
    "a backend by argument": arguments(backend="triton"),
    "what follows gradients": (lambda a: a | dict(weight=a["weight"].clone().requires_grad_())),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_a_plan_depends_on(name):
    """A call that differs finds no plan, and has its own."""
    first = arguments(eps=0.0 if "sign" in name else True if "type" in name else 1e-6)
    change = DIFFERENT[name]
    second = change(first) if callable(change) else change
    with idle_gpu():
        for _ in range(3):
            ops.rms_norm(**first)
        assert len(made()) == 1
        ops.rms_norm(**second)
        assert len(_plan.PLANS["ivl_kernels.ops.norm.op.norm"]) == 2, "a plan was found"
        for _ in range(2):
            ops.rms_norm(**second)
        assert len(made()) == 2


def settings_that_change(monkeypatch, tf32_setting):
    return {
        "nothing": lambda: None,
        "IVL_BACKEND": lambda: monkeypatch.setenv("IVL_BACKEND", "triton"),
        "preferring": lambda: monkeypatch.setattr(_dispatch, "_preferred", "triton"),
        "tf32": lambda: torch.set_float32_matmul_precision("high"),
    }


@pytest.mark.parametrize("name", ["nothing", "IVL_BACKEND", "preferring", "tf32"])
def test_settings_that_a_plan_depends_on(name, monkeypatch, tf32_setting):
    call = arguments(dtype=torch.float32)
    with idle_gpu():
        for _ in range(3):
            ops.rms_norm(**call)
        settings_that_change(monkeypatch, tf32_setting)[name]()
        ops.rms_norm(**call)
        assert len(_plan.PLANS["ivl_kernels.ops.norm.op.norm"]) == (1 if name == "nothing" else 2)


def test_the_reference_when_it_is_asked_for(monkeypatch):
    """However often the kernels served the same call before."""
    call = arguments()
    with idle_gpu() as idle:
        for _ in range(4):
            ops.rms_norm(**call)
        assert idle.launches == 4
        monkeypatch.setenv("IVL_BACKEND", "reference")
        for _ in range(4):
            got = ops.rms_norm(**call)
            torch.testing.assert_close(got, ops.rms_norm(**call, backend="reference"))
        assert idle.launches == 4
        with pytest.raises(_dispatch.BackendError):
            ops.rms_norm(**call, backend="cuda")
    ops.rms_norm(**call, backend="cpu")


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += function.namespace == "ivl"
        return function(*args, **(kwargs or {}))


class Functions(torch.overrides.TorchFunctionMode):
    seen = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen += getattr(function, "namespace", "") == "ivl"
        return function(*args, **(kwargs or {}))


def test_who_looks_at_ops_sees_them():
    call = arguments()
    with idle_gpu():
        for _ in range(3):
            ops.rms_norm(**call)
        known = len(_plan.PLANS["ivl_kernels.ops.norm.op.norm"])
        with Counting() as mode:
            ops.rms_norm(**call)
        assert mode.seen == 1
        with torch.profiler.profile() as profile:
            ops.rms_norm(**call)
        assert any("ivl::norm" in event.key for event in profile.key_averages())
        with Functions() as functions:
            ops.rms_norm(**call)
        assert functions.seen == 1
        with torch.device("cpu"):  # a default device changes nothing
            ops.rms_norm(**call)
        assert len(_plan.PLANS["ivl_kernels.ops.norm.op.norm"]) == known
        with torch.enable_grad():
            leaf = call["x"].clone().requires_grad_()
            assert ops.rms_norm(leaf, call["weight"]).requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ops.rms_norm(**call)
        assert len(_plan.PLANS["ivl_kernels.ops.norm.op.norm"]) == known and len(made()) == 1


def test_tensors_that_are_not_what_their_memory_holds_or_lie_elsewhere():
    function = planned(lambda x: x.new_empty(3, dtype=not x.is_meta and autocast_dtype(x) or x.dtype))
    plain, pairs = torch.zeros(3, 2)[:, 1], torch.view_as_complex(torch.zeros(3, 2))
    with idle_gpu():
        for _ in range(3):
            assert function(plain).dtype == torch.float32
        (plans,) = (p for p in _plan.PLANS.values() if p)
        negative = pairs.conj().imag
        assert negative.is_neg() and negative.stride() == plain.stride()
        for other in (negative, plain.to("meta")):
            for _ in range(3):
                assert function(other).device == other.device
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert function(plain).dtype == torch.bfloat16
        assert len(plans) == 1


def test_wrong_arguments_stay_wrong():
    call = arguments()
    with idle_gpu():
        for _ in range(3):
            ops.rms_norm(**call)
        for _ in range(3):
            with pytest.raises(ValueError, match=r"weight: got bfloat16 \[47\]"):
                ops.rms_norm(call["x"], call["weight"][:47])
            with pytest.raises(TypeError, match="weight: got float32"):
                ops.rms_norm(call["x"], call["weight"].float())
            with pytest.raises(TypeError, match="x: got list"):
                ops.rms_norm([1.0], call["weight"])
            with pytest.raises(_dispatch.BackendError):
                ops.rms_norm(**call, backend=repr(""))
            ops.rms_norm(**call | {"eps": float("nan")})
        assert len(_plan.PLANS["ivl_kernels.ops.norm.op.norm"]) == 1


def test_in_place_is_known_to_autograd():
    q, k, cos = torch.randn(1, 2, 3, 32), torch.randn(1, 1, 3, 32), torch.randn(1, 3, 32)
    with idle_gpu():
        for count in range(1, 5):
            ops.v2pe_rope_(q, k, cos=cos, sin=cos.clone())
            assert (q._version, k._version) == (count, count)
        assert len(made()) == 1
        leaf = torch.ones_like(q, requires_grad=True)
        with torch.enable_grad():
            product = (leaf * q).sum()
        ops.v2pe_rope_(q, k, cos=cos, sin=cos.clone())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_one_memory_under_two_names_is_no_plan():
    x, weight = torch.randn(3, 48), torch.ones(48)
    with idle_gpu():
        for _ in range(4):
            ops.rms_norm(x, weight, residual=x)
        assert not _plan.PLANS["ivl_kernels.ops.norm.op.norm"]


# The rest on functions whose launches write int64 at an address.


def poke(address, count, value):
    (ctypes.c_int64 * count).from_address(address)[:] = [value] * count


def fill(tensor, value):
    """Stands for a launch: `tensor`, whose elements are adjacent, becomes `value`."""
    assert tensor.is_contiguous()
    recorder = _recording.thread.recorder
    if recorder is not None:
        recorder.launch(poke, (), (tensor, tensor.numel(), value), {}, True)
    poke(tensor.data_ptr(), tensor.numel(), value)


def copy(source, target):
    recorder = _recording.thread.recorder
    if recorder is not None:
        recorder.launch(ctypes.memmove, (), (target, source, source.nbytes), {}, True)
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)


@planned
def shuffled(x, parts, factor):
    """What has memory only for launches, views of it, of arguments and of results, and torch between."""
    scratch = x.new_empty(5, 4)
    fill(scratch, factor)
    fill(scratch[2], 7)
    copy(parts[1][1:], scratch[4, 1:])
    scaled, out = x.new_empty(5, 4), x.new_empty(2, 4)
    copy(scratch, scaled)
    total = scaled.clone()
    total[:, 1:].copy_(scaled[:, :3])
    copy(total[1:3], out)
    kept = x.new_empty(3)
    copy(x[1:], kept)
    nothing = x.new_empty(0, 3)
    return [total, (out.t(), nothing)], kept, None, x


def test_addresses():
    """Of arguments, results, scratch, views of each, and what torch makes."""
    with idle_gpu():
        for seed in range(6):
            x, parts = torch.arange(4) + seed, [torch.zeros(2), torch.arange(4) * seed]
            (total, (out, nothing)), kept, none, same = shuffled(x, parts, 3)
            rows = torch.tensor([[3] * 4, [3] * 4, [7] * 4, [3] * 4, [3, *parts[1][1:].tolist()]])
            expected = torch.cat([rows[:, :1], rows[:, :3]], 1)
            assert torch.equal(total, expected) and torch.equal(out, expected[1:3].t())
            assert torch.equal(kept, x[1:]) and nothing.shape == (0, 3) and none is None and same is x
        (plan,) = made()
        assert "memory = empty((512,)" in plan.__doc__  # the scratch


def test_calls_as_they_are_written():
    with idle_gpu(), _plan.unplanned():
        for _ in range(4):
            ops.rms_norm(**arguments())
    assert not any(_plan.PLANS.values())


def test_memory_with_gaps():
    @planned
    def function(x):
        apart, others, out = torch.empty_strided((3,), (64,), dtype=x.dtype), x.new_empty(64), x.new_empty(64)
        fill(others, 5)
        fill(apart[1], 9)
        copy(others, out)
        return out

    with idle_gpu():
        for _ in range(4):
            assert function(torch.zeros(2, dtype=torch.int64)).tolist() == [5] * 64
        assert made()


def test_strides_of_sizes_that_are_1():
    q, k = (torch.randn(1, 1, heads, 32).transpose(1, 2) for heads in (2, 1))
    with idle_gpu():
        for _ in range(4):
            results = ops.v2pe_rope(q, k, cos=torch.zeros(1, 1, 32), sin=torch.zeros(1, 1, 32))
            assert [t.stride() for t in results] == [q.stride(), k.stride()]
        assert made()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_torch_makes_of_other_calls(mode):
    function = planned(lambda x, w: (x.t().contiguous().flatten(1), x.reshape(-1), x.to(w.dtype), w.detach(), w))
    w = torch.nn.Parameter(torch.ones(2))
    with idle_gpu(), mode():
        for _ in range(4):
            transposed, flat, cast, detached, same = function(x := torch.randn(3, 4).double()[:, 1:], w)
            assert torch.equal(transposed, x.t()) and torch.equal(flat, x.flatten()) and torch.equal(cast, x.float())
            assert same is w and detached.data_ptr() == w.data_ptr() and not detached.requires_grad
        assert made(), why()


def test_an_error_in_a_recording():
    steps = itertools.count()

    @planned
    def function(x):
        out = x.new_empty(3)
        fill(out, 3)
        if next(steps) == 1:
            raise KeyError("the second")
        return out

    with idle_gpu():
        for step in range(4):
            with pytest.raises(KeyError) if step == 1 else contextlib.nullcontext():
                assert function(torch.zeros(3, dtype=torch.int64)).tolist() == [3, 3, 3]
            assert _recording.thread.recorder is None and torch._C._len_torch_dispatch_stack() == 0
            assert len(made()) == (step >= 2)


def test_results_are_new_memory():
    with idle_gpu():
        results = [shuffled(torch.arange(4), [torch.zeros(2), torch.arange(4)], 3) for _ in range(6)]
    tensors = [t for r in results for t in (r[0][0], r[0][1][0], r[1])]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


TABLE = torch.arange(4)
REFUSED = {
    "_local_scalar_dense": lambda x: x + x[0].item(),
    "nonzero": lambda x: x.nonzero(),
    "randint": lambda x: torch.randint(5, (3,)),
    "neither an argument nor made of them": lambda x: x.new_empty(4).copy_(TABLE),
    "a tensor is on meta": lambda x: x.new_empty(4, device="meta"),
    "as_strided.default is called": lambda x: x.as_strided((2,), (1,), x.storage_offset() + 1),
    "zeros.default has torch's default dtype": lambda x: torch.zeros(2, device=x.device),
    "result is a object": lambda x: object(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_safe_is_no_plan(reason):
    function = planned(REFUSED[reason])
    with idle_gpu():
        for step in range(4):
            got = function(torch.arange(1, 5) * step)
            if reason == "_local_scalar_dense":
                assert got.tolist() == [2 * step, 3 * step, 4 * step, 5 * step]
    assert not made() and len(why()) == 1 and reason in why()[0], why()


def test_ops_that_read_from_the_device_are_no_plan():
    function = planned(lambda e, i, r: ops.place_rows(e, i, r, 7, inplace=True, backend="cuda"))
    with simulated_gpu():
        for count in (3, 3, 3, 3):
            ids = torch.full((1, 5), 7)
            ids[0, count:] = 0
            function(torch.zeros(1, 5, 8), ids, torch.ones(3, 8))
        with pytest.raises(ValueError, match="got 3 visual rows for 4"):
            function(torch.zeros(1, 5, 8), torch.tensor([[7, 7, 7, 7, 0]]), torch.ones(3, 8))
    assert any("reads from the device" in reason for reason in why())


def test_plans_are_few(monkeypatch):
    monkeypatch.setattr(_plan, "MOST", 4)
    with idle_gpu():
        for size in itertools.chain(range(1, 9), range(8, 4, -1)):
            for _ in range(3):
                ops.rms_norm(torch.zeros(size, 48), torch.ones(48))
        plans = _plan.PLANS["ivl_kernels.ops.norm.op.norm"]
        assert len(plans) == 4
        plans |= dict.fromkeys(range(8), "added by other threads")
        ops.rms_norm(torch.zeros(9, 48), torch.ones(48))
        assert len(plans) == 4


def test_threads_share_plans():
    def work(start):
        with idle_gpu():
            for i in range(start, start + 40):
                x = torch.arange(4) + i
                assert torch.equal(shuffled(x, [torch.zeros(2), torch.arange(4)], 3)[1], x[1:])

    with idle_gpu(), ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(work, 100 * i) for i in range(3)]:
            done.result()


def test_inference_mode_has_its_own():
    call = arguments()
    with idle_gpu():
        for _ in range(3):
            ops.rms_norm(**call)
        with torch.inference_mode():
            for _ in range(3):
                assert ops.rms_norm(**call).is_inference()
        assert len(made()) == 2 and not ops.rms_norm(**call).is_inference()


def test_on_a_cpu_nothing_is_planned():
    for _ in range(4):
        ops.rms_norm(**arguments())
    assert not any(_plan.PLANS.values())


def test_compiled_graphs_hold_the_op():
    call = arguments()
    torch._dynamo.reset()
    compiled = torch.compile(lambda **a: ops.rms_norm(**a), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**call), ops.rms_norm(**call))


def test_launches_that_are_watched_are_made_as_ever(monkeypatch):
    from triton import knobs

    hook = knobs.HookChain()
    hook.add(print)
    with idle_gpu() as idle:
        for _ in range(3):
            ops.rms_norm(**arguments())
        assert idle.last[7:10] == (None, None, None)
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
        ops.rms_norm(**arguments())
        assert hook in idle.last
