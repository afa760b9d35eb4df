"""Which backend serves a call, and why, in words.

A backend is one of:

* `cpu`: C++ on CPU tensors
* `cuda`: CUDA C++ on NVIDIA GPUs
* `triton`: Triton on NVIDIA and AMD GPUs
* `torch`: fused kernels of torch, or of a library beside it, on GPUs
* `reference`: plain torch, everywhere

`IVL_BACKEND` or an op's `backend=` argument forces one; a forced backend that cannot serve the call raises
`BackendError` with the reason. When the reference serves a call that a better backend exists for, a
`FallbackWarning` says why, once for each reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _cpu, _cuda, _env, _gpu

if TYPE_CHECKING:
    import torch

_DEVICES = {
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda", "hip"),
    "torch": ("cuda", "hip"),
    "reference": (),
}
NAMES = tuple(_DEVICES)
_FORMER = {"native": "cpu"}  # names of releases before this one


class BackendError(RuntimeError):
    """The forced backend cannot serve this call."""


class FallbackWarning(UserWarning):
    """The reference served a call for which a faster backend exists but could not be used."""


@dataclass(frozen=True)
class Implementation:
    """One backend of an op.

    Attributes:
        backend: one of `NAMES`.
        dtypes: names of the dtypes served ("float32", ...); empty: all.
        unless: called with the record of the op's arguments; a reason not to serve them, or None.
        function: called with that record; None: the one that has the op's name, in the module of the op's package that
            has the backend's.
    """

    backend: str
    dtypes: tuple[str, ...] = ()
    unless: Callable[[Any], str | None] | None = None
    function: Callable[[Any], Any] | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """Device kinds served: "cpu", "cuda", "hip"; empty: all."""
        return _DEVICES[self.backend]

    @property
    def module(self) -> str:
        return "gpu" if self.backend == "torch" else self.backend


_preferred = ""


@contextlib.contextmanager
def preferring(backend: str) -> Iterator[None]:
    """Let `backend` come first in every op that has it and where it can serve; elsewhere the best one serves as ever.

    For tools that look at one backend of ops which call others; to force one, an op takes `backend=`.
    """
    global _preferred
    before, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = before


def preference() -> str:
    """The backend that `preferring` puts first, or an empty string."""
    return _preferred


@functools.cache
def _triton_problem(device: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import torch

    if not torch.cuda.is_available():  # something stands in for a GPU, or the question is about one
        return None
    return _cuda.too_old(torch.cuda.current_device() if device is None else device)


def _problem(impl: Implementation, kind: str, device: int | None, dtype: str, args: Any) -> str | None:
    """Why `impl` cannot serve a call on tensors of this device and dtype, or None."""
    if impl.backend == "reference":
        return None
    if kind not in impl.devices and not (kind == "cpu" and "cuda" in impl.devices and _gpu.current()):
        return f"it serves {' and '.join(impl.devices)} tensors, not {kind}"
    if impl.dtypes and dtype not in impl.dtypes:
        return f"it serves {', '.join(impl.dtypes)}, not {dtype}"
    if impl.backend == "cpu":
        why = _cpu.problem()
    elif impl.backend == "torch":
        why = None
    else:
        why = _cuda.problem(device) if impl.backend == "cuda" else _triton_problem(device)
    if why is None and impl.unless is not None and args is not None:
        why = impl.unless(args)
    return why


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call; `passed_over` holds (backend, reason) of the better ones that do not."""

    implementation: Implementation
    passed_over: tuple[tuple[str, str], ...]

    @property
    def backend(self) -> str:
        return self.implementation.backend

    def __str__(self) -> str:
        return self.backend + "".join(f"; not {name}: {why}" for name, why in self.passed_over)


_warned: set[tuple[str, str]] = set()


def choose(
    op: str,
    implementations: Sequence[Implementation],
    device: torch.device,
    dtype: str,
    forced: str = "",
    args: Any = None,
    warn: bool = True,
) -> Choice:
    """Pick the backend for one call.

    Args:
        op: the op's name, for messages.
        implementations: best first.
        device: of the tensors; without an index, the current one of its type.
        dtype: name of the deciding dtype, such as "bfloat16".
        forced: a backend name; empty: `IVL_BACKEND`, and when that is empty too, the best.
        args: the record of the call's arguments, for `Implementation.unless`; None skips those checks.
        warn: issue the `FallbackWarning`.

    Raises:
        BackendError: the forced backend does not exist for this op or cannot serve the call.
    """
    forced = forced or _env.BACKEND.get()
    kind = _gpu.device_kind(device.type)
    if forced in _FORMER:
        warnings.warn(f"the backend '{forced}' is called '{_FORMER[forced]}' now", FutureWarning, stacklevel=3)
        forced = _FORMER[forced]
    if forced:
        if forced not in NAMES:
            raise BackendError(f"backend: got '{forced}', expected one of {', '.join(NAMES)}")
        reasons = []
        for impl in implementations:
            if impl.backend == forced:
                why = _problem(impl, kind, device.index, dtype, args)
                if why is None:
                    return Choice(impl, ())
                reasons.append(why)
        reasons = reasons or ["the op has no such backend"]
        raise BackendError(f"ivl::{op}: backend '{forced}' was forced but cannot serve this call: {'; '.join(reasons)}")
    if kind == "cpu" and _gpu.preferred():
        kind = "cuda"
    if _preferred:
        implementations = sorted(implementations, key=lambda impl: impl.backend != _preferred)
    passed: list[tuple[str, str]] = []
    for impl in implementations:
        why = _problem(impl, kind, device.index, dtype, args)
        if why is None:
            if impl.backend == "reference" and warn:
                _warn(op, kind, passed)
            return Choice(impl, tuple(passed))
        if kind in impl.devices:
            passed.append((impl.backend, why))
    raise BackendError(f"ivl::{op}: no backend serves {kind} tensors of {dtype}: {passed}")


def _warn(op: str, kind: str, passed: list[tuple[str, str]]) -> None:
    reasons = "; ".join(f"{name}: {why}" for name, why in passed)
    if not reasons and kind in ("cuda", "hip"):
        reasons = f"it has no kernel for {'AMD' if kind == 'hip' else 'NVIDIA'} GPUs"
    key = (op, f"{kind} {reasons}")
    if reasons and key not in _warned:
        _warned.add(key)
        warnings.warn(f"ivl::{op} runs on the reference backend ({reasons})", FallbackWarning, stacklevel=3)
