"""Denominators, and sums over the sequences of a pack."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..._checks import check_shape

Number: TypeAlias = "float | Tensor"


def shared(parts: Iterable[Number], group: Any = None) -> float:
    """A denominator for all micro-batches of a step: their sum over all ranks, divided by the number of ranks.

    Losses over it, summed over the micro-batches, are what a trainer that averages gradients over ranks (DDP, FSDP)
    needs for the gradient of one large batch. Every rank calls it once a step. Without a process group: the sum.
    """
    total = torch.tensor([float(part) for part in parts], dtype=torch.float64, device="cpu").sum()
    if dist.is_available() and dist.is_initialized():
        on_gpu = dist.get_backend(group) == "nccl"
        total = total.cuda() if on_gpu else total
        dist.all_reduce(total, group=group)
        total = total / dist.get_world_size(group)
    return float(total)


def over(value: Tensor, denominator: Number, name: str) -> Tensor:
    """value / denominator; 0 of nothing is 0."""
    if isinstance(denominator, Tensor):
        return value / torch.where(denominator == 0, 1, denominator)
    if not 0 <= denominator < float("inf"):
        raise ValueError(f"{name}: got {denominator}, expected a finite number of at least 0")
    return value / (denominator or 1)


def per_sequence(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums [S] of values [N] over each sequence; 0 for an empty one. Differentiable, without atomics."""
    check_shape("values", values, ("N",))
    check_shape("offsets", offsets, ("S + 1",))
    if offsets.device.type == "cpu" and int(offsets[-1]) != len(values):
        raise ValueError(f"offsets: got {int(offsets[-1])} at the end, expected the {len(values)} values")
    if not len(values):
        return values.sum() + values.new_zeros(len(offsets) - 1)
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0)
