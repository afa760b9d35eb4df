"""`ivl-kernels gpu-check`: one command that proves the ops on this machine's GPU and prints the honest table.

Correctness of every op, backend and dtype, forward and backward, against float64; determinism; CUDA graphs; sizes past
2^31; compute-sanitizer; an end-to-end patched model; and the benchmark table. `--device cpu` rehearses the same code
on the CPU. No network. One JSON and one Markdown report; exit code 1 when anything fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import CommandError, _gpu_checks
from . import bench as bench_command
from ._gpu_checks import Result

SECONDS = 400  # after this no benchmark case is started, so that everything ends within 8 minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder of the reports")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the same code path")
    parser.add_argument("--no-bench", action="store_true", help="leave the benchmark table out")
    parser.add_argument("-k", default="", metavar="TEXT", help="only cases whose title contains this")


def run(args: argparse.Namespace) -> int:
    import torch

    start = time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("no CUDA device is available; --device cpu rehearses the check on the CPU")
    results: list[Result] = []
    for check in _gpu_checks.CHECKS:
        for result in _all(check, args.device, args.k):
            results.append(result)
            print(f"{result.status:8} {result.check}: {result.subject} {result.detail}".rstrip(), flush=True)
    if not results:
        raise CommandError(f"-k: no case's title contains '{args.k}'")
    environment = _environment(args.device)
    _write(args.out, environment, results, {})  # the benchmark cannot take this away
    if not args.no_bench:
        bench: dict[str, Any] = {}
        left = SECONDS - (time.monotonic() - start)
        table = _gpu_checks.guard("benchmark", "the quick table", lambda: bench.update(_bench(args, left)) or "")
        rows = [r for r in bench.get("rows", []) if not r["ok"]]
        results += [table] + [
            Result("benchmark", f"{r['op']}: {r['name']}", "FAILED", r["variants"]["ours"]["failed"]) for r in rows
        ]
        _write(args.out, environment, results, bench)
    failed = [r for r in results if r.status == "FAILED"]
    for result in failed:
        print(f"FAILED   {result.check}: {result.subject} {result.detail}"[:300])
    counts = {s: sum(r.status == s for r in results) for s in ("ok", "FAILED", "skipped")}
    print(
        f"{counts['ok']} ok, {counts['FAILED']} failed, {counts['skipped']} skipped in "
        f"{time.monotonic() - start:.0f} s; reports in {args.out}"
    )
    return 1 if failed else 0


def _all(check: Callable[[str, str], Iterator[Result]], device: str, pattern: str) -> Iterator[Result]:
    """The results of one check; one that breaks off is a failure, not the end of the others."""
    try:
        yield from check(device, pattern)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        yield Result(check.__name__, "broke off", "FAILED", f"{type(error).__name__}: {error}")


def _write(folder: Path, environment: dict[str, Any], results: list[Result], bench: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "results": [asdict(r) for r in results]}
    content["bench"] = {name: value for name, value in bench.items() if name != "markdown"}
    (folder / "gpu_check.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    (folder / "gpu_check.md").write_text(_markdown(environment, results, bench))


def _bench(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The quick benchmark table, from the repository's runner: the ops in turn, in the time that is left."""
    try:
        bench_command.repository()
    except CommandError as missing:
        return {"skipped": str(missing)}
    options = ["--quick", "--within", str(max(0.0, seconds)), "--out", str(args.out), "--name", "bench"]
    found = args.out / "bench.json"
    found.unlink(missing_ok=True)
    if args.device == "cuda":
        import torch

        torch.cuda.empty_cache()  # the benchmark is another process
    status = bench_command.runner(options, IVL_BENCH_DEVICE=args.device)
    assert found.exists(), f"the benchmark ended with {status}"
    return json.loads(found.read_text()) | {"markdown": found.with_suffix(".md").read_text()}


def _environment(device: str) -> dict[str, Any]:
    import datetime

    import torch

    from .. import doctor

    found = doctor.collect()
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else "CPU (a rehearsal, no GPU)",
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        **{name: found[name] for name in ("package", "versions", "cpu", "gpus", "built")},
    }


def _markdown(environment: dict[str, Any], results: list[Result], bench: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v != "not installed")
    lines = ["# GPU check", "", f"{environment['name']}; {environment['date']}; {versions}.", ""]
    lines += ["| status | check | subject | detail | s |", "| --- | --- | --- | --- | --- |"]
    for r in sorted(results, key=lambda r: r.status != "FAILED"):
        detail = " ".join(r.detail.split())[:300].replace("|", "\\|")
        lines.append(f"| {r.status} | {r.check} | {r.subject} | {detail} | {r.seconds:.1f} |")
    text = "\n".join(lines) + "\n"
    if "rows" in bench:
        text += "\n" + bench["markdown"]
    else:
        text += f"\nNo benchmark: {bench.get('skipped', 'left out')}.\n"
    return text
