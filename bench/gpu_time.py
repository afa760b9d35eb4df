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

from ivl_kernels._cuda_graph import recorded, waits

WARM_UPS = 3  # calls on the stream that is captured, as torch's documentation wants them
SLEEPS = (200_000, 2_000_000, 20_000_000)  # cycles, some 0.1 ms and more for graphs that take longer to queue
L2_BYTES = 32 << 20  # at least


def capture(call: Callable[[], Any], reset: Callable[[], None], cuda: Any = torch.cuda) -> tuple[Any, str]:
    """A CUDA graph of `call`, or None and why there is none: a call that waits for the device cannot be captured."""
    side, why = cuda.Stream(), ""
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(WARM_UPS):
            reset()
            why = waits(call, cuda)[1]
    cuda.current_stream().wait_stream(side)
    if why:
        return None, why
    reset()
    cuda.synchronize()
    try:
        kept, graph = recorded(call, cuda)
    except Exception as error:
        text = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {text[0][:120] if text else ''}"
    finally:
        cuda.synchronize()
    graph.kept = kept  # its results' memory
    return graph, ""


def replay_ms(graph: Any, reset: Callable[[], None], flush: Callable[[], Any], cuda: Any = torch.cuda) -> float:
    """GPU time of one replay, with nothing in the caches; a sleep hides the time that queueing takes."""
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    for sleep in SLEEPS:
        reset()
        flush()
        cuda.synchronize()
        cuda._sleep(sleep)
        start.record()
        graph.replay()
        end.record()
        late = start.query()  # the GPU was there before the end of the queue was
        cuda.synchronize()
        if not late:
            break
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
