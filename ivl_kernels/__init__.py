"""Fused kernels for InternVL3, InternVL3.5 and InternVL3.5-Flash.

Names are loaded on first use: importing the package imports neither triton nor transformers and touches no GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "patch": "ivl_kernels.integrations",
    "patched": "ivl_kernels.integrations",
    "PatchHandle": "ivl_kernels.integrations",
    "PatchReport": "ivl_kernels.integrations",
    "verify": "ivl_kernels.integrations",
    "warm_up": "ivl_kernels.integrations",
    "WarmUp": "ivl_kernels.integrations",
    "VerifyReport": "ivl_kernels.integrations",
    "enable_remote_code": "ivl_kernels.integrations",
    "VisionSide": "ivl_kernels.dvd",
    "LanguageSide": "ivl_kernels.dvd",
    "VisualFeatures": "ivl_kernels.dvd",
    "load_quantised": "ivl_kernels.integrations",
    "quantise_experts": "ivl_kernels.integrations",
}
_SUBMODULES = ("ops", "nn", "flash", "integrations", "dvd", "doctor", "testing")

__all__ = [*_LAZY, *_SUBMODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
