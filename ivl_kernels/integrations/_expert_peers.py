"""Experts implementations of transformers that keep the calls they are expected to be faster at.

The rule is calculated from shapes and data sheets (docs/moe.md), not measured: large products in bfloat16 on Hopper and
Blackwell, whose tensor memory accelerators and specialised warps those libraries use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _gpu
from .._library import needs_grad

PEERS = ("sonicmoe", "deepgemm")
CHIPS = {90: "Hopper", 100: "Blackwell"}
# Up to so many rows an expert, on average, the weights' bytes bind, and they are read as fast here.
ROWS = 64


@functools.cache
def missing(name: str) -> str:
    """What this process lacks for the implementation, in transformers' words, or ""."""
    try:
        check = getattr(importlib.import_module(f"transformers.integrations.{name}"), f"is_{name}_loadable", None)
        if check is not None:
            check(raise_error=True)
        elif importlib.util.find_spec("kernels") is None:
            return "the package kernels is not installed"
    except (ImportError, RuntimeError) as error:
        return str(error)
    return ""


@torch.compiler.assume_constant_result
def _elsewhere(name: str, kind: str, index: int | None) -> str:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    if _gpu.device_kind(kind) != "cuda" and not _gpu.preferred():
        return f"it serves NVIDIA GPUs, not {_gpu.device_kind(kind)}"
    chip = _gpu.device_capability(device)
    if chip not in CHIPS:
        return f"it is faster on {' and '.join(CHIPS.values())}, not on compute capability {chip / 10}"
    return missing(name)


def problem(name: str, gpt_oss: bool, weight: Tensor) -> str:
    """Why implementation `name`, one of `PEERS`, keeps no call with this weight, or ""."""
    if weight.dtype != torch.bfloat16:
        return f"it is faster in bfloat16, not in {str(weight.dtype).removeprefix('torch.')}"
    if gpt_oss and name == "sonicmoe":
        return "it computes another activation than GPT-OSS's"
    return _elsewhere(name, weight.device.type, weight.device.index)


def keeps(name: str, gpt_oss: bool, weight: Tensor, hidden: Tensor, ids: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether implementation `name` serves this call; others: what besides `hidden` may want a gradient."""
    if name not in PEERS or ids.numel() <= ROWS * weight.shape[0] or hidden.dtype != weight.dtype:
        return False
    if name == "deepgemm" and needs_grad((hidden, *others)):  # it has none
        return False
    return not torch.is_autocast_enabled(hidden.device.type) and not problem(name, gpt_oss, weight)
