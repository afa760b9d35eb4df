"""Which rows of the hidden states reach the head: made once, on the host, from the labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import check_shape, check_tensor, describe

REDUCTIONS = ("token", "sample", "square")
COUNTINGS = ("internvl", "xtuner")
BOUNDARIES = ("masked", "internvl")


class RowPlan(NamedTuple):
    """The N supervised rows of a batch; a row's hidden state predicts its target.

    Attributes:
        rows: [N] int64, ascending: indices into the flattened hidden states [T, H].
        targets: [N] int64: the token that each row predicts.
        sample: [N] int64, ascending: the sub-sequence that the target belongs to.
        offsets: [S + 1] int64: rows offsets[i] to offsets[i + 1] are those of sub-sequence i.
        weight: [N] float32: of each row's loss, by the reduction.
        denominator: [] float32: the sum of `weight`; what a loss is divided by once it is summed over ranks.
    """

    rows: Tensor
    targets: Tensor
    sample: Tensor
    offsets: Tensor
    weight: Tensor
    denominator: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RowPlan:
        return RowPlan(*(t.to(device, non_blocking=non_blocking) for t in self))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def _borders(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[S + 1]: where the sub-sequences of the flattened labels begin, and their end."""
    total = labels.numel()
    if cu_seqlens is None:
        return torch.arange(0, total + 1, labels.shape[-1] or 1, device="cpu")
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device.type != "cpu":
        raise TypeError(f"cu_seqlens: got {describe(cu_seqlens)}, expected int32 or int64 on cpu")
    borders = cu_seqlens.reshape(-1).long()
    if labels.dim() == 2 and labels.shape[0] != 1:
        raise ValueError(f"labels: got {describe(labels)}, expected [T] or [1, T] with cu_seqlens")
    good = borders.numel() > 0 and int(borders[0]) == 0 and int(borders[-1]) == total
    if not good or bool((borders.diff() < 0).any()):
        raise ValueError(f"cu_seqlens: got {borders.tolist()}, expected ascending from 0 to the {total} labels")
    return borders


def row_plan(
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    reduction: str = "token",
    counting: str = "internvl",
    boundary: str = "masked",
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> RowPlan:
    """The rows that are supervised, their targets and weights: shift, ignored labels and compaction, once, on the host.

    Args:
        labels: [T], [1, T] or without `cu_seqlens` [B, T] int64 on the CPU, aligned with the input ids as transformers
            wants them: position t predicts label t + 1 of its sub-sequence. Positions count through the flattened
            labels.
        cu_seqlens: [S + 1] or [1, S + 1] int32 or int64: where the packed sub-sequences begin, and T. None: each row of
            `labels` is one.
        reduction: the weight of a target in a sub-sequence that counts x: "token" 1, "sample" 1 / x,
            "square" 1 / sqrt(x) (InternVL2.5 section 3.4, InternVL3.5 section 2.2).
        counting: what x counts. "internvl": the labels of the sub-sequence that are not ignored, its first one among
            them although nothing predicts it; "xtuner": the targets that its rows really have.
        boundary: "masked": the last position of a sub-sequence predicts nothing. "internvl": it predicts the first
            label of the next packed one, if that is supervised, with the next one's weight, as a shift over the whole
            pack does.
        ignore_index: the label of what is not supervised.
        vocab_size: V; targets are checked against it when given.

    Returns:
        A `RowPlan` on the CPU. Without any supervised label all of it is empty and the denominator 0.

    Raises:
        ValueError, TypeError: an argument does not fit, or a label is neither ignored nor a token.

    Source: `loss_weight` in OpenGVLab/InternVL's `dataset_packed.py` and `modeling_internvl_chat.py`; the "xtuner"
    counting: InternLM/xtuner's `ce_loss.py`.

    Example:
        >>> plan = row_plan(torch.tensor([-100, 5, 6, -100, 7]), torch.tensor([0, 3, 5]), reduction="square")
        >>> plan.rows.tolist(), plan.targets.tolist(), plan.sample.tolist()
        ([0, 1, 3], [5, 6, 7], [0, 0, 1])
    """
    check_tensor("labels", labels)
    if labels.dtype != torch.int64 or labels.device.type != "cpu":
        raise TypeError(f"labels: got {describe(labels)}, expected int64 on cpu (a plan is made by the collator)")
    if labels.dim() not in (1, 2):
        check_shape("labels", labels, ("B", "T"))
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_choice("counting", counting, COUNTINGS)
    _check_choice("boundary", boundary, BOUNDARIES)
    borders = _borders(labels, cu_seqlens)
    flat = labels.reshape(-1)
    supervised = flat != ignore_index
    wrong = supervised & ((flat < 0) | (flat >= (vocab_size if vocab_size is not None else 1 << 62)))
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        limit = "a token" if vocab_size is None else f"in [0, {vocab_size})"
        raise ValueError(f"labels: got {int(flat[place])} at position {place}, expected {ignore_index} or {limit}")
    # The target at t belongs to row t - 1: first labels of sub-sequences have none, or the one across the boundary.
    lengths = borders.diff()
    is_target = supervised.clone()
    if boundary == "internvl" and cu_seqlens is not None:
        is_target[:1] = False
    else:
        is_target[borders[:-1][lengths > 0]] = False
    positions = is_target.nonzero().squeeze(1)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)
    sample = segment[positions]
    if counting == "internvl":
        count = torch.bincount(segment[supervised], minlength=len(lengths))
    else:
        count = torch.bincount(segment[positions - 1], minlength=len(lengths))
    power = {"token": 0.0, "sample": 1.0, "square": 0.5}[reduction]
    # Of a false target across a boundary the sub-sequence itself may have no row: it counts as one.
    weight = (1 / count.clamp(min=1).double() ** power).float()[sample]
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(torch.bincount(sample, minlength=len(lengths)), 0, out=offsets[1:])
    return RowPlan(positions - 1, flat[positions], sample, offsets, weight, weight.sum())
