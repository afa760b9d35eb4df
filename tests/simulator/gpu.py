"""A GPU made of the PTX simulator: inside `simulated_gpu()`, Triton and CUDA C++ kernels run on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ivl_kernels import _gpu
from ivl_kernels.ops.token_packing import packed
from tests.simulator import ptxsim
from tests.simulator.ptxsim.frontend import compile_cuda
from tests.simulator.reads import OnHost, reads

ROOT = Path(__file__).resolve().parents[2]
TARGET = 80
TRITON = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
# The kernels were tuned on 3.9: older compilers move as many bytes, with conflicts in shared memory and more registers.
OLD_TRITON = TRITON < (3, 9)
CUDA_SOURCES = sorted(f.stem for f in (ROOT / "csrc" / "cuda").glob("*.cu"))


@functools.cache
def cuda_ptx(source: str, arch: str = "sm_80") -> str:
    """PTX of csrc/cuda/<source>.cu, compiled by nvcc with the flags of the build."""
    text = (ROOT / "csrc" / "cuda" / f"{source}.cu").read_text()
    return compile_cuda(text, arch, ("-std=c++17", "-O3", f"-I{ROOT / 'csrc' / 'include'}"))


@contextlib.contextmanager
def simulated_gpu(*, preferred: bool = False, target: int | None = None, **sim):
    """Yields the list of simulator reports, one a launch. A shared-memory race raises.

    target: compute capability; 80, 86, 89, 120 (mma.sync), 90 (wgmma) or 100 (tcgen05). None: pytest's --target.
    preferred: backends for CPU tensors are chosen as on a GPU, not only when one is forced.
    """
    target = target or TARGET
    options = {"check_races": "error", **sim}
    with ptxsim.patched_triton(target=target, sim=options) as log:

        def launch(source, kernel, grid, block, args, shared_bytes):
            text = cuda_ptx(source, f"sm_{target}")
            report = ptxsim.run(text, kernel, tuple(grid), block, list(args), shared_bytes, **options)
            log.append(report)

        with _gpu.stand_in("simulator", launch, preferred=preferred, capability=target):
            yield log


@contextlib.contextmanager
def host_reads():
    """Inside `simulated_gpu(preferred=True)`: yields the names of what waited for the device (`reads`), in order."""
    seen, report_of = [], packed.report_of
    on_host = mock.patch.object(packed, "report_of", lambda *args: report_of(*args).as_subclass(OnHost))
    with on_host, reads(seen.append, aside=((ptxsim, "run"), (ptxsim.frontend, "run_triton"))):
        yield seen


@functools.cache
def memory():
    """7 GB of addresses, most of which nobody touches."""
    return torch.empty(7 * 2**30, dtype=torch.uint8)


def far(like, axis, number=0, index=-1):
    """A copy of `like`: `index` along `axis` is at least 2^31 elements from the first; several numbers can coexist."""
    step = -(-(2**31) // (index % like.shape[axis]) // 64) * 64
    strides = list(torch.empty(like[(slice(None),) * axis + (slice(1),)].shape, device="meta").stride())
    strides[axis] = step
    return memory().view(like.dtype).as_strided(like.shape, strides, 2**16 * number).copy_(like)


class Tf32Products(TorchDispatchMode):
    """Products of plain torch in float32 as on a GPU that may use tf32: operands rounded to 11 bits, to nearest."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operands = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
        first = operands.get(function._schema.name)
        if first is not None and args[first].dtype == torch.float32:
            bits = [t.contiguous().view(torch.int32) for t in args[first : first + 2]]
            args = [*args[:first], *(((b + 0x1000) & ~0x1FFF).view(torch.float32) for b in bits), *args[first + 2 :]]
        return function(*args, **(kwargs or {}))


def backends(*names: str):
    """Run a test on each backend: parametrizes the fixture `backend`, which enters what the backend needs."""
    return pytest.mark.parametrize("backend", names, indirect=True)
