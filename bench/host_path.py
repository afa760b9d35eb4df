"""Host time of a call on a GPU: what Python, torch's dispatcher and Triton's launcher cost before a kernel starts.

    python -m bench.host_path [-k REGEX] [--seconds 5] [--json FILE]

No GPU is needed: the driver returns at once, tensors lie on the CPU, kernels are compiled for sm_90 but never run.
Every case without gradients is called, again and again as the layers of a model are (`ivl_kernels._plan`), and what
transformers calls instead of some, for one token, whose arithmetic counts for little. The second column is a call that
no plan is found for, as the first at a shape. CPU time of this process, the least over short batches with the calls in
turn. A real driver adds 4 to 5 us a launch, a launch of CUDA C++ 6 us of ctypes, and a host read the wait.
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

from bench.runner import environment
from ivl_kernels import ops
from ivl_kernels._plan import unplanned
from ivl_kernels.testing.cases import Numbers, all_cases, cast
from tests.simulator.idle import CAPABILITY, Idle, idle_gpu

BATCH = 10  # calls


def ours(pattern: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(title, call) of every case that promises not to wait for the device, in bfloat16, and of packing."""
    for case in all_cases():
        if case.graph and re.search(pattern, case.title):
            inputs = cast(case.inputs(Numbers()), torch.bfloat16, "cpu")
            yield case.title, lambda call=case.call, inputs=inputs: call(inputs, "")
    for name, call in packing().items():
        if re.search(pattern, name):
            yield name, call


def packing() -> dict[str, Callable[[], Any]]:
    """Two tiles in a row of text; each reads from the device but `embed_text`."""
    ids = torch.zeros(1, 600, dtype=torch.int64)
    ids[:, 20:532] = 7
    embeds, rows, table = (torch.zeros(*shape, 64).bfloat16() for shape in ((1, 600), (512,), (10,)))
    compress, mask = torch.tensor([True, False]), torch.ones_like(ids)
    return {
        "embed_text: 600 ids": lambda: ops.embed_text(ids, table, 7),
        "place_rows: in place, 512 rows": lambda: ops.place_rows(embeds, ids, rows, 7, inplace=True),
        "pack_tokens: two tiles, with embeddings": lambda: ops.pack_tokens(
            ids, compress, 7, attention_mask=mask, embedding=table
        ),
    }


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
    rows, weight, bias, out = (torch.zeros(*shape).bfloat16() for shape in ((48, 20), (28, 20), (28,), (48, 28)))
    product = "torch: the projector's last product, which here the CPU computes"
    yield product, lambda: torch.addmm(bias, rows, weight.t(), out=out)


def measure(calls: dict[str, Callable[[], Any]], idle: Idle, seconds: float) -> list[dict[str, Any]]:
    """Microseconds and launches a call."""
    rows = []
    for name, call in calls.items():
        call()  # compiles
        before = idle.launches
        call()
        rows.append({"name": name, "launches": idle.launches - before, "us": float("inf"), "first us": float("inf")})
        call()  # the second time it was recorded
    end = time.monotonic() + seconds * len(rows)
    while time.monotonic() < end:
        for row, call in zip(rows, calls.values()):
            row["us"] = min(row["us"], timed(call, BATCH))
            with unplanned():
                row["first us"] = min(row["first us"], timed(call, BATCH))
    return rows


def timed(call: Callable[[], Any], count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser("bench.host_path", description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", metavar="REGEX", help="only cases whose title matches")
    parser.add_argument("--seconds", type=float, default=2, help="a call")
    parser.add_argument("--json", type=Path, help="bench/results/host_path.json is part of the next bench.inspect")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with idle_gpu() as idle:
        rows = measure({**dict(ours(args.k)), **dict(eager())}, idle, args.seconds)
    for row in rows:
        print(f"{row['us']:8.1f} us  {row['first us']:8.1f} us  {row['launches']:3d} launches  {row['name']}")
    if args.json:
        setup = {"machine": environment()["device"], "capability": CAPABILITY, "torch": torch.__version__}
        found = {**setup, "calls": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
