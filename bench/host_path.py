"""Host time of a call on a GPU: what Python, torch's dispatcher and Triton's launcher cost before a kernel starts.

    python -m bench.host_path [-k REGEX] [--seconds 5] [--json FILE]

No GPU is needed: the driver returns at once, tensors lie on the CPU, kernels are compiled for sm_90 but never run.
Every case that a CUDA graph can capture is called, and what transformers calls instead of some, for one token, whose
arithmetic counts for little. CPU time of this process, the least over short batches with the calls in turn; each launch
of a real driver adds 4 to 5 us.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ivl_kernels.testing.cases import Numbers, all_cases, cast
from tests.simulator.idle import CAPABILITY, Idle, idle_gpu

BATCH = 10  # calls


def ours(pattern: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(title, call) of every case that promises not to wait for the device, in bfloat16."""
    for case in all_cases():
        if case.graph and re.search(pattern, case.title):
            inputs = cast(case.inputs(Numbers()), torch.bfloat16, "cpu")
            yield case.title, lambda call=case.call, inputs=inputs: call(inputs, "")


def eager() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What transformers calls instead."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    norm = Qwen3RMSNorm(32).bfloat16()
    q, k, cos, x = (torch.zeros(1, 1, *rest, dtype=torch.bfloat16) for rest in ((2, 32), (1, 32), (32,), (32,)))
    yield (
        "transformers: two q/k norms and the rotation",
        lambda: apply_rotary_pos_emb(norm(q).transpose(1, 2), norm(k).transpose(1, 2), cos, cos),
    )
    yield "transformers: residual and RMSNorm", lambda: norm(x + x)


def measure(calls: dict[str, Callable[[], Any]], idle: Idle, seconds: float) -> list[dict[str, Any]]:
    """Microseconds and launches a call."""
    rows = []
    for name, call in calls.items():
        call()  # compiles
        before = idle.launches
        call()
        rows.append({"name": name, "launches": idle.launches - before, "us": float("inf")})
    end = time.monotonic() + seconds * len(rows)
    while time.monotonic() < end:
        for row, call in zip(rows, calls.values()):
            start = time.process_time()
            for _ in range(BATCH):
                call()
            row["us"] = min(row["us"], (time.process_time() - start) / BATCH * 1e6)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser("bench.host_path", description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", metavar="REGEX", help="only cases whose title matches")
    parser.add_argument("--seconds", type=float, default=2, help="a call")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with idle_gpu() as idle:
        rows = measure({**dict(ours(args.k)), **dict(eager())}, idle, args.seconds)
    for row in rows:
        print(f"{row['us']:8.1f} us  {row['launches']:3d} launches  {row['name']}")
    if args.json:
        args.json.write_text(json.dumps({"capability": CAPABILITY, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
