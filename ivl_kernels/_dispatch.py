"""Which backend serves a call, and why, in words.

A backend is one of:

* `native`: C++ on CPU tensors
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
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _cuda, _env, _native

if TYPE_CHECKING:
    import torch

NAMES = ("native", "cuda", "triton", "torch", "reference")


class BackendError(RuntimeError):
    """The forced backend cannot serve this call."""


class FallbackWarning(UserWarning):
    """The reference served a call for which a faster backend exists but could not be used."""


@dataclass(frozen=True)
class Implementation:
    """One backend of an op.

    Attributes:
        backend: one of `NAMES`.
        function: "module:function", the module relative to the op's package.
        devices: device kinds served: "cpu", "cuda", "hip"; empty: all.
        dtypes: names of the dtypes served ("float32", ...); empty: all.
        unless: called with the op's arguments; a reason not to serve them, or None.
    """

    backend: str
    function: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    unless: Callable[..., str | None] | None = None


@dataclass
class _StandIn:
    """What takes the place of a GPU: `kind` is "interpreter" or "simulator"."""

    kind: str
    preferred: bool
    capability: int = 80


_stand_in: _StandIn | None = None


@contextlib.contextmanager
def stand_in(
    kind: str, cuda_launcher: Callable[..., None] | None = None, *, preferred: bool = False, capability: int = 80
) -> Iterator[None]:
    """Let GPU backends serve CPU tensors while something executes their kernels without a GPU.

    Args:
        kind: "interpreter" (Triton's) or "simulator" (compiled PTX).
        cuda_launcher: replaces `_cuda.launch`; None leaves CUDA C++ unavailable.
        preferred: choose backends for CPU tensors as on a GPU, instead of only when one is forced.
        capability: what `capability` answers for CPU tensors.
    """
    global _stand_in
    before = _stand_in, _cuda.launcher
    _stand_in, _cuda.launcher = _StandIn(kind, preferred, capability), cuda_launcher
    try:
        yield
    finally:
        _stand_in, _cuda.launcher = before


def _current_stand_in() -> _StandIn | None:
    if _stand_in is None and os.environ.get("TRITON_INTERPRET") == "1":
        return _StandIn("interpreter", preferred=False)
    return _stand_in


def interpreting() -> bool:
    """True when Triton's interpreter runs the kernels (its bfloat16 `tl.dot` is wrong: upcast the operands)."""
    current = _current_stand_in()
    return current is not None and current.kind == "interpreter"


@functools.cache
def _triton_missing() -> str | None:
    return _cuda.too_old() if importlib.util.find_spec("triton") else "triton is not installed"


def unforced_cpu(tensor: torch.Tensor) -> bool:
    """A CPU tensor, no stand-in for a GPU, and no backend forced by the environment."""
    return tensor.device.type == "cpu" and _stand_in is None and not _env.BACKEND.get()


def device_kind(device_type: str) -> str:
    """ "cpu", "cuda" or "hip" (a ROCm build of torch calls its devices cuda)."""
    if device_type == "cuda":
        import torch

        return "hip" if torch.version.hip else "cuda"
    return device_type


def capability(tensor: torch.Tensor) -> int:
    """80 for compute capability 8.0, 0 for AMD; of what stands in for the GPU where something does."""
    if device_kind(tensor.device.type) == "hip":
        return 0
    if tensor.device.type != "cuda":
        return 80 if _stand_in is None else _stand_in.capability
    import torch

    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def float32_precision() -> str:
    """How products of float32 are made from tf32 ones on NVIDIA GPUs, for `tl.dot`.

    "tf32", one product, where the user lets torch's own matrix products do that; else "tf32x3", float32's accuracy.
    """
    import torch

    # Older ways to allow tf32 set this too; their own readings raise once this was set directly.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _problem(impl: Implementation, kind: str, dtype: str, args: Sequence[Any] | None) -> str | None:
    """Why `impl` cannot serve a call on tensors of this device kind and dtype, or None."""
    if impl.backend == "reference":
        return None
    if kind not in impl.devices and not (kind == "cpu" and "cuda" in impl.devices and _current_stand_in()):
        return f"it serves {' and '.join(impl.devices)} tensors, not {kind}"
    if impl.dtypes and dtype not in impl.dtypes:
        return f"it serves {', '.join(impl.dtypes)}, not {dtype}"
    if impl.backend == "native":
        why = _native.problem()
    elif impl.backend == "torch":
        why = None
    else:
        why = _cuda.problem() if impl.backend == "cuda" else _triton_missing()
    if why is None and impl.unless is not None and args is not None:
        why = impl.unless(*args)
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
    device_type: str,
    dtype: str,
    forced: str = "",
    args: Sequence[Any] | None = None,
    warn: bool = True,
) -> Choice:
    """Pick the backend for one call.

    Args:
        op: the op's name, for messages.
        implementations: best first.
        device_type: `tensor.device.type`.
        dtype: name of the deciding dtype, such as "bfloat16".
        forced: a backend name; empty: `IVL_BACKEND`, and when that is empty too, the best.
        args: the call's arguments, for `Implementation.unless`; None skips those checks.
        warn: issue the `FallbackWarning`.

    Raises:
        BackendError: the forced backend does not exist for this op or cannot serve the call.
    """
    forced = forced or _env.BACKEND.get()
    kind = device_kind(device_type)
    if forced:
        if forced not in NAMES:
            raise BackendError(f"backend: got '{forced}', expected one of {', '.join(NAMES)}")
        reasons = []
        for impl in implementations:
            if impl.backend == forced:
                why = _problem(impl, kind, dtype, args)
                if why is None:
                    return Choice(impl, ())
                reasons.append(why)
        reasons = reasons or ["the op has no such backend"]
        raise BackendError(f"ivl::{op}: backend '{forced}' was forced but cannot serve this call: {'; '.join(reasons)}")
    if kind == "cpu" and _stand_in is not None and _stand_in.preferred:
        kind = "cuda"
    passed: list[tuple[str, str]] = []
    for impl in implementations:
        why = _problem(impl, kind, dtype, args)
        if why is None:
            if impl.backend == "reference" and warn:
                _warn(op, kind, passed)
            return Choice(impl, tuple(passed))
        if kind in impl.devices:
            passed.append((impl.backend, why))
    raise BackendError(f"ivl::{op}: no backend serves {kind} tensors of {dtype}: {passed}")


def _warn(op: str, kind: str, passed: list[tuple[str, str]]) -> None:
    key = (op, f"{kind} {passed}")
    if passed and key not in _warned:
        _warned.add(key)
        reasons = "; ".join(f"{name}: {why}" for name, why in passed)
        warnings.warn(f"ivl::{op} runs on the reference backend ({reasons})", FallbackWarning, stacklevel=3)
