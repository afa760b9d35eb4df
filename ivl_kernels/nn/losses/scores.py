"""Scores of a process reward model, and the best of several responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ..._checks import check_shape
from ._common import per_sequence


class Scores(NamedTuple):
    """steps: [K] of each step; responses: [R], or None without offsets."""

    steps: Tensor
    responses: Tensor | None


class StepScores(nn.Module):
    """Scores of reasoning steps: the expected value of a word among a few, where the model would judge the step.

    Args:
        words: ids of the words, such as those of "+" and "-".
        values: what each word is worth; None: 1 for the first, 0 for the others: the probability of "+".
        reduction: of the steps of a response, "mean" (VisualPRM) or "sum".

    `forward(hidden [..., H], weight [V, H], rows [K], offsets=None, bias=None)` -> `Scores`, float32, no gradients
    (train through `NextTokenLoss`). rows: the positions that predict the judgements; offsets [R + 1]: the steps of
    response i are offsets[i] to offsets[i + 1]. A response without steps scores 0. Source: VisualPRM (arXiv
    2503.10291): the head is asked for K x C logits instead of [tokens, vocabulary].
    """

    def __init__(self, words: Sequence[int], *, values: Sequence[float] | None = None, reduction: str = "mean") -> None:
        super().__init__()
        values = [1.0] + [0.0] * (len(words) - 1) if values is None else list(values)
        if len(words) < 2 or len(set(words)) != len(words) or len(values) != len(words):
            raise ValueError(
                f"words: got {list(words)} worth {values}, expected two different words or more, one value each"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
        self.words, self.values, self.reduction = list(words), values, reduction

    @torch.no_grad()
    def forward(
        self, hidden: Tensor, weight: Tensor, rows: Tensor, offsets: Tensor | None = None, bias: Tensor | None = None
    ) -> Scores:
        words = torch.tensor(self.words, device=weight.device)
        logits = ops.linear_candidates(hidden, weight, words, rows, bias=bias)
        steps = logits.softmax(-1) @ logits.new_tensor(self.values)
        if offsets is None:
            return Scores(steps, None)
        responses = per_sequence(steps, offsets)
        return Scores(steps, responses / offsets.diff().clamp(min=1) if self.reduction == "mean" else responses)


def best_of_n(scores: Tensor, groups: int | Tensor | None = None) -> Tensor:
    """The index of the highest score in each group, the first of equals: [P] int64, groups in ascending order.

    Args:
        scores: [S] of the responses.
        groups: responses a group, consecutive; or [S] int64, the group of each; None: one group.

    Raises:
        ValueError: no scores, one that is NaN, or a size that does not divide their number.
    """
    check_shape("scores", scores, ("S",))
    if not len(scores):
        raise ValueError("scores: got none, expected at least one response")
    if bool(scores.isnan().any()):
        raise ValueError(f"scores: got NaN at {int(scores.isnan().nonzero()[0])}")
    groups = len(scores) if groups is None else groups
    if not isinstance(groups, Tensor):
        if groups < 1 or len(scores) % groups:
            raise ValueError(f"groups: got {groups} a group for {len(scores)} scores, expected a divisor of them")
        groups = torch.arange(len(scores), device=scores.device) // groups
    check_shape("groups", groups, (len(scores),))
    which: Tensor = groups
    order = scores.argsort(descending=True, stable=True)
    order = order[which[order].argsort(stable=True)]  # by group, then by score
    ends = which[order].unique_consecutive(return_counts=True)[1].cumsum(0)
    return order[torch.cat([ends.new_zeros(1), ends[:-1]])]
