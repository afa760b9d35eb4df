"""The one benchmark runner: `python -m bench`.

What there is to time comes from the cases of `ivl_kernels.testing.cases` and, where an op is compared with more than
plain torch, from files `bench_<op>.py`. Nothing is allocated until a case's turn comes:

    def cases(quick: bool) -> Iterator[Case]:
        yield Case("my_op", "5 tiles", {"tiles": 5}, make=lambda: make(5), bytes=2 * 5 * 4096)

    def make(tiles) -> Work:
        x = torch.randn(tiles, 1024, device=device())
        return Work({"ours": lambda: ours(x), "eager": lambda: eager(x), "compile": compiled(eager, x)},
                    truth=lambda: eager(x.double()))
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import importlib
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ivl_kernels.testing import cases as of_ops

from . import from_cases
from .measure import Case, copy_rate, device, gemm_rate, on_gpu, run_case

ROOT = Path(__file__).resolve().parent.parent
# One glibc arena that never returns memory: page faults then happen once, whoever allocates.
FRIENDLY_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def environment() -> dict[str, Any]:
    """Where and with what the numbers were taken."""

    def git(*args: str) -> str:
        try:
            return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    def version(package: str) -> str:
        import importlib.metadata

        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "device": torch.cuda.get_device_name() if on_gpu() else (model.group(1) if model else platform.processor()),
        "device_type": device(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "allocator": "friendly" if all(os.environ.get(k) == v for k, v in FRIENDLY_ALLOCATOR.items()) else "default",
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "triton", "transformers", "liger-kernel")},
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def find_ops() -> list[str]:
    """Names of what can be timed: the ops whose cases have a timetable, and those with a `bench_<op>.py`."""
    timed = {name for name in of_ops.names() if hasattr(of_ops.module(name), "timed")}
    return sorted(timed | {f.stem.removeprefix("bench_") for f in (ROOT / "bench").glob("bench_*.py")})


def chosen(op: str) -> list[str]:
    """The names that `op` stands for: itself, or else all that begin with it (moe: moe_experts, moe_routing)."""
    names = find_ops()
    return [op] if op in names else [name for name in names if name.startswith(f"{op}_")]


def load_cases(ops: Iterable[str], quick: bool, pattern: str = "") -> Iterator[Case]:
    for op in dict.fromkeys(name for asked in ops for name in chosen(asked)):
        found: list[Iterable[Case]] = []
        if op in of_ops.names() and hasattr(of_ops.module(op), "timed"):
            found.append(map(from_cases.case, of_ops.module(op).timed(quick)))
        if (ROOT / "bench" / f"bench_{op}.py").exists():
            found.append(importlib.import_module(f"bench.bench_{op}").cases(quick))
        for case in itertools.chain.from_iterable(found):
            if re.search(pattern, f"{case.op}: {case.name}"):
                yield case


def in_turn(ops: Iterable[str], quick: bool, pattern: str, seconds: float) -> Iterator[Case]:
    """The first case of each op, then the second, and no new one after so many seconds."""
    start = time.monotonic()
    left = [load_cases([op], quick, pattern) for op in ops]
    for case in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*left))):
        if time.monotonic() - start > seconds:
            print("no time for the other benchmark cases")
            return
        yield case


def run(cases: Iterable[Case], quick: bool = False) -> dict[str, Any]:
    """Run all cases, printing a line for each; the content of the JSON. Interrupted, it keeps the cases it finished."""
    from . import report

    rows: list[dict[str, Any]] = []
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for case in cases:
            rows.append(run_case(case, quick))
            print(report.line(rows[-1]), flush=True)
            gc.collect()
    except KeyboardInterrupt:
        print(f"interrupted after {len(rows)} cases", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, terminate)
    rates = {str(d).removeprefix("torch."): gemm_rate(d) for d in sorted({torch.float32} | _dtypes(rows), key=str)}
    return {
        "environment": environment() | {"quick": quick},
        "limits": {"copy_bytes_per_s": copy_rate(), "gemm_flops_per_s": rates},
        "rows": rows,
    }


def _dtypes(rows: list[dict[str, Any]]) -> set[torch.dtype]:
    return {getattr(torch, row["dtype"]) for row in rows if row["flops"]}


def write(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """<stem>.json, .csv, .md and, with matplotlib, .png."""
    from . import report

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(report.markdown(result))
    with open(folder / f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, report.CSV_COLUMNS)
        writer.writeheader()
        writer.writerows(report.csv_rows(result))
    paths = [folder / f"{stem}.{ending}" for ending in ("json", "md", "csv")]
    try:
        report.plot(result, folder / f"{stem}.png")
        paths.append(folder / f"{stem}.png")
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench", description="Time the ops against eager, torch.compile and peers.")
    parser.add_argument("--op", action="append", default=[], help=f"one of {', '.join(find_ops())}; may repeat")
    parser.add_argument("-k", default="", metavar="REGEX", help="only cases whose 'op: name' matches")
    parser.add_argument("--quick", action="store_true", help="few shapes, about a second each")
    parser.add_argument("--list", action="store_true", help="print the cases and exit")
    parser.add_argument(
        "--within", type=float, metavar="SECONDS", help="take the ops in turn; start no case after that"
    )
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument(
        "--allocator",
        choices=["default", "friendly"],
        default="default",
        help="friendly: start again with glibc told to keep its memory, so that page faults cost nobody",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench", help="folder of the reports")
    parser.add_argument("--name", default="", help="stem of the report files (default: the op or 'all')")
    parser.add_argument("--report", type=Path, metavar="JSON", help="render Markdown, CSV and PNG of an earlier run")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="exit 1 if NEW is slower")
    parser.add_argument("--margin", type=float, default=0.1, help="what --compare tolerates, as a share")
    args = parser.parse_args(argv)

    from . import report

    if args.compare:
        old, new = (json.loads(path.read_text()) for path in args.compare)
        text, regressions = report.compare(old, new, args.margin)
        print(text)
        return 1 if regressions else 0
    if args.report:
        for path in write(json.loads(args.report.read_text()), args.out, args.name or args.report.stem):
            print(path)
        return 0
    unknown = sorted(op for op in set(args.op) if not chosen(op))
    if unknown:
        parser.error(f"--op: no benchmark for {', '.join(unknown)}; there are {', '.join(find_ops())}")
    ops = args.op or find_ops()
    if args.list:
        for case in load_cases(ops, args.quick, args.k):
            print(f"{case.op}: {case.name}")
        return 0
    if args.allocator == "friendly" and any(os.environ.get(k) != v for k, v in FRIENDLY_ALLOCATOR.items()):
        rest = list(sys.argv[1:] if argv is None else argv)
        os.execve(sys.executable, [sys.executable, "-m", "bench", *rest], os.environ | FRIENDLY_ALLOCATOR)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.within is None:
        cases = load_cases(ops, args.quick, args.k)
    else:
        cases = in_turn(ops, args.quick, args.k, args.within)
    result = run(cases, args.quick)
    stem = args.name or (ops[0] if len(ops) == 1 else "all")
    for path in write(result, args.out, stem):
        print(path)
    return 0 if all(row["ok"] for row in result["rows"]) else 1
