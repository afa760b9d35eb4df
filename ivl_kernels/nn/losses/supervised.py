"""Next tokens, and the consistency of a model with a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...ops import RowPlan
from ._common import Number, over, per_sequence


class NextTokenLoss(nn.Module):
    """`sum_r w_r CE_r / denominator`, with w = 1, 1/x or 1/sqrt(x) of a sample with x supervised tokens.

    Args:
        reduction: "token", "sample" or "square" (InternVL2.5, section 3.4): how `plan` weights the rows.
        label_smoothing: e of `-(1 - e) logp - e (mean_logit - lse)`.
        z_loss: factor of lse ** 2.
        softcap, backend: as in `ops.linear_logprob`.

    `forward(hidden [..., H], weight [V, H], plan, denominator=None, bias=None)` -> scalar; the denominator is by
    default the plan's own; nothing supervised: 0, with gradients of 0.
    """

    def __init__(
        self,
        reduction: str = "token",
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        backend: str = "",
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: got {label_smoothing}, expected 0 <= label_smoothing < 1")
        ops.row_plan(torch.zeros(1, dtype=torch.int64, device="cpu"), reduction=reduction)  # raises for an unknown one
        self.reduction, self.label_smoothing, self.z_loss = reduction, label_smoothing, z_loss
        self.softcap, self.backend = softcap, backend

    def plan(self, labels: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> RowPlan:
        """`ops.row_plan` with this reduction."""
        return ops.row_plan(labels, cu_seqlens, reduction=self.reduction, **options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        plan: RowPlan,
        denominator: Number | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        row_weight = over(plan.weight, plan.denominator if denominator is None else denominator, "denominator")
        given: dict[str, Any] = {"bias": bias, "softcap": self.softcap, "backend": self.backend}
        if not self.label_smoothing and not self.z_loss:
            return ops.linear_ce(hidden, weight, plan.targets, plan.rows, row_weight, **given)
        found, e = ops.linear_logprob(hidden, weight, plan.targets, plan.rows, **given), self.label_smoothing
        ce = -(1 - e) * found.logp - e * (found.mean_logit - found.lse) + self.z_loss * found.lse.square()
        return (ce * row_weight).sum()


class ConsistencyLoss(nn.Module):
    """Divergence of a model from a teacher that sees more of the image: mean over samples of the mean over tokens.

    `sum_s (1 / N_s) sum_t KL(teacher || model) / samples`, over the whole vocabulary. The two sequences have different
    lengths; rows are matched by their plans, never by position.

    Args:
        temperature, backend: as in `ops.linear_kl`.

    `forward(hidden, weight, plan, teacher_hidden, teacher_weight, teacher_plan, samples=None)` -> scalar; gradients
    flow to hidden and weight. samples: the denominator; None: the samples of this call that have targets. None at all:
    0.

    Raises:
        ValueError: the plans are not of the same targets.

    Source: ViCO's stage 1, InternVL3.5 (arXiv 2508.18265), section 2.3.
    """

    def __init__(self, *, temperature: float = 1.0, backend: str = "") -> None:
        super().__init__()
        self.temperature, self.backend = temperature, backend

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        plan: RowPlan,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_plan: RowPlan,
        samples: Number | None = None,
    ) -> Tensor:
        lengths = plan.offsets.diff()
        given = (hidden, weight, teacher_hidden, teacher_weight)
        row_weight = over(
            1 / lengths.clamp(min=1).float(), (lengths > 0).sum() if samples is None else samples, "samples"
        )
        return self._divergence(given, plan, teacher_plan, row_weight.repeat_interleave(lengths))

    @torch.no_grad()
    def per_sample(
        self,
        hidden: Tensor,
        weight: Tensor,
        plan: RowPlan,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_plan: RowPlan,
    ) -> Tensor:
        """[S] mean divergence of each sample, 0 for one without targets."""
        divergence = self._divergence((hidden, weight, teacher_hidden, teacher_weight), plan, teacher_plan, None)
        return per_sequence(divergence, plan.offsets) / plan.offsets.diff().clamp(min=1)

    def _divergence(
        self, given: tuple[Tensor, ...], plan: RowPlan, teacher: RowPlan, row_weight: Tensor | None
    ) -> Tensor:
        same = plan.targets.shape == teacher.targets.shape
        if same and plan.targets.device.type == "cpu":
            same = torch.equal(plan.targets, teacher.targets) and torch.equal(plan.offsets, teacher.offsets)
        if not same:
            raise ValueError(
                f"teacher_plan: got {len(teacher.targets)} targets that are not the {len(plan.targets)} of plan, "
                "expected the same answers to the same samples"
            )
        options: dict[str, Any] = {"temperature": self.temperature, "backend": self.backend}
        hidden, weight, teacher_hidden, teacher_weight = given
        return ops.linear_kl(
            hidden, weight, teacher_hidden, teacher_weight, plan.rows, teacher.rows, row_weight, **options
        )
