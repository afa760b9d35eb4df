"""How a call reaches its backend: through torch's dispatcher where anybody listens there, else directly."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ivl_kernels import _library
from ivl_kernels.ops import rms_norm


@pytest.fixture
def dispatched(monkeypatch):
    """Names of the operators that went through the dispatcher."""
    seen = []

    def listen(op):
        real = op._overload
        monkeypatch.setattr(op, "_overload", lambda *a: seen.append(op.name) or real(*a))

    for op in _library.OPS.values():
        listen(op)
    return seen


class Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


X, W = torch.randn(3, 8), torch.randn(8)


def test_nobody_listens(dispatched):
    weight = torch.nn.Parameter(W)
    with torch.no_grad():
        plain = rms_norm(X, weight)
    graded = rms_norm(X, weight)
    (grad,) = torch.autograd.grad(graded.sum(), weight)
    assert dispatched == [] and torch.equal(plain, graded) and grad.shape == (8,)


def test_modes_and_profilers_see_every_operator(dispatched):
    with Listener() as listener:
        got = rms_norm(X, W)
    assert "ivl::norm" in listener.names and torch.equal(got, rms_norm(X, W))
    with torch.profiler.profile() as profile:
        rms_norm(X, W)
    assert "ivl::norm" in {event.name for event in profile.events()}
    assert dispatched == ["norm", "norm"]


def test_what_is_no_plain_tensor_is_dispatched(dispatched):
    with torch._subclasses.FakeTensorMode() as mode:
        assert rms_norm(mode.from_tensor(X), mode.from_tensor(W)).shape == X.shape
    assert rms_norm(X.to("meta"), W.to("meta")).is_meta
    batched = torch.vmap(lambda x: rms_norm(x, W))(X[None])
    assert torch.equal(batched[0], rms_norm(X, W)) and dispatched == ["norm"] * 3
