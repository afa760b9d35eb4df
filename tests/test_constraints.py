"""constraints.txt pins everything that the package's extras and the tests bring, exactly."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
# torch's own build pins these, and brings its Triton.
BROUGHT = re.compile(r"nvidia-|cuda-|triton$")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    found = {}
    for line in LINES:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            assert canonical(requirement.name) not in found, f"two pins: {line}"
            found[canonical(requirement.name)] = str(requirement.specifier)
    return found


def test_pins_are_exact():
    assert all(re.fullmatch(r"==[0-9][0-9a-z.]*", specifier) for specifier in pins().values())


def test_every_dependency_is_pinned():
    """Walks what is installed, where that is the tested set."""
    pinned = pins()
    for name in ("transformers", "tokenizers", "numpy", "pytest"):
        if f"=={importlib.metadata.version(name)}" != pinned[name]:
            pytest.skip(f"{name} {importlib.metadata.version(name)} is not the tested one")
    extras, todo, seen = (
        ("hf", "triton", "bench", "test"),
        ["ivl-kernels", "pip", "setuptools", "ninja", "pybind11"],
        set(),
    )
    while todo:
        name = canonical(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        assert name == "ivl-kernels" or name in pinned or BROUGHT.match(name), f"{name} is not in constraints.txt"
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            wanted = extras if name == "ivl-kernels" else ("",)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted):
                todo.append(requirement.name)
    assert len(seen) > 40
