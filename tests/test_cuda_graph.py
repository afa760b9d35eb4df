"""Recording that breaks off, with a stand-in for torch.cuda that behaves as torch does then."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch

from ivl_kernels import _cuda_graph


class Cuda:
    """Ending a recording that an error has broken raises another one, with the stream and the generator still in it."""

    def __init__(self):
        self.stream, self.mode, self.options = SimpleNamespace(device_index=0), 0, {}
        self.first, self.default_generators = self.stream, [torch.Generator()]
        self.CUDAGraph = SimpleNamespace

    def is_available(self):
        return True

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def current_stream(self):
        return self.stream

    def set_stream(self, stream):
        self.stream = stream

    @contextlib.contextmanager
    def graph(self, graph, **options):
        self.options, self.stream = options, SimpleNamespace(device_index=0)
        try:
            yield
        except ValueError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        self.stream = self.first


def test_a_graph_is_recorded():
    cuda = Cuda()
    result, graph = _cuda_graph.recorded(lambda: 3, cuda)
    assert result == 3 and isinstance(graph, SimpleNamespace)
    assert cuda.options == {"capture_error_mode": "thread_local"}  # what other threads do breaks nothing


def test_a_recording_that_breaks_off_gives_back_what_it_took():
    cuda = Cuda()
    (generator,) = cuda.default_generators
    before = generator.get_state()
    with pytest.raises(ValueError, match="the cause"):
        _cuda_graph.recorded(lambda: fail("the cause"), cuda)
    assert cuda.stream is cuda.first and torch.equal(generator.get_state(), before)


def test_a_generator_is_freed_where_it_is_held(monkeypatch):
    log = []
    generator = SimpleNamespace(
        get_state=lambda: "numbers", set_state=log.append, clone_state=lambda: "free", graphsafe_set_state=log.append
    )
    monkeypatch.setattr(_cuda_graph, "_draw", lambda generator: None)
    _cuda_graph._free(generator)
    assert log == ["numbers"]  # graphs of others share the state it has

    def held(generator):
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    monkeypatch.setattr(_cuda_graph, "_draw", held)
    _cuda_graph._free(generator)
    assert log == ["numbers", "free", "numbers"]


def fail(text):
    raise ValueError(text)


def test_who_waits_is_seen():
    cuda = Cuda()

    def waiting():
        assert cuda.mode == "warn"
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another matter", stacklevel=1)
        return 4

    with pytest.warns(UserWarning, match="another matter") as told:
        result, why = _cuda_graph.waits(waiting, cuda)
    assert result == 4 and why.startswith("it waits for the device (") and "test_cuda_graph.py" in why
    assert len(told) == 1 and cuda.mode == 0
    assert _cuda_graph.waits(lambda: 5, cuda) == (5, "")
    with pytest.raises(ValueError):
        _cuda_graph.waits(lambda: fail(""), cuda)
    assert cuda.mode == 0
