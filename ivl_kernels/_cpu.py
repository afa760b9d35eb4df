"""The compiled CPU library `_C`: loaded on first use, and the reason when it cannot be."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    import torch  # noqa: F401  its libraries must be loaded before ours

    try:
        return importlib.import_module("ivl_kernels._C"), None
    except ModuleNotFoundError:
        return None, "the C++ kernels are not built (no ivl_kernels/_C; install with a C++ compiler present)"
    except ImportError as error:
        return None, f"the C++ kernels do not load: {error}"


def problem() -> str | None:
    """Why the C++ kernels cannot be used, or None when they can."""
    return _load()[1]


def module() -> ModuleType:
    """The pybind11 module: `build_info()`, `cpu_features()`, `set_isa(name)`."""
    loaded, why = _load()
    if loaded is None:
        raise RuntimeError(why)
    return loaded


@functools.cache
def op(name: str) -> Any:
    """The compiled operator `torch.ops.ivl_cpu.<name>`."""
    import torch

    module()
    return getattr(torch.ops.ivl_cpu, name).default
