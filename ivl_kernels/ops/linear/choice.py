"""Whose matrix product is the faster one on this CPU: the package's or torch's. Measured once a process."""

from __future__ import annotations

import functools
import time

import torch

from ... import _cpu, _env
from . import cpu
from .op import Linear

# Up to so many rows are a class, which one number of rows stands for.
_CLASSES = ((8, 4), (64, 32), (1 << 62, 192))
_WIDTH = 1024


def own(dtype: torch.dtype, rows: int) -> bool:
    """Whether `ops.linear` serves this many rows faster than the BLAS does; `IVL_CPU_LINEAR` decides otherwise.

    Raises:
        ValueError: `IVL_CPU_LINEAR` is none of auto, own and blas.
    """
    chosen = _env.CPU_LINEAR.get()
    if chosen not in ("auto", "own", "blas"):
        raise ValueError(f"IVL_CPU_LINEAR: got {chosen!r}, expected auto, own or blas")
    if chosen != "auto":
        return chosen == "own"
    return _faster(dtype, next(least for most, least in _CLASSES if rows <= most), torch.get_num_threads())


@functools.cache
def _faster(dtype: torch.dtype, rows: int, threads: int) -> bool:
    if _cpu.problem():
        return False
    with torch.no_grad(), torch.inference_mode(False):
        x, weight = (torch.ones(n, _WIDTH, dtype=dtype, device="cpu") for n in (rows, _WIDTH))
        best = [float("inf")] * 2
        for _ in range(4):  # the first warms up
            products = (lambda: cpu.linear(Linear(x, weight, None)), lambda: torch.nn.functional.linear(x, weight))
            for i, product in enumerate(products):
                start = time.perf_counter()
                product()
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0] <= best[1]


def explained(dtype: torch.dtype) -> str:
    """Who serves how many rows, in words."""
    served = {least: own(dtype, least) for _, least in _CLASSES}
    names = {4: "up to 8 rows", 32: "up to 64", 192: "more"}
    return ", ".join(f"{names[least]}: {'cpu' if ours else 'BLAS'}" for least, ours in served.items())
