"""`ivl-kernels bench`: hands over to the benchmarks of the repository, which are not installed with the package."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "All other options go to the runner: --op OP, --quick, --list, --report JSON, --compare OLD NEW, ..."
    )


def run(args: argparse.Namespace) -> int:
    return runner(args.rest)


def repository() -> Path:
    """The clone that this package, or the working directory, lies in."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "bench" / "runner.py").exists():
            return root
    raise CommandError("the benchmarks are part of the repository: run this inside a clone of it")


def runner(options: Sequence[str], **environment: str) -> int:
    """`python -m bench` of the repository, in the working directory; its exit status."""
    paths = [str(repository()), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    return subprocess.run([sys.executable, "-m", "bench", *options], env=settings).returncode
