"""Recording that breaks off, with a stand-in for torch.cuda that behaves as torch does then."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest

from ivl_kernels import _cuda_graph


class Cuda:
    """Ending a recording that an error has broken raises another one, with the stream and the generator still in it."""

    def __init__(self):
        self.stream, self.mode, self.options = SimpleNamespace(device_index=0), 0, {}
        self.first, self.state = self.stream, "its own"
        generator = SimpleNamespace(clone_state=lambda: "a copy", graphsafe_set_state=self.set_state)
        self.default_generators = [generator]
        self.CUDAGraph = SimpleNamespace

    def set_state(self, state):
        self.state = state

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
        self.options, self.stream, self.state = options, SimpleNamespace(device_index=0), "recording"
        try:
            yield
        except ValueError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        self.stream, self.state = self.first, "its own"


def test_a_graph_is_recorded():
    cuda = Cuda()
    result, graph = _cuda_graph.recorded(lambda: 3, cuda)
    assert result == 3 and isinstance(graph, SimpleNamespace) and cuda.state == "its own"
    assert cuda.options == {"capture_error_mode": "thread_local"}  # what other threads do breaks nothing


def test_a_recording_that_breaks_off_gives_back_what_it_took():
    cuda = Cuda()
    with pytest.raises(ValueError, match="the cause"):
        _cuda_graph.recorded(lambda: fail("the cause"), cuda)
    assert cuda.stream is cuda.first and cuda.state == "a copy"


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
