"""The one thin layer that launches CUDA C++ kernels.

The kernels of `csrc/cuda` know nothing of torch: nvcc compiles each file to `_C_cuda/<file>.fatbin`, and this module
loads it through the CUDA driver and launches by name. Grid, block and arguments are therefore decided in Python, and a
stand-in for the GPU (a simulator that executes the compiled PTX) only has to replace `launch`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FATBINS = Path(__file__).parent / "_C_cuda"

# launch(source, kernel, grid, block, args, shared_bytes): set by `_dispatch.stand_in`, None on a real GPU.
launcher: Callable[..., None] | None = None


def built() -> list[str]:
    """Names of the compiled CUDA sources."""
    return sorted(f.stem for f in FATBINS.glob("*.fatbin"))


def problem() -> str | None:
    """Why the CUDA C++ kernels cannot be launched, or None when they can."""
    if launcher is not None:
        return None
    if not built():
        return "the CUDA C++ kernels are not built (install with nvcc present)"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device is available"


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: CUDA error {status} ({(text.value or b'?').decode()})")


@functools.cache
def _function(source: str, kernel: str, device: int, shared_bytes: int) -> ctypes.c_void_p:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    image = (FATBINS / f"{source}.fatbin").read_bytes()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), image), f"loading {source}.fatbin")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()), f"finding kernel {kernel}")
    if shared_bytes > 48 * 1024:
        limit = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(_driver().cuFuncSetAttribute(function, limit, shared_bytes), f"shared memory of {kernel}")
    return function


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(value.data_ptr())


def launch(
    source: str, kernel: str, grid: Sequence[int], block: int, args: Sequence[Any], shared_bytes: int = 0
) -> None:
    """Launch `kernel` of `csrc/cuda/<source>.cu` on the current stream of the tensors' device.

    Args:
        source: name of the .cu file, without its ending.
        kernel: the kernel's `extern "C"` name.
        grid: up to three block counts; nothing is launched when one of them is 0.
        block: threads a block.
        args: in parameter order; a tensor passes its address, None a null pointer, int an int64, float a float,
            bool a bool.
        shared_bytes: dynamic shared memory of a block, in bytes.
    """
    grid = (*grid, 1, 1)[:3]
    if 0 in grid:
        return
    if launcher is not None:
        launcher(source, kernel, grid, block, args, shared_bytes)
        return
    import torch

    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        values = [_argument(a) for a in args]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values])
        function = _function(source, kernel, device.index or 0, shared_bytes)
        _check(
            _driver().cuLaunchKernel(
                function, *grid, block, 1, 1, shared_bytes, ctypes.c_void_p(stream), pointers, None
            ),
            f"launching {kernel}",
        )
