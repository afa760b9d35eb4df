"""Counters of the PTX simulator at scaled-down shapes, for us, Liger-Kernel and eager."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from .subjects import SUBJECTS, Job, Shape, directions, dtype_name, forced, run


def counters(job: Job, backend: str, direction: str, call: Callable[[], Any] | None = None) -> list[dict[str, Any]]:
    """One row a launch, from the simulator."""
    from tests.simulator.gpu import simulated_gpu

    with simulated_gpu(preferred=True) as log, forced(backend):
        return [_counted(report) for report in run(job, call or job.call, direction, log)]


def _counted(report: Any) -> dict[str, Any]:
    return {
        "kernel": report.kernel,
        "requested_bytes": report.global_load_bytes + report.global_store_bytes,
        "sector_bytes": 32 * (report.global_load_sectors + report.global_store_sectors),
        "unique_bytes": report.unique_load_bytes + report.unique_store_bytes,
        "instructions": report.warp_instructions,
        "thread_instructions": sum(report.thread_instructions.values()),
        "mma_flops": report.mma_flops,
        "bank_conflicts": report.bank_conflicts,
        "shared_races": report.shared_races,
    }


def totals(launches: list[dict[str, Any]], job: Job, direction: str) -> dict[str, Any]:
    """Sums over an op's launches; for each kernel launches, sectors over distinct bytes, and bank conflicts."""
    total = {key: sum(row[key] for row in launches) for key in _counted_keys}
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in launches:
        kernels.setdefault(row["kernel"], []).append(row)
    return {
        "launches": len(launches),
        **total,
        "least": job.least if direction == "forward" else job.least_backward,
        "elements": job.elements,
        "kernels": {
            name: {
                "launches": len(rows),
                "sector_bytes": sum(row["sector_bytes"] for row in rows),
                "unique_bytes": sum(row["unique_bytes"] for row in rows),
                "mma": any(row["mma_flops"] for row in rows),
            }
            for name, rows in kernels.items()
        },
    }


_counted_keys = (
    "requested_bytes", "sector_bytes", "unique_bytes", "instructions", "thread_instructions", "mma_flops",
    "bank_conflicts", "shared_races",
)  # fmt: skip


def eager_chain(job: Job, direction: str) -> list[dict[str, Any]]:
    """The kernels that PyTorch launches, each with the bytes of its distinct inputs and outputs; views are free."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from bench.runner import tensors

    rows: list[dict[str, Any]] = []
    free = ("empty", "detach", "alias", "new_empty", "_reshape_alias", "lift_fresh")

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.removeprefix("aten::")
            if not func.is_view and not name.startswith(free):
                touched = {id(t): t.numel() * t.element_size() for t in tensors([args, kwargs or {}, out])}
                rows.append({"kernel": name, "bytes": sum(touched.values())})
            return out

    assert job.eager is not None
    with Recorder():
        return run(job, job.eager, direction, rows)


def counted_rows(name: str, shape: Shape) -> list[dict[str, Any]]:
    """One row for each direction and each of ours, Liger-Kernel's and eager's ways to do it."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    job = subject.make(shape)
    whos: list[tuple[str, Callable[[], Any]]] = [(backend, job.call) for backend in subject.backends]
    whos += (job.peers or {}).items()
    rows = []
    for direction in directions(job):
        key = {"op": name, "shape": shape.name, "dtype": dtype_name(shape.dtype), "direction": direction}
        for who, call in whos:
            rows.append({**key, "who": who, **totals(counters(job, who, direction, call), job, direction)})
        if job.eager:
            chain = eager_chain(job, direction)
            least = job.least if direction == "forward" else job.least_backward
            counts = dict(Counter(row["kernel"] for row in chain))
            requested = sum(row["bytes"] for row in chain)
            rows.append(
                {**key, "who": "eager", "launches": len(chain), "requested_bytes": requested, "least": least,
                 "kernels": counts}
            )  # fmt: skip
    return rows
