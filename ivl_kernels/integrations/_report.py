"""What a patch did, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import _library
from .._checks import FLOATS


@dataclass(frozen=True)
class Row:
    """One line of a report.

    `state`: patched, already patched, refused, upstream (its own code is what is wanted here), not found, removed,
    undone or left.
    """

    module: str
    feature: str
    what: str
    state: str
    detail: str = ""


@dataclass
class PatchReport:
    """What was patched, which backend will serve it and why; what was not, and why not."""

    model: str
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def patched(self) -> list[Row]:
        return [row for row in self.rows if row.state in ("patched", "already patched")]

    def __str__(self) -> str:
        table = [("module", "feature", "what", "state", "served by, or why not")]
        table += [(r.module or "(model)", r.feature, r.what, r.state, r.detail) for r in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([f"ivl_kernels in {self.model}:", *lines, *(f"{k}: {v}" for k, v in self.notes.items())])

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "rows": [vars(row).copy() for row in self.rows], "notes": dict(self.notes)}


def serving(op: str, *computed: Any) -> str:
    """ "cpu (float32 on cpu)": the backend of `ops.<op>`, and why not a better one.

    computed: modules and tensors of the dtype that the op computes in; quantised ones are passed over.
    """
    found = next(((value, tensor) for value in computed for tensor in _floats(value)), None)
    if found is None:
        return "chosen at the call: all parameters are quantised"
    dtype, device = str(found[1].dtype).removeprefix("torch."), _device(*found)
    return f"{_library.OPS[op].explain(device, dtype)} ({dtype} on {device})"


def _device(value: Any, tensor: torch.Tensor) -> str:
    """Where a module with this parameter computes: offloaded ones are loaded to the device of accelerate's hook."""
    if tensor.device.type != "meta" or not isinstance(value, nn.Module):
        return tensor.device.type
    hooks = [getattr(part.__dict__.get("_hf_hook"), "execution_device", None) for part in value.modules()]
    return torch.device(next((device for device in hooks if device is not None), tensor.device)).type


def _floats(value: Any) -> Iterator[torch.Tensor]:
    tensors: Iterable[Any] = (value,)
    if isinstance(value, nn.Module):
        tensors = (tensor for _, tensor in (*value.named_parameters(), *value.named_buffers()))
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS:
            yield tensor


def failure(error: BaseException) -> str:
    """An error as the reason of a row."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
