"""Time and peak memory of a model call by stage: vision transformer, projector, placement, prefill, decode."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.families import families_in
from ._edit import Editor

VISION = "vision transformer"
PROJECTOR = "shuffle, projector"
PLACEMENT = "embeddings, placement"
PREFILL = "language model, prefill"
DECODE = "language model, new tokens"
REST = "generation loop, rest"
STAGES = (VISION, PROJECTOR, PLACEMENT, PREFILL, DECODE, REST)


class _Clock:
    """Attributes time, or peak memory, to the innermost stage that is running."""

    def __init__(self, device: torch.device, memory: bool) -> None:
        self._gpu = device.type == "cuda"
        self._memory = memory
        self._stack = [REST]
        self.values: dict[str, float] = {}
        self._start()

    def _start(self) -> None:
        if self._memory:
            self._from = _reset_peak(self._gpu)
        else:
            if self._gpu:
                torch.cuda.synchronize()
            self._from = time.perf_counter()

    def _close(self) -> None:
        name = self._stack[-1]
        if self._memory:
            self.values[name] = max(self.values.get(name, 0.0), _peak(self._gpu) - self._from)
        else:
            if self._gpu:
                torch.cuda.synchronize()
            self.values[name] = self.values.get(name, 0.0) + time.perf_counter() - self._from

    def stage(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._close()
        self._stack.append(name)
        self._start()
        try:
            return function(*args, **kwargs)
        finally:
            self._close()
            self._stack.pop()
            self._start()

    def stop(self) -> dict[str, float]:
        self._close()
        return self.values


def _status(key: str) -> float:
    match = re.search(rf"^{key}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024.0 * int(match.group(1)) if match else 0.0


def _reset_peak(gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def can_measure_memory(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    try:
        _reset_peak(False)
        return True
    except OSError:  # not Linux
        return False


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    given = [*args, *(kwargs.get(name) for name in ("inputs_embeds", "input_ids"))]
    return next((value for value in given if isinstance(value, torch.Tensor)), None)


def _language_stage(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    tokens = _tokens(args, kwargs)
    return DECODE if tokens is not None and tokens.shape[1] == 1 else PREFILL


def _core_stage(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    images = kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs")
    return PLACEMENT if images else REST


def _parts(model: nn.Module) -> Iterator[tuple[Any, str, str | Callable[..., str]]]:
    """(module, method, stage) of everything that is timed."""
    for _, family in families_in(model):
        yield family.vision, "forward", VISION
        yield family.core, family.features_name, PROJECTOR
        yield family.language, "forward", _language_stage
        if family.core is not family.model:
            yield family.core, "forward", _core_stage
        if family.head is not None and family.head not in family.language.modules():
            yield family.head, "forward", _language_stage
        if hasattr(family.core, "extract_feature_flash"):
            yield family.core, "extract_feature_flash", PROJECTOR
        if hasattr(family.language, "generate"):  # the model embeds, then its language model generates
            for name in ("generate", "forward"):
                yield family.model, name, PLACEMENT
            yield family.language, "generate", REST


def _timed(clock: _Clock, stage: str | Callable[..., str]) -> Callable[..., Any]:
    def method(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        name = stage if isinstance(stage, str) else stage(args, kwargs)
        return clock.stage(name, inner, self, *args, **kwargs)

    return method


@contextlib.contextmanager
def _instrumented(model: nn.Module, clock: _Clock) -> Iterator[None]:
    edit = Editor(("stages", ""))
    try:
        for owner, name, stage in _parts(model):
            edit.method(owner, name, _timed(clock, stage))
        yield
    finally:
        edit.roll_back()


def stage_times(model: nn.Module, run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds in each stage of one call of `run`."""
    clock = _Clock(device, memory=False)
    with _instrumented(model, clock):
        run()
        return clock.stop()


def stage_memory(model: nn.Module, run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Bytes by which memory grew at most in each stage of one call of `run`."""
    clock = _Clock(device, memory=True)
    with _instrumented(model, clock):
        run()
        return clock.stop()
