"""What the device of a call is, or what stands in for it while there is no GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import _cuda
from ._targets import limits

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class StandIn:
    """What takes the place of a GPU.

    Attributes:
        kind: "interpreter", "simulator", "idle" or "compiler".
        cuda: also for CUDA C++.
    """

    kind: str
    preferred: bool
    capability: int = 80
    cuda: bool = False


_stand_in: StandIn | None = None


@contextlib.contextmanager
def stand_in(
    kind: str, cuda_launcher: Callable[..., None] | None = None, *, preferred: bool = False, capability: int = 80
) -> Iterator[None]:
    """Let GPU backends serve CPU tensors while something executes their kernels without a GPU.

    Args:
        kind: "interpreter" (Triton's), "simulator" (of compiled PTX), "idle" (launches that run nothing) or "compiler"
            (no launches).
        cuda_launcher: replaces `_cuda.launch`; None leaves CUDA C++ unavailable.
        preferred: choose backends for CPU tensors as on a GPU, instead of only when one is forced.
        capability: what `capability` answers for CPU tensors.
    """
    global _stand_in
    before = _stand_in, _cuda.launcher
    _stand_in, _cuda.launcher = StandIn(kind, preferred, capability, cuda_launcher is not None), cuda_launcher
    try:
        yield
    finally:
        _stand_in, _cuda.launcher = before


def current() -> StandIn | None:
    if _stand_in is None and os.environ.get("TRITON_INTERPRET") == "1":
        return StandIn("interpreter", preferred=False)
    return _stand_in


def preferred() -> bool:
    """Backends for CPU tensors are chosen as on a GPU."""
    return _stand_in is not None and _stand_in.preferred


def on_host(tensor: torch.Tensor) -> bool:
    """Whether the host can look into the tensor without waiting for a device, or for what stands in for one."""
    return tensor.device.type == "cpu" and not preferred()


def standing() -> StandIn | None:
    """What stands in for a GPU, whether or not it is preferred; Triton's interpreter by its variable aside."""
    return _stand_in


def interpreting() -> bool:
    """True when Triton's interpreter runs the kernels (its bfloat16 `tl.dot` is wrong: upcast the operands)."""
    found = current()
    return found is not None and found.kind == "interpreter"


def executing() -> bool:
    """Something executes the kernels without a GPU: it needs their tensors, not only addresses."""
    found = current()
    return found is not None and found.kind in ("interpreter", "simulator")


def compiling() -> bool:
    """Kernels are compiled and not run: what they would have written is not there to be checked."""
    return _stand_in is not None and _stand_in.kind == "compiler"


def device_kind(device_type: str) -> str:
    """ "cpu", "cuda" or "hip" (a ROCm build of torch calls its devices cuda)."""
    if device_type == "cuda":
        import torch

        return "hip" if torch.version.hip else "cuda"
    return device_type


def capability(tensor: torch.Tensor) -> int:
    """The target whose limits and configurations the tensor's GPU has, or what stands in for it: 80, 0 for AMD."""
    return device_capability(tensor.device)


def device_capability(device: torch.device) -> int:
    """`capability` of the tensors on a device."""
    if device_kind(device.type) == "hip":
        return 0
    if device.type != "cuda":
        return 80 if _stand_in is None else _stand_in.capability
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return limits(10 * major + minor).capability


def multiprocessors(tensor: torch.Tensor, target: int) -> int:
    """Of the tensor's GPU; of the largest of its kind where something stands in for it."""
    if tensor.device.type != "cuda":
        return limits(target).multiprocessors
    import torch

    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def float32_precision() -> str:
    """How products of float32 are made from tf32 ones on NVIDIA GPUs, for `tl.dot`.

    "tf32", one product, where the user lets torch's own matrix products do that; else "tf32x3", float32's accuracy.
    """
    import torch

    # As torch.backends.cuda.matmul.fp32_precision, in a seventh of its time. Older ways to allow tf32 set this too;
    # their own readings raise once this was set directly.
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "tf32x3"
