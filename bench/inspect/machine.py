"""Machine code for every target at the catalogue's shapes: registers, spills, shared memory, access widths."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from ivl_kernels._targets import NVIDIA
from ivl_kernels._targets import TARGETS as TABLE
from ivl_kernels.testing.cases import Shape

from .subjects import SUBJECTS, Job, run

TARGETS = (*NVIDIA, "gfx942")
ACCESS = re.compile(r"\b(ld|st)\.global((?:\.[A-Za-z_]\w*(?:::\w+)*)*?)(?:\.v(\d+))?\.[bfus](\d+)\b")


def access_widths(ptx: str) -> dict[str, int]:
    """How many global loads and stores of each width, in bytes, the PTX holds; cp.async counts as a load.

    Bulk copies of tensors count apart, whatever they bring.
    """
    found: Counter[str] = Counter()
    for kind, _, vector, bits in ACCESS.findall(ptx):
        found[f"{kind}{int(vector or 1) * int(bits) // 8}"] += 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|[0-9]+)", ptx):
        found[f"ld{int(size, 0)}"] += 1
    for kind in re.findall(r"cp\.async\.bulk\.tensor\.[^;]*?\.(shared|global)", ptx):
        found["ldbulk" if kind == "shared" else "stbulk"] += 1
    return dict(sorted(found.items()))


TENSOR_CORES = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)"


def occupancy(target: int, threads: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's threads that can be resident."""
    gpu = TABLE[target]
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps) if registers else gpu.blocks
    by_shared = gpu.shared // (shared + 1024) if shared else gpu.blocks
    return min(gpu.threads // threads, by_registers, by_shared, gpu.blocks) * threads / gpu.threads


@contextlib.contextmanager
def no_products() -> Iterator[None]:
    """The vendor's products give memory that nothing wrote: only shapes matter where nothing runs."""

    def into(out: torch.Tensor) -> torch.Tensor:
        return out

    products: dict[str, Callable[..., torch.Tensor]] = {
        "mm": lambda a, b: a.new_empty(a.shape[0], b.shape[1]),
        "mm.out": lambda a, b, *, out: into(out),
        "addmm": lambda c, a, b, **_: a.new_empty(a.shape[0], b.shape[1]),
        "addmm.out": lambda c, a, b, *, out, **_: into(out),
        "bmm": lambda a, b: a.new_empty(a.shape[0], a.shape[1], b.shape[2]),
        "baddbmm": lambda c, a, b, **_: a.new_empty(a.shape[0], a.shape[1], b.shape[2]),
    }
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in products.items():
            library.impl(name, function, "CPU")
    try:
        yield
    finally:
        library._destroy()


def gpu_launches(job: Job, backend: str, target: Any, direction: str) -> list[Any]:
    """What would be launched: rows of kernels in CUDA C++, `aot.Launch` for those in Triton."""
    from ivl_kernels import _dispatch, _gpu
    from tests.simulator import aot

    log: list[Any] = []

    def launch(source: str, kernel: str, grid: Any, block: int, args: Any, shared: int) -> None:
        row = dict(cuda_resources(source, target)[kernel])
        row["shared"] += shared
        log.append({"kernel": kernel, "target": target, "threads": block, **row})

    amd = isinstance(target, str)
    with (
        aot.compiling(target, log, make=lambda launch: launch),
        no_products(),
        _gpu.stand_in("compiler", None if amd else launch, preferred=True, capability=0 if amd else target),
        _dispatch.preferring(backend),
    ):
        return run(job, job.call, direction, log)


_pending: list[Any] = []  # launches do not pickle: forked processes find them here


def _compile(index: int) -> dict[str, Any]:
    return _described(_pending[index].compile(), _pending[index].target)


def compile_all(launches: Sequence[Any], jobs: int) -> dict[str, dict[str, Any]]:
    """What the compiler made of each distinct launch, by its key."""
    distinct = {launch.key: launch for launch in launches}
    _pending[:] = distinct.values()
    if jobs == 1:
        return dict(zip(distinct, map(_compile, range(len(distinct)))))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        return dict(zip(distinct, pool.map(_compile, range(len(distinct)))))


def _described(entry: Any, target: Any) -> dict[str, Any]:
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry.asm)
    return {
        "kernel": entry.kernel,
        "target": target,
        "threads": int(threads.group(1)) if threads else 0,
        "registers": entry.registers,
        "spills": entry.spills,
        "shared": entry.shared,
        "tensor_core_instructions": entry.count(TENSOR_CORES),
        "widths": access_widths(entry.asm),
    }


@functools.cache
def cuda_resources(source: str, target: int) -> dict[str, dict[str, Any]]:
    """kernel -> registers, spills, static shared bytes and access widths of csrc/cuda/<source>.cu."""
    from tests.simulator.gpu import cuda_ptx
    from tests.simulator.ptxsim.frontend import resources

    ptx = cuda_ptx(source, f"sm_{target}")
    entries = {re.match(r"\w+", part)[0]: part for part in ptx.split(".entry ")[1:]}  # type: ignore[index]
    return {
        kernel: {
            "registers": used["registers"],
            "spills": used["spill_stores"] + used["spill_loads"],
            "shared": used["static_shared"],
            "tensor_core_instructions": 0,
            "widths": access_widths(entries[kernel]),
        }
        for kernel, used in resources(ptx).items()
    }


def machine_rows(
    name: str, dtype: str, shapes: Sequence[tuple[Shape, list[str]]], targets: Sequence[Any], jobs: int
) -> list[dict[str, Any]]:
    """A row for each kernel, shape, direction, backend and target; alike launches count in one."""
    made: list[tuple[dict[str, Any], list[Any]]] = []
    for shape, models in shapes:
        job = Job(name, shape, dtype)
        key = {"op": name, "models": models, "tokens": shape.tokens, "dtype": dtype}
        made += [
            ({**key, "direction": direction, "backend": backend}, gpu_launches(job, backend, target, direction))
            for target in targets
            for backend in SUBJECTS[name].backends
            for direction in job.directions
            if not (isinstance(target, str) and backend == "cuda")
        ]
    code = compile_all([one for _, launches in made for one in launches if not isinstance(one, dict)], jobs)
    rows = []
    for key, launches in made:
        found = [json.dumps(one if isinstance(one, dict) else code[one.key]) for one in launches]
        rows += [{**key, **json.loads(row), "launches": count} for row, count in Counter(found).items()]
    for row in rows:
        if row["target"] in NVIDIA and row["threads"]:
            share = occupancy(row["target"], row["threads"], row["registers"], row["shared"])
            row["occupancy"] = round(share, 3)
    return rows
