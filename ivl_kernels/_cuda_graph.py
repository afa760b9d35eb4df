"""CUDA graphs, recorded so that what cannot be recorded harms nothing that follows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

WAITS = "it waits for the device"
_TORCH = "called a synchronizing CUDA operation"  # its words


def waits(function: Callable[[], Any], cuda: Any = torch.cuda) -> tuple[Any, str]:
    """What `function` returns, and why no graph records it, as far as torch sees it wait for the device, or "".

    Asked before recording: a recording that breaks off leaves torch's allocator and generators in its state for good
    (2.10 and 2.11), and random numbers in graphs of others fail then.
    """
    if not cuda.is_available():
        return function(), ""
    before = cuda.get_sync_debug_mode()
    cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            result = function()
    finally:
        cuda.set_sync_debug_mode(before)
    waited = [each for each in found if _TORCH in str(each.message)]
    for each in found:
        if each not in waited:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return result, f"{WAITS} ({waited[0].filename}:{waited[0].lineno})" if waited else ""


def recorded(function: Callable[[], Any], cuda: Any = torch.cuda) -> tuple[Any, Any]:
    """What `function` will have returned, and the graph that computes it when it is replayed: nothing runs yet.

    Other threads may use the GPU meanwhile. What `function` raises is raised, not what ending its recording raises
    then; the current stream and the generator are given back, where torch keeps them as the recording had them.
    """
    stream, graph, cause = cuda.current_stream(), cuda.CUDAGraph(), None
    try:
        with cuda.graph(graph, capture_error_mode="thread_local"):
            try:
                result = function()
            except Exception as error:
                cause = error
                raise
    except Exception:
        cuda.set_stream(stream)
        _free(cuda.default_generators[stream.device_index])
        if cause is not None:
            raise cause from None
        raise
    return result, graph


def _free(generator: torch.Generator) -> None:
    """A generator that still waits for its recording to end gets a state of its own, with the same numbers to come."""
    state = generator.get_state()
    try:
        _draw(generator)
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())
    generator.set_state(state)


def _draw(generator: torch.Generator) -> None:
    torch.empty(1, device=generator.device).uniform_(generator=generator)
