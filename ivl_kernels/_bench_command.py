"""`ivl-kernels bench`: hands over to the benchmarks of the repository, which are not installed with the package."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from .cli import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "All other options go to the runner: --op OP, --quick, --list, --report JSON, --compare OLD NEW, ..."
    )


def run(args: argparse.Namespace) -> int:
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (root / "bench" / "runner.py").exists():
            sys.path.insert(0, str(root))
            return importlib.import_module("bench.runner").main(args.rest)
    raise CommandError("the benchmarks are part of the repository: run this inside a clone of it")
