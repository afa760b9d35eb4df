"""Counters of the PTX simulator at scaled-down shapes, for us, Liger-Kernel and eager."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from ivl_kernels import _dispatch
from ivl_kernels.testing.cases import Cost, Shape

from .subjects import SUBJECTS, Job, run


def counters(job: Job, backend: str, direction: str, call: Callable[[], Any]) -> list[dict[str, Any]]:
    """One row a launch, from the simulator."""
    from tests.simulator.gpu import simulated_gpu

    with simulated_gpu(preferred=True) as log, _dispatch.preferring(backend):
        return [_counted(report) for report in run(job, call, direction, log)]


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


def totals(launches: list[dict[str, Any]], cost: Cost) -> dict[str, Any]:
    """Sums over an op's launches; for each kernel launches, sectors over distinct bytes, and bank conflicts."""
    total = {key: sum(row[key] for row in launches) for key in _counted_keys}
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in launches:
        kernels.setdefault(row["kernel"], []).append(row)
    return {
        "launches": len(launches),
        **total,
        "least": cost.least,
        "planned": cost.moved,
        "elements": cost.elements,
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

    from bench.measure import tensors

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

    eager = job.case.plain
    assert eager is not None
    with Recorder():
        return run(job, lambda: eager(job.inputs), direction, rows)


def counted_rows(name: str, shape: Shape, dtype: str, others: bool = True) -> list[dict[str, Any]]:
    """One row for each direction and each way to do it: ours and, unless `others` is off, peers' and eager's."""
    job = Job(name, shape, dtype)
    whos: list[tuple[str, Callable[[], Any]]] = [(backend, job.call) for backend in SUBJECTS[name].backends]
    if others:
        whos += [(who, functools.partial(peer, job.inputs)) for who, peer in job.case.peers.items()]
    rows = []
    for direction in job.directions:
        key = {"op": name, "shape": shape.name, "dtype": dtype, "direction": direction}
        for who, call in whos:
            rows.append({**key, "who": who, **totals(counters(job, who, direction, call), job.cost(direction))})
        if others and job.case.plain:
            chain = eager_chain(job, direction)
            requested = sum(row["bytes"] for row in chain)
            rows.append(
                {**key, "who": "eager", "launches": len(chain), "requested_bytes": requested,
                 "least": job.cost(direction).least, "kernels": dict(Counter(row["kernel"] for row in chain))}
            )  # fmt: skip
    return rows
