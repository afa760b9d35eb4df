"""One file an op: its inputs, our call, eager torch's, costs and peers. Whatever goes through all ops loops over these.

A module `<op>.py` of this folder is found by itself. It has:

* `cases(large)`: calls of the op at a few shapes with odd tails, or at shapes of released models. Tests and `gpu-check`
  hold each on every backend to the accuracy rule, compile it, check the schema of what it reaches, and so on.
* `timed(quick)` (optional): rows of the benchmark (`python -m bench --op <op>`).
* `SUBJECTS` (optional): what `python -m bench.inspect` looks at, where there are GPU kernels of ours.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from ._case import Case, Cost, Numbers, Shape, Subject, Timed, scaled
from ._check import Checked, cast, forward_backward, has_floats

__all__ = [
    "Case",
    "Checked",
    "Cost",
    "Numbers",
    "Shape",
    "Subject",
    "Timed",
    "all_cases",
    "cast",
    "forward_backward",
    "has_floats",
    "module",
    "names",
    "scaled",
]


def names() -> list[str]:
    """The ops that have a file here."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def all_cases(large: bool = False) -> Iterator[Case]:
    """Every op at a few shapes with odd tails; `large`: at the shapes of released models instead."""
    for name in names():
        yield from module(name).cases(large)
