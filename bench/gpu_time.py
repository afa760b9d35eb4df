"""Two times of a call on a GPU: what the GPU works, and what a caller waits who finds it idle.

The first is a CUDA graph's replay: no Python, no gaps between launches. The second is the wall time from the call to
the end of its kernels, of which short calls spend most in Python and the driver. Each variant has both by itself, after
a wait for the device, so that one which waits in its midst disturbs nobody. Who cannot be captured has the second only.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 3  # calls on the stream that is captured, as torch's documentation wants them
SLEEP = 200_000  # cycles, some 0.1 ms: the events and the replay are queued by then
L2_BYTES = 32 << 20  # at least


def capture(call: Callable[[], Any], reset: Callable[[], None], cuda: Any = torch.cuda) -> tuple[Any, str]:
    """A CUDA graph of `call`, or None and why there is none: a call that waits for the device cannot be captured."""
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(WARM_UPS):
            reset()
            call()
    cuda.current_stream().wait_stream(side)
    reset()
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    try:
        with cuda.graph(graph):
            kept = call()
    except Exception as error:
        text = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {text[0][:120] if text else ''}"
    finally:
        cuda.synchronize()
    graph.kept = kept  # its results' memory
    return graph, ""


def replay_ms(graph: Any, reset: Callable[[], None], flush: Callable[[], Any], cuda: Any = torch.cuda) -> float:
    """GPU time of one replay, with nothing in the caches; the sleep hides the time that queueing takes."""
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    reset()
    flush()
    cuda.synchronize()
    cuda._sleep(SLEEP)
    start.record()
    graph.replay()
    end.record()
    cuda.synchronize()
    return start.elapsed_time(end)


def wall_ms(
    call: Callable[[], Any], reset: Callable[[], None], flush: Callable[[], Any], cuda: Any = torch.cuda,
    clock: Callable[[], float] = time.perf_counter,
) -> float:  # fmt: skip
    """Wall time of one call that finds the queue empty, until its kernels are done."""
    reset()
    flush()
    cuda.synchronize()
    start = clock()
    result = call()
    cuda.synchronize()
    took = 1e3 * (clock() - start)
    del result
    return took


@functools.cache
def _flushed() -> torch.Tensor:
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(2 * max(size, L2_BYTES), dtype=torch.uint8, device="cuda")


def flush_l2() -> None:
    _flushed().zero_()
