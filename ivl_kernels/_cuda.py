"""The one thin layer that launches CUDA C++ kernels.

The kernels of `csrc/cuda` know nothing of torch: nvcc compiles each file to `_C_cuda/<file>.fatbin`, and this module
loads it through the CUDA driver and launches by name. Grid, block and arguments are therefore decided in Python, and a
stand-in for the GPU (a simulator that executes the compiled PTX) only has to replace `launch`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

FATBINS = Path(__file__).parent / "_C_cuda"

# launch(source, kernel, grid, block, args, shared_bytes): set by `_gpu.stand_in`, None on a real GPU.
launcher: Callable[..., None] | None = None


def built() -> list[str]:
    """Names of the compiled CUDA sources."""
    return sorted(f.stem for f in FATBINS.glob("*.fatbin"))


def problem(device: int | None = None) -> str | None:
    """Why the CUDA C++ kernels cannot be launched on a device (None: the current one), or None when they can."""
    return None if launcher is not None else _problem(device)


@functools.cache
def _problem(device: int | None) -> str | None:
    if not built():
        return "the CUDA C++ kernels are not built (install with nvcc present)"
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device is available"
    device = torch.cuda.current_device() if device is None else device
    why = too_old(device)
    if why is None:
        try:
            with torch.cuda.device(device):
                for source in built():
                    _loaded(source, device)
        except (OSError, RuntimeError) as error:  # such as a driver older than the nvcc that compiled them
            return f"the driver does not load the CUDA C++ kernels: {error}"
    return why


@functools.cache
def too_old(device: int) -> str | None:
    """The GPU's compute capability when it is below 8.0, which the kernels do not serve, or None."""
    import torch

    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"GPU {device} has compute capability {major}.{minor}, less than 8.0"


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: CUDA error {status} ({(text.value or b'?').decode()})")


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    """The device's primary context, the one that torch uses."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(handle), device), f"device {device}")
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"context of device {device}")
    return context


def _enter(device: int) -> None:
    """Threads of autograd may have no context yet: torch sets one only when the device is not the thread's already."""
    current = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(current)), "current context")
    if not current.value:
        _check(_driver().cuCtxSetCurrent(_context(device)), f"entering device {device}")


@contextlib.contextmanager
def _relaxed() -> Iterator[None]:
    """Loading is allowed while a CUDA graph is captured."""
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    _check(_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "relaxed capture mode")
    try:
        yield
    finally:
        _check(_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "capture mode")


@functools.cache
def _loaded(source: str, device: int) -> ctypes.c_void_p:
    """The module of a file, for the device, which must be the current one."""
    _enter(device)
    module = ctypes.c_void_p()
    image = (FATBINS / f"{source}.fatbin").read_bytes()
    with _relaxed():
        status = _driver().cuModuleLoadData(ctypes.byref(module), image)
    _check(status, f"loading {source}.fatbin on device {device}")
    return module


@functools.cache
def _function(source: str, kernel: str, device: int) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    module = _loaded(source, device)
    with _relaxed():
        status = _driver().cuModuleGetFunction(ctypes.byref(function), module, kernel.encode())
    _check(status, f"finding {kernel}")
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
    source: str,
    kernel: str,
    grid: Sequence[int],
    block: int,
    args: Sequence[Any],
    shared_bytes: int = 0,
    device: int | None = None,
) -> None:
    """Launch `kernel` of `csrc/cuda/<source>.cu` on the current stream of the tensors' device.

    Args:
        source: name of the .cu file, without its ending.
        kernel: the kernel's `extern "C"` name.
        grid: up to three block counts; nothing is launched when one of them is 0.
        block: threads a block.
        args: in parameter order; a tensor passes its address, None a null pointer, int an int64, float a float,
            bool a bool.
        shared_bytes: dynamic shared memory of a block, up to 48 KB.
        device: of the tensors, where addresses take their places in `args`.
    """
    grid = (*grid, 1, 1)[:3]
    if 0 in grid:
        return
    if shared_bytes > 48 * 1024:  # before a stand-in too, so that tests see what a GPU would refuse
        raise ValueError(f"{kernel}: got {shared_bytes} bytes of dynamic shared memory, expected at most 49152")
    from . import _gpu, _plan

    recorder, stand_in = _plan.recorder(), _gpu.standing()
    if recorder is not None:
        recorder.launch(
            launch, (source, kernel, grid, block), ([*args], shared_bytes, recorder.device.index), {},
            addresses=stand_in is None or stand_in.kind == "idle",
        )  # fmt: skip
    if launcher is not None:
        launcher(source, kernel, grid, block, args, shared_bytes)
        return
    import torch

    if device is None:
        device = next(a.device.index for a in args if isinstance(a, torch.Tensor))
    with torch.cuda.device(device):
        _enter(device)
        stream = torch.cuda.current_stream().cuda_stream
        values = [_argument(a) for a in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        size = [ctypes.c_uint(n) for n in (*grid, block, 1, 1, shared_bytes)]
        status = _driver().cuLaunchKernel(
            _function(source, kernel, device), *size, ctypes.c_void_p(stream), pointers, None
        )
    _check(status, f"launching {kernel} with grid {grid}, block {block}")
