"""Fused kernels for InternVL3, InternVL3.5 and InternVL3.5-Flash.

Names are loaded on first use: importing the package imports neither triton nor transformers and touches no GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "patch": "ivl_kernels.integrations",
    "patched": "ivl_kernels.integrations",
    "PatchHandle": "ivl_kernels.integrations",
    "PatchReport": "ivl_kernels.integrations",
    "verify": "ivl_kernels.integrations",
    "VerifyReport": "ivl_kernels.integrations",
    "enable_remote_code": "ivl_kernels.integrations",
}
_SUBMODULES = ("ops", "nn", "integrations", "doctor", "testing")

__all__ = [*_LAZY, *_SUBMODULES, "__version__"]

if TYPE_CHECKING:
    from . import doctor as doctor
    from . import integrations as integrations
    from . import nn as nn
    from . import ops as ops
    from . import testing as testing
    from .integrations import PatchHandle as PatchHandle
    from .integrations import PatchReport as PatchReport
    from .integrations import VerifyReport as VerifyReport
    from .integrations import enable_remote_code as enable_remote_code
    from .integrations import patch as patch
    from .integrations import patched as patched
    from .integrations import verify as verify


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
