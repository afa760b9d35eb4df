"""What holds for every op, on every case of `ivl_kernels.testing.cases`: a new op is tested here by its file there.

The rehearsal of gpu-check (`tests/test_gpu_check.py`) holds them to the accuracy rule on the CPU's backends.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from ivl_kernels import _dispatch, _library
from ivl_kernels.ops import rms_norm
from ivl_kernels.testing.cases import Checked, Numbers, all_cases, cast, forward_backward
from tests.simulator.gpu import far, simulated_gpu

CASES = list(all_cases())
ON_GPU = [
    (case, i.backend)
    for case in CASES
    for i in _library.OPS[case.op].implementations
    if i.backend in ("triton", "cuda")
]
TITLES = [f"{case.title}, {backend}" for case, backend in ON_GPU]


def inputs(case, dtype=torch.float32):
    return cast(case.inputs(Numbers()), dtype, "cpu")


@pytest.mark.parametrize("case, backend", ON_GPU, ids=TITLES)
def test_accurate_on_the_simulator(case, backend):
    with simulated_gpu() as log:
        Checked(case, inputs(case, torch.bfloat16)).check(backend)
    assert log


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_opcheck(case):
    """Schema, fake and registration of every op that the case reaches, forward and backward."""
    reached = {}

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == _library.NAMESPACE and function not in reached:
                reached[function] = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args)
            return function(*args, **(kwargs or {}))

    with Spy():
        forward_backward(case, inputs(case), "")
    assert reached
    for function, args in reached.items():
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(function, args, test_utils=tests)


@pytest.mark.parametrize("case", [case for case in CASES if case.graph], ids=lambda case: case.title)
def test_compiles_to_one_graph(case):
    """Results and gradients of the compiled call, bit for bit."""
    values = inputs(case)
    expected = forward_backward(case, values, "")
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    got = forward_backward(type(case)(case.op, case.name, case.inputs, compiled, case.gradients), values, "")
    assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("case, backend", ON_GPU, ids=TITLES)
def test_elements_far_apart(case, backend, axis):
    """Kernels on floats that lie more than 2^31 elements apart give the bits that they give on dense ones."""
    near, count = inputs(case, torch.bfloat16), iter(range(1000))
    dense = case.op.startswith("moe_experts")  # whose matrices are refused where they are not contiguous

    def spread(t):
        if not t.is_floating_point() or t.dim() <= axis or t.shape[axis] < 2:
            return t
        if dense and t.dim() == 3:
            return t
        return far(t, axis, next(count))

    there = tree_map(spread, near)
    assert next(count) > 0 or dense or all(t.dim() <= axis for t in tree_leaves(near) if t.is_floating_point())
    with simulated_gpu():
        expected, got = (forward_backward(case, v, backend) for v in (near, there))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_a_preferred_backend_comes_first_where_it_can_serve():
    op = _library.OPS["place_rows_"]

    def served():
        return op.explain("cpu", "float32").backend

    assert served() == "cpu"
    with simulated_gpu(preferred=True):
        for backend in ("triton", "cuda"):
            with _dispatch.preferring(backend):
                assert served() == backend
        with _dispatch.preferring("cpu"):  # it cannot serve a GPU's tensors
            assert served() == "cuda"
    assert served() == "cpu"


def test_a_former_name_of_a_backend(monkeypatch):
    """It serves for a release, and says what it is called now."""
    x, weight = torch.randn(3, 8), torch.ones(8)
    expected = rms_norm(x, weight, 1e-6, backend="cpu")
    with pytest.warns(FutureWarning, match="the backend 'native' is called 'cpu' now"):
        assert torch.equal(rms_norm(x, weight, 1e-6, backend="native"), expected)
    monkeypatch.setenv("IVL_BACKEND", "native")
    with pytest.warns(FutureWarning, match="the backend 'native' is called 'cpu' now"):
        assert torch.equal(rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_defaults_of_torch_change_nothing(case, dtype, device):
    """Whatever dtype and device tensors are made in by default: what an op makes is of its inputs' kind."""
    values = inputs(case)
    expected = forward_backward(case, values, "")
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        got = forward_backward(case, values, "")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert len(got) == len(expected) and all(map(torch.equal, got, expected))
