"""Launches of Triton kernels without Triton's look-up of the compiled variant, which costs more than a short kernel."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _gpu, _plan, _recording


class Described(NamedTuple):
    """What `triton.tools.tensor_descriptor.TensorDescriptor` is, unchecked, and of an address as well as of a tensor.

    The base and all strides but the last, which is 1, must be multiples of 16 bytes. What is outside reads as zero.
    """

    memory: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]

    @property
    def padding(self) -> str:
        return "zero"

    @property
    def round_f32_to_tf32(self) -> bool:
        return False

    @property
    def base(self) -> Described:
        return self

    def data_ptr(self) -> int:
        return self.memory if type(self.memory) is int else self.memory.data_ptr()


def describable(target: int, *matrices: torch.Tensor) -> bool:
    """Whether bulk copies (TMA) can bring parts of these contiguous matrices, and are worth it: in 16-bit types."""
    return target in (90, 100) and all(
        m.element_size() == 2 and m.shape[-1] % 8 == 0 and m.data_ptr() % 16 == 0 for m in matrices
    )


class Kernel:
    """A `triton.jit` function that is only launched; put above `@triton.jit`.

    What Triton compiles for a call depends on the values of keyword arguments, on dtypes and 16-byte alignment of
    tensors, and on whether an integer is 1, divides by 16 or needs 64 bits. By these a compiled kernel is found again.
    """

    def __init__(self, function: Any) -> None:
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.function = function
        self._compiled: dict[Any, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self._launch, grid)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
        recorder = _recording.thread.recorder
        if not _direct():
            if recorder is None:
                return self.function[grid](*map(_checked, args), **constants)
            recorder.launch(self._launch, (grid,), args, constants, False)
            with recorder.aside():
                return self.function[grid](*map(_checked, args), **constants)
        device = driver.active.get_current_device()
        key = (device, *map(_kind, args), *constants.items())
        found = self._compiled.get(key)
        if found is None:
            if recorder is not None:
                recorder.refuse(f"{self.__name__} is new")
            return self._first(key, grid, args, constants)
        compiled, run, function, metadata, rest = found
        stream = driver.active.get_current_stream(device)
        x, y, z = (*grid, 1, 1)[:3]
        if recorder is not None:
            fixed = (x, y, z, _plan.STREAM, function, metadata, None, None, None)
            recorder.launch(run, fixed, (*args, *rest), {}, True)
        if hooked():
            compiled[x, y, z](*args, *rest, stream=stream)
        else:
            run(x, y, z, stream, function, metadata, None, None, None, *args, *rest)
        return compiled

    def _first(self, key: Any, grid: tuple[int, ...], args: Any, constants: dict[str, Any]) -> Any:
        """Triton's own launch; its compiled kernel is kept when all keywords are constants of it."""
        compiled = self.function[grid](*map(_checked, args), **constants)
        rest = self.function.params[len(args) :]
        if isinstance(compiled, CompiledKernel) and all(parameter.is_constexpr for parameter in rest):
            rest = [constants.get(p.name, p.default) for p in rest]
            self._compiled[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, rest
        return compiled


@contextlib.contextmanager
def compilations() -> Iterator[list[tuple[str, dict[str, Any], float, bool]]]:
    """Yields a list of what is compiled inside, of this package's kernels: name, constants, seconds, from the disk.

    Among the constants are integers that are 1, and `multiples` names those that 16 divides.
    """
    found: list[tuple[str, dict[str, Any], float, bool]] = []
    before = knobs.compilation.listener

    def listener(*, src: Any, metadata: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
        if before is not None:
            before(src=src, metadata=metadata, times=times, cache_hit=cache_hit, **rest)
        function: Any = getattr(src, "fn", None)
        if getattr(function, "__module__", "").partition(".")[0] == __name__.partition(".")[0]:
            found_for = {function.arg_names[path[0]]: value for path, value in src.constants.items() if len(path) == 1}
            config = {name: value for name, value in found_for.items() if value is not None}
            divisible = [function.arg_names[path[0]] for path in src.attrs]
            config["multiples"] = ",".join(n for n in divisible if str(src.signature.get(n, "*")).startswith("i"))
            config |= {name: metadata[name] for name in ("num_warps", "num_stages")}
            found.append((function.__name__, config, times.total / 1e6, cache_hit))

    knobs.compilation.listener = listener
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def lanes() -> int:
    """Of a warp; AMD's consumer GPUs have half as many, with twice the work each."""
    return 64 if torch.version.hip else 32


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0


def _checked(value: Any) -> Any:
    """As Triton's compiler wants it."""
    if type(value) is not Described:
        return value
    return TensorDescriptor(value.memory, list(value.shape), list(value.strides), list(value.block_shape))


def _kind(value: Any) -> Any:
    """What a compiled kernel may depend on."""
    kind = type(value)
    if kind is int:
        return 1 if value == 1 else (value % 16 == 0, -0x80000000 <= value <= 0x7FFFFFFF)
    if kind is torch.Tensor or isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if kind is Described:
        return value.memory.dtype, value.block_shape
    return kind if kind is float else value


def current_stream() -> Any:
    return driver.active.get_current_stream(driver.active.get_current_device())


def hooked() -> bool:
    """Whether somebody, such as a profiler, is to hear of launches."""
    return any(getattr(h, "calls", h) for h in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook))


def _direct() -> bool:
    stand_in = _gpu.standing()
    if stand_in is not None:
        return stand_in.kind == "idle"
    return torch.version.hip is None and torch.cuda.is_initialized() and not _gpu.interpreting()
