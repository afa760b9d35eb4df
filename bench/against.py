"""Every op at every case of the catalogue against another commit: times in turn, and whether the bits are the same.

    python -m bench.against REF [-k REGEX] [--dtype float32 bfloat16] [--rounds 15] [--least 0.97]

Builds REF in `out/against/`, once a commit. A process for each side makes the same inputs and waits; samples are taken
in turn, so that drift of the machine cancels, on the CPU. Prints the medians over rounds, and REF's time over this
tree's. Exits 1 where that is less than `--least` in two measurements.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = 0.02  # seconds, at least
ROW = 10.0  # seconds, beyond three rounds


def build(ref: str) -> Path:
    """A built copy of a commit."""
    sha = subprocess.check_output(["git", "rev-parse", "--short", f"{ref}^{{commit}}"], cwd=ROOT, text=True).strip()
    tree = ROOT / "out" / "against" / sha
    if not list(tree.glob("ivl_kernels/_C.*")):
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
        if not tree.exists():
            subprocess.run(["git", "worktree", "add", "--detach", str(tree), sha], cwd=ROOT, check=True)
        environment = os.environ | {"IVL_BUILD_CPU": "1", "IVL_BUILD_CUDA": "0"}
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=environment, check=True
        )
    return tree


class Side:
    """A process that imports one tree."""

    def __init__(self, tree: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '["failed", "its process ended"]')
        if answer[0] == "failed":
            raise RuntimeError(answer[1])
        return answer[1]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def serve() -> None:
    """The process of a side: a request and an answer a line. Only what every commit has may be imported."""
    answers, sys.stdout = sys.stdout, sys.stderr

    import torch

    from ivl_kernels.testing.cases import Numbers, all_cases, cast, forward_backward

    cases = {case.title: case for case in all_cases(large=True)}
    chosen: Any = None

    def run() -> Any:
        case, inputs, training = chosen
        if training:
            return forward_backward(case, inputs, "")
        with torch.no_grad():
            return case.call(inputs, "")

    def digest(result: Any) -> str:
        found = hashlib.sha256()
        for tensor in [result] if isinstance(result, torch.Tensor) else result:
            found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def answer(kind: str, *rest: Any) -> Any:
        nonlocal chosen
        if kind == "titles":
            return {title: bool(case.gradients) for title, case in cases.items()}
        if kind == "choose":  # the bits of the result, and seconds of a call
            title, dtype, training = rest
            case = cases[title]
            chosen = case, cast(case.inputs(Numbers()), getattr(torch, dtype), "cpu"), training
            bits = digest(run())
            start = time.perf_counter()
            run()
            return bits, time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(rest[0]):
            run()
        return (time.perf_counter() - start) / rest[0]

    for line in sys.stdin:
        try:
            found = "done", answer(*json.loads(line))
        except Exception as error:
            found = "failed", f"{type(error).__name__}: {error}"
        print(json.dumps(found), file=answers, flush=True)


def compare(sides: list[Side], title: str, dtype: str, training: bool, rounds: int) -> dict[str, Any]:
    """Medians of this tree and the other, the ratio of the other's to this one's, and whether bits are equal."""
    bits, seconds = zip(*(side.ask("choose", title, dtype, training) for side in sides))
    calls = max(1, round(SAMPLE / max(seconds)))
    times: list[list[float]] = [[], []]
    for i in range(min(rounds, max(3, int(ROW / (calls * sum(seconds)))))):
        for k in (0, 1) if i % 2 else (1, 0):
            times[k].append(sides[k].ask("sample", calls))
    ratio = median(b / a for a, b in zip(*times))
    return {"here": median(times[0]), "there": median(times[1]), "ratio": ratio, "equal": bits[0] == bits[1]}


def rows(sides: list[Side], pattern: str, dtypes: list[str], rounds: int, least: float) -> Iterator[tuple[str, Any]]:
    """(name, what `compare` gives, or why there is nothing)."""
    here, there = (side.ask("titles") for side in sides)
    for title in here:
        if not re.search(pattern, title):
            continue
        for dtype in dtypes if title in there else dtypes[:1]:
            for training in (False, True) if here[title] else (False,):
                name = f"{title}, {dtype}" + ", with gradients" * training
                if title not in there:
                    yield name, "not there"
                    break
                try:
                    found = compare(sides, title, dtype, training, rounds)
                    if found["ratio"] < least:
                        found = compare(sides, title, dtype, training, rounds)
                except RuntimeError as error:
                    yield name, f"failed: {error}"
                else:
                    yield name, found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", help="the other commit")
    parser.add_argument("-k", default="", metavar="REGEX", help="only cases whose title matches")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--least", type=float, default=0.97)
    args = parser.parse_args(argv)
    sides = [Side(ROOT), Side(build(args.ref))]
    slower = 0
    try:
        print(f"| | here | {args.ref} | {args.ref} / here | bits |\n| --- | --- | --- | --- | --- |")
        for name, found in rows(sides, args.k, args.dtype, args.rounds, args.least):
            if isinstance(found, str):
                print(f"| {name} | {found} | | | |", flush=True)
                slower += found != "not there"
                continue
            here, there = (f"{1e3 * found[side]:.3g} ms" for side in ("here", "there"))
            bits = "equal" if found["equal"] else "differ"
            print(f"| {name} | {here} | {there} | {found['ratio']:.2f} | {bits} |", flush=True)
            slower += found["ratio"] < args.least
    finally:
        for side in sides:
            side.close()
    print(f"\n{slower} slower than {args.least} of {args.ref}, or failed")
    return 1 if slower else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        sys.path[0] = os.environ["PYTHONPATH"]
        serve()
    else:
        sys.exit(main())
