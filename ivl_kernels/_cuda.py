"""The one thin layer that launches CUDA C++ kernels.

The kernels of `csrc/cuda` know nothing of torch: nvcc compiles each file to `_C_cuda/<file>.fatbin`, and this module
loads it through the CUDA driver and launches by name. Grid, block and arguments are therefore decided in Python, and a
stand-in for the GPU (a simulator that executes the compiled PTX) only has to replace `launch`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import _recording

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


# Of cuLaunchKernel: the function, seven sizes, the stream, the parameters and what is beside them.
LAUNCH: Any = (ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuLaunchKernel.argtypes = LAUNCH
    return driver


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


def _address(tensor: Any) -> int:
    return tensor.data_ptr()


_WIDTHS = {int: "q", float: "f", bool: "?", type(None): "P"}


@functools.cache
def _parameters(kinds: tuple[type, ...]) -> tuple[struct.Struct, tuple[int, ...]]:
    """How arguments of these types lie in memory, and at which offsets: each in its parameter's own width."""
    letters = [_WIDTHS.get(kind, "P") for kind in kinds]
    offsets = tuple(struct.calcsize("".join(letters[:i]) + "0" + letters[i]) for i in range(len(letters)))
    return struct.Struct("".join(letters)), offsets


def _current(device: int) -> bool:
    import torch

    return torch._C._cuda_getDevice() == device


def _stream(device: int) -> int:
    import torch

    return torch._C._cuda_getCurrentRawStream(device)


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
    recorder = _recording.thread.recorder
    if recorder is not None:
        fixed, after = (source, kernel, grid, block), ([*args], shared_bytes, recorder.device.index)
        recorder.launch(launch, fixed, after, {}, recorder.addresses)
        with recorder.aside():
            return launch(source, kernel, grid, block, args, shared_bytes, device)
    if launcher is not None:
        launcher(source, kernel, grid, block, args, shared_bytes)
        return
    if device is None:
        device = next(a.device.index for a in args if hasattr(a, "data_ptr"))
    if _current(device):
        status = _launched(source, kernel, grid, block, args, shared_bytes, device)
    else:
        import torch

        with torch.cuda.device(device):
            status = _launched(source, kernel, grid, block, args, shared_bytes, device)
    _check(status, f"launching {kernel} with grid {grid}, block {block}")


def _launched(
    source: str, kernel: str, grid: Sequence[int], block: int, args: Sequence[Any], shared_bytes: int, device: int
) -> int:
    """The driver's status."""
    _enter(device)
    layout, offsets = _parameters(tuple(map(type, args)))
    values = [_address(a) if hasattr(a, "data_ptr") else 0 if a is None else a for a in args]
    memory = ctypes.create_string_buffer(layout.pack(*values), layout.size)
    first = ctypes.addressof(memory)
    pointers = (ctypes.c_void_p * len(offsets))(*[first + offset for offset in offsets])
    function, stream = _function(source, kernel, device), _stream(device)
    return _driver().cuLaunchKernel(function, *grid, block, 1, 1, shared_bytes, stream, pointers, None)
