"""A head's losses at the size of InternVL3.5-1B's (H 1,024, V 151,936): time in turns, memory in fresh processes.

    OMP_WAIT_POLICY=PASSIVE python -m bench.head ce --dtype bfloat16 --rounds 3
    python -m bench.head ce preference group kl --memory

Parts: `ce` (next-token loss in one pass and recomputed, all or some rows supervised), `evaluation`, `preference`,
`group` and `kl`, as in `bench_linear_logprob`. Every variant runs once a round, in another order each time; those of
the same loss must agree with eager in the first round, or the row says so. `--memory`: the peak of a call over its
result.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.bench_linear_logprob import VOCABULARY, WIDTH, make
from bench.measure import peak_bytes, tensors
from bench.runner import environment

PARTS = ("ce", "evaluation", "preference", "group", "kl")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # root mean square, relative, of gradients and losses


def variants(part: str, tokens: int, dtype: torch.dtype, vocabulary: int) -> dict[str, tuple[Callable[[], Any], bool]]:
    """name -> (call, it computes what `eager` computes)."""

    def work(kind: str, share: float = 1.0) -> dict[str, Callable[[], Any]]:
        return make(kind, tokens, share, dtype, WIDTH, vocabulary).variants

    if part != "ce":
        return {name: (call, True) for name, call in work(part).items()}
    found = {name: (call, True) for name, call in work("ce").items()}
    found |= {f"ours, {share:g} supervised": (work("ce", share)["ours"], False) for share in (0.25, 0.1)}
    return found | {"ours, recomputed": (work("logprob")["ours"], True)}


def differs(found: Any, expected: Any, dtype: torch.dtype) -> str:
    for mine, other in zip(tensors([found]), tensors([expected])):
        size = other.float().norm() + (other.numel() == 1)  # a loss may be 0
        error = float((mine.float() - other.float()).norm() / size)
        if not error <= TOLERANCE[dtype]:
            return f"differs by {error:.1e}"
    return ""


def times(
    calls: dict[str, tuple[Callable[[], Any], bool]], rounds: int, peers: int, dtype: torch.dtype
) -> dict[str, Any]:
    """name -> seconds of every round (of the first `peers` rounds for peers), or what is wrong with it."""
    names, found = list(calls), {name: [] for name in calls}  # type: dict[str, Any]
    expected = calls["eager"][0]()  # untimed: the largest, it also is the first to touch the process's memory
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if isinstance(found[name], str) or (i >= peers and not name.startswith(("ours", "eager"))):
                continue
            gc.collect()
            start = time.perf_counter()
            result = calls[name][0]()
            found[name].append(time.perf_counter() - start)
            wrong = differs(result, expected, dtype) if calls[name][1] and not i else ""
            found[name] = wrong or found[name]
            del result
        expected = ()
    return found


def table(label: str, found: dict[str, Any]) -> None:
    eager = found["eager"]
    for name, seconds in found.items():
        if isinstance(seconds, str):
            print(f"| {label} | {name} | {seconds} | |", flush=True)
            continue
        ratios = sorted(mine / other for mine, other in zip(seconds, eager))
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"| {label} | {name} | {', '.join(f'{s:.2f}' for s in seconds)} s | {spread} |", flush=True)


def memory(part: str, name: str, tokens: int, dtype: torch.dtype, vocabulary: int) -> None:
    """Of this process: prints the peak of one call, less the gradients it returns."""
    call = variants(part, tokens, dtype, vocabulary)[name][0]
    kept = 0

    def run() -> Any:
        nonlocal kept
        result = call()
        kept = sum(t.nbytes for t in tensors([result]))
        return result

    print(((peak_bytes(run) or 0) - kept) / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="+", choices=PARTS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=int, default=99, metavar="ROUNDS", help="rounds in which peers run too")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--memory", action="store_true", help="peak memory, a fresh process each")
    parser.add_argument("--only", nargs="+", help="these variants; `eager` is always among them")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.one:
        return memory(args.part[0], args.one, args.tokens, dtype, args.vocabulary)
    found = environment()
    print(", ".join(f"{key} {found[key]}" for key in ("device", "threads", "onednn_max_cpu_isa", "torch", "commit")))
    print(f"\n| {args.dtype} | | {'peak over the result' if args.memory else 'time'} | of eager |")
    print("| --- | --- | --- | --- |")
    for part in args.part:
        calls = variants(part, args.tokens, dtype, args.vocabulary)
        calls = {name: call for name, call in calls.items() if not args.only or name in (*args.only, "eager")}
        if not args.memory:
            table(f"{part}, {args.tokens} rows", times(calls, args.rounds, args.peers, dtype))
            continue
        for name in calls:
            again = [sys.executable, "-m", "bench.head", *sys.argv[1:], "--one", name]
            again[3:-2] = [part, *(word for word in sys.argv[1:] if word not in args.part)]
            said = subprocess.run(again, capture_output=True, text=True)
            size = f"{float(said.stdout.split()[-1]):.0f} MB" if said.returncode == 0 else said.stderr.splitlines()[-1]
            print(f"| {part}, {args.tokens} rows | {name} | {size} | |", flush=True)


if __name__ == "__main__":
    main()
