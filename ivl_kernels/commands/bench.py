"""`ivl-kernels bench`: hands over to the benchmarks of the repository, which are not installed with the package."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from . import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "All other options go to the runner: --op OP, --quick, --list, --report JSON, --compare OLD NEW, ..."
    )


def run(args: argparse.Namespace) -> int:
    return runner().main(args.rest)


def runner() -> Any:
    """The module `bench.runner` of the repository this package, or the working directory, lies in."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "bench" / "runner.py").exists():
            sys.path.insert(0, str(root))
            return importlib.import_module("bench.runner")
    raise CommandError("the benchmarks are part of the repository: run this inside a clone of it")
