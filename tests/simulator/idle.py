"""A GPU whose driver returns at once: kernels are compiled and launched, and nothing runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ivl_kernels import _gpu

CAPABILITY = 90


class Idle:
    """Stands for Triton's CUDA driver; counts launches and keeps the last one's metadata and arguments."""

    def __init__(self) -> None:
        self.launches = 0
        self.last: tuple[Any, ...] = ()
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232_448, "multiprocessor_count": 132},
            load_binary=lambda *args: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return -1  # Triton keeps compiled kernels by device: a real one must not meet these

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: self.launch(metadata, *args)

    def launch(self, *args: Any) -> None:
        self.launches += 1
        self.last = args


@contextlib.contextmanager
def idle_gpu() -> Iterator[Idle]:
    """Inside, GPU backends serve CPU tensors: their kernels are launched, and nothing runs."""
    idle, before = Idle(), driver._active
    driver.set_active(idle)
    try:
        with _gpu.stand_in("idle", idle.launch, preferred=True, capability=CAPABILITY), torch.no_grad():
            yield idle
    finally:
        driver._active = before
