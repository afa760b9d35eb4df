"""Every environment variable the package reads, with its default and meaning. Documentation is generated from here."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

# What is behind `os.environ`, whose own look-up of a variable that is not set costs a tenth of a small op.
_ENVIRONMENT: Any = os.environ._data  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Variable:
    name: str
    default: str
    meaning: str

    @functools.cached_property
    def _key(self) -> Any:
        return os.environ.encodekey(self.name)

    def raw(self) -> Any:
        """What stands in the environment, in its own form."""
        return _ENVIRONMENT.get(self._key)

    def get(self) -> str:
        found = _ENVIRONMENT.get(self._key)
        return self.default if found is None else os.environ.decodevalue(found)


BACKEND = Variable(
    "IVL_BACKEND",
    "",
    "Force one backend for every op: `cpu`, `cuda`, `triton`, `torch` or `reference`. Empty: the best for the call.",
)
CPU_ISA = Variable(
    "IVL_CPU_ISA",
    "",
    "Highest instruction set of the C++ kernels: `portable`, `avx2`, `avx512` or `avx512_bf16`. "
    "Empty: the best the processor has.",
)
CPU_LINEAR = Variable(
    "IVL_CPU_LINEAR",
    "auto",
    "Whose product serves a patched model's linear layers on a CPU: `own`, `blas`, or `auto`: by a measurement, once a "
    "process.",
)
ONEDNN_MAX_CPU_ISA = Variable(
    "ONEDNN_MAX_CPU_ISA",
    "",
    "oneDNN's own: when it rules out bfloat16 instructions, our float32 products serve bfloat16 instead of oneDNN's.",
)
VLLM = Variable(
    "IVL_VLLM",
    "",
    "`0`: vLLM's plugin of this package (see [dvd](dvd.md)) does nothing. Otherwise our projector serves vLLM's "
    "InternVL models.",
)
BUILD_CPU = Variable(
    "IVL_BUILD_CPU", "", "At build time: `1` requires the C++ kernels, `0` skips them. Empty: built if possible."
)
BUILD_CUDA = Variable(
    "IVL_BUILD_CUDA",
    "",
    "At build time: `1` requires the CUDA C++ kernels, `0` skips them. Empty: built if nvcc is there.",
)

VARIABLES = (BACKEND, CPU_ISA, CPU_LINEAR, ONEDNN_MAX_CPU_ISA, VLLM, BUILD_CPU, BUILD_CUDA)


def markdown_table() -> str:
    """The variables as a Markdown table."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{v.name}` | {f'`{v.default}`' if v.default else ''} | {v.meaning} |" for v in VARIABLES]
    return "\n".join(rows)
