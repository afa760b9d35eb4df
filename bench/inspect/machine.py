"""Machine code for every target at the catalogue's shapes: registers, spills, shared memory, access widths."""

from __future__ import annotations

import contextlib
import functools
import json
import math
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


LOAD = re.compile(r"\bld\.global\S*?(?:\.v(\d+))?\.[bfus](\d+)\s+(\{[^}]*\}|%\w+)")
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|[0-9]+)")
BULK = re.compile(r"mbarrier\.arrive\.expect_tx[^;]*,\s*(\d+)\s*;")


def bytes_in_flight(ptx: str, warps: int) -> int:
    """Most bytes that a warp has asked of global memory before it uses any of them, in the order of the PTX's text.

    Loads into registers end where a register is read, asynchronous copies where their group is waited for, bulk copies
    where an mbarrier is; a block's warps share the latter. ptxas may move loads further up.
    """
    loads: dict[str, int] = {}  # by first register; the others' are its
    owner: dict[str, str] = {}
    groups, copied, bulk, most = [], 0, [], 0
    for line in ptx.split(";"):
        line += ";"
        load = LOAD.search(line)
        read = re.findall(r"%\w+", line[load.end() :] if load else line)
        for register in read:
            loads.pop(owner.pop(register, ""), None)
        if load:
            registers = re.findall(r"%\w+", load[3])
            loads[registers[0]] = int(load[1] or 1) * int(load[2]) // 8
            owner |= dict.fromkeys(registers, registers[0])
        elif found := COPY.search(line):
            copied += int(found[1], 0)
        elif "cp.async.commit_group" in line:
            groups.append(copied)
            copied = 0
        elif found := re.search(r"cp\.async\.wait_group\s+(\d+)", line):
            groups = groups[len(groups) - int(found[1]) :] if int(found[1]) else []
        elif found := BULK.search(line):
            bulk.append(int(found[1]))
        elif "mbarrier.try_wait" in line:
            bulk = bulk[1:]
        most = max(most, 32 * (sum(loads.values()) + copied + sum(groups)) + sum(bulk) // warps)
    return most


TENSOR_CORES = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)"


def blocks(target: int, threads: int, registers: int, shared: int) -> int:
    """That can be resident on a multiprocessor."""
    gpu = TABLE[target]
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps) if registers else gpu.blocks
    by_shared = gpu.shared // (shared + 1024) if shared else gpu.blocks
    return min(gpu.threads // threads, by_registers, by_shared, gpu.blocks)


def occupancy(target: int, threads: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's threads that can be resident."""
    return blocks(target, threads, registers, shared) * threads / TABLE[target].threads


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
        warps = math.prod(grid) * -(-block // 32)
        log.append({"kernel": kernel, "target": target, "threads": block, **row, "warps": warps})

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
    in_flight = {"in_flight": bytes_in_flight(entry.asm, int(threads[1]) // 32)} if threads else {}
    return {
        "kernel": entry.kernel,
        "target": target,
        "threads": int(threads.group(1)) if threads else 0,
        "registers": entry.registers,
        "spills": entry.spills,
        "shared": entry.shared,
        "tensor_core_instructions": entry.count(TENSOR_CORES),
        "mbarriers": entry.count(r"mbarrier\.try_wait"),
        "widths": access_widths(entry.asm),
        **in_flight,
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
            "mbarriers": 0,
            "widths": access_widths(entries[kernel]),
            "in_flight": bytes_in_flight(entries[kernel], 1),
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
        found = [json.dumps(one if isinstance(one, dict) else _launched(code[one.key], one.grid)) for one in launches]
        rows += [{**key, **json.loads(row), "launches": count} for row, count in Counter(found).items()]
    for row in rows:
        if row["target"] in NVIDIA and row["threads"]:
            share = occupancy(row["target"], row["threads"], row["registers"], row["shared"])
            row["occupancy"] = round(share, 3)
    return rows


def _launched(row: dict[str, Any], grid: tuple[int, ...]) -> dict[str, Any]:
    return row | ({"warps": math.prod(grid) * row["threads"] // 32} if row["threads"] else {})
