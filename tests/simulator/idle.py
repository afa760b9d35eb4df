"""A GPU whose driver returns at once: kernels are compiled and launched, and nothing runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import wrap_handle_tensordesc
from triton.runtime.driver import driver

from ivl_kernels import _gpu
from ivl_kernels.ops.token_packing import cuda, packed, triton
from tests.simulator.reads import reads

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
            fill_tma_descriptor_tiled=lambda *args: args,
        )

    def get_current_device(self) -> int:
        return -1  # Triton keeps compiled kernels by device: a real one must not meet these

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        # Triton keeps compiled kernels, and with them this, for idle GPUs to come.
        if not any(str(kind).startswith("tensordesc") for kind in source.signature.values()):
            return lambda *args: driver.active.launch(metadata, *args)
        expanded = wrap_handle_tensordesc(lambda _, args: args, source.signature, metadata.tensordesc_meta)
        return lambda *args: driver.active.launch(metadata, *args[:9], *expanded(None, args[9:]))

    def launch(self, *args: Any) -> None:
        self.launches += 1
        self.last = args


@contextlib.contextmanager
def idle_gpu() -> Iterator[Idle]:
    """Inside, GPU backends serve CPU tensors: their kernels are launched, and nothing runs.

    What ops read from the device was never written: counts are taken to be right, and nothing to be dropped.
    """
    idle, before = Idle(), driver._active
    driver.set_active(idle)
    try:
        with contextlib.ExitStack() as stack:
            for module, name in ((cuda, "check_counts"), (triton, "check_counts"), (packed, "check_status")):
                stack.enter_context(mock.patch.object(module, name, lambda *args: None))
            packed_width = packed.packed_width
            width = mock.patch.object(packed, "packed_width", lambda rows, a: packed_width(None, a))
            stack.enter_context(width)
            stack.enter_context(_gpu.stand_in("idle", idle.launch, preferred=True, capability=CAPABILITY))
            stack.enter_context(torch.no_grad())
            yield idle
    finally:
        driver._active = before


@contextlib.contextmanager
def no_host_reads() -> Iterator[None]:
    """Inside `idle_gpu`: what would wait for the device (`reads`) raises."""

    def raising(name: str) -> None:
        raise AssertionError(f"{name} reads from the device")

    with reads(raising):
        yield
