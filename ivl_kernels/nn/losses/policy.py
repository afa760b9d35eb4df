"""Policy losses of online training, and the advantages they take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._checks import check_shape
from ._common import Number, over, per_sequence


class PolicyOutput(NamedTuple):
    """`loss` with gradients; importance ratios ([S], or [N] for GRPO) and the share of them clipped without."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(ratio A, clip(ratio) A), and where the clip holds: the gradient there is exactly 0."""
    bounded = ratio.clamp(1 - low, 1 + high)
    outside = ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))
    return torch.where(outside, bounded, ratio) * advantages, outside.detach()


def _check_policy(logp: Tensor, old_logp: Tensor, advantages: Tensor, sizes: tuple[int, ...]) -> None:
    check_shape("old_logp", old_logp, logp.shape)
    if advantages.dim() != 1 or len(advantages) not in sizes:
        raise ValueError(f"advantages: got {list(advantages.shape)}, expected {' or '.join(f'[{n}]' for n in sizes)}")


# Above it a log-ratio is held and has no gradient, as in verl: exp would overflow.
LOG_RATIO_LIMIT = 10.0


class GSPOLoss(nn.Module):
    """Group sequence policy optimization: one importance ratio a response, clipped as a whole.

    With s = exp(mean over the response of logp - old_logp) and its advantage A::

        loss = - sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i) / sequences

    Args:
        low, high: of the clip; the paper's. InternVL3.5's scripts set none, which made them 0.2 and 0.2.
        per_token: GSPO-token, s_it = sg(s_i) exp(logp - sg(logp)): the same value, and advantages may differ by token.
        empty: responses without tokens are left out of `sequences` ("exclude", verl) or count there with a value of 0
            ("zero", TRL).

    `forward(logp [N], old_logp [N], offsets [S + 1], advantages [S], sequences=None)` -> `PolicyOutput`; advantages may
    be [N] with `per_token`, where N is not S. sequences: the denominator; None: of this call. No gradient reaches a
    response that is clipped or has no advantage, so its rows cost nothing in the backward of `ops.linear_logprob`.
    Source: arXiv 2507.18071, eq. 5-7 and 13-14.
    """

    def __init__(
        self, low: float = 3e-4, high: float = 4e-4, *, per_token: bool = False, empty: str = "exclude"
    ) -> None:
        super().__init__()
        if empty not in ("exclude", "zero"):
            raise ValueError(f"empty: got {empty!r}, expected 'exclude' or 'zero'")
        self.low, self.high, self.per_token, self.empty = low, high, per_token, empty

    def forward(
        self,
        logp: Tensor,
        old_logp: Tensor,
        offsets: Tensor,
        advantages: Tensor,
        *,
        sequences: Number | None = None,
    ) -> PolicyOutput:
        lengths = offsets.diff()
        _check_policy(logp, old_logp, advantages, (len(lengths), len(logp)) if self.per_token else (len(lengths),))
        filled = lengths > 0
        log_ratio = per_sequence(logp - old_logp.detach(), offsets) / lengths.clamp(min=1)
        ratio = log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()
        if sequences is None:
            sequences = filled.sum() if self.empty == "exclude" else len(lengths)
        if self.per_token:
            which = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
            given = advantages[which] if len(advantages) == len(lengths) else advantages
            values, outside = _clipped(ratio.detach()[which] * (logp - logp.detach()).exp(), given, self.low, self.high)
            values = per_sequence(values, offsets) / lengths.clamp(min=1)
        else:
            values, outside = _clipped(ratio, advantages, self.low, self.high)
        loss = over(-torch.where(filled, values, 0).sum(), sequences, "sequences")
        counted = outside if outside.shape != filled.shape else outside & filled
        share = counted.float().sum() / (filled.sum() if outside.shape == filled.shape else lengths.sum()).clamp(min=1)
        return PolicyOutput(loss, ratio.detach(), share)


class GRPOLoss(nn.Module):
    """Group relative policy optimization: one importance ratio a token.

    Args:
        low, high: of the clip.
        aggregate: "sequence": mean over a response's tokens, then over `sequences`; "token" (DAPO): over `tokens`.
        kl: factor of the divergence exp(d) - d - 1 with d = reference_logp - logp.
        dual_clip: bound c of the loss of a token with a negative advantage, -c A; None: unbounded.

    `forward(logp, old_logp, offsets, advantages [S], or [N] if not S, reference_logp=None, denominator=None)` ->
    `PolicyOutput`. The denominator is of sequences or tokens; None: the responses that have tokens, or the tokens, of
    this call. Source: arXiv 2402.03300; the forms as in verl's `core_algos.py`.
    """

    def __init__(
        self,
        low: float = 0.2,
        high: float = 0.2,
        *,
        aggregate: str = "sequence",
        kl: float = 0.0,
        dual_clip: float | None = None,
    ) -> None:
        super().__init__()
        if aggregate not in ("sequence", "token"):
            raise ValueError(f"aggregate: got {aggregate!r}, expected 'sequence' or 'token'")
        self.low, self.high, self.aggregate, self.kl, self.dual_clip = low, high, aggregate, kl, dual_clip

    def forward(
        self,
        logp: Tensor,
        old_logp: Tensor,
        offsets: Tensor,
        advantages: Tensor,
        *,
        reference_logp: Tensor | None = None,
        denominator: Number | None = None,
    ) -> PolicyOutput:
        lengths = offsets.diff()
        _check_policy(logp, old_logp, advantages, (len(lengths), len(logp)))
        if len(advantages) == len(lengths):
            advantages = advantages.repeat_interleave(lengths)
        ratio = (logp - old_logp.detach()).clamp(max=LOG_RATIO_LIMIT).exp()
        values, outside = _clipped(ratio, advantages, self.low, self.high)
        if self.dual_clip is not None:
            values = torch.where(advantages < 0, torch.maximum(values, self.dual_clip * advantages), values)
        if self.kl:
            if reference_logp is None:
                raise ValueError(f"reference_logp: got None, expected [{len(logp)}] (kl is {self.kl})")
            check_shape("reference_logp", reference_logp, logp.shape)
            away = reference_logp.detach() - logp
            values = values - self.kl * (away.expm1() - away)
        if self.aggregate == "token":
            loss = over(-values.sum(), lengths.sum() if denominator is None else denominator, "denominator")
        else:
            means = per_sequence(values, offsets) / lengths.clamp(min=1)
            loss = over(-means.sum(), (lengths > 0).sum() if denominator is None else denominator, "denominator")
        return PolicyOutput(loss, ratio.detach(), outside.float().sum() / max(len(logp), 1))


def group_advantages(rewards: Tensor, groups: int | Tensor, *, scale: str = "group", eps: float = 1e-6) -> Tensor:
    """Advantages [S] of rewards [S] within their groups: (reward - mean) / (standard deviation + eps), in float32.

    Args:
        rewards: of the responses.
        groups: responses a group, consecutive; or [S] int64, the group of each.
        scale: "group": by the group's own deviation (n - 1), "batch": by that of all rewards, "none": not (Dr. GRPO).
        eps: 1e-6 in verl, 1e-4 in TRL.

    A group whose rewards are all equal gets 0. A lone response has no group to compare with: its mean is 0 and its
    deviation 1, as in verl, so its advantage is its reward / (1 + eps).

    Raises:
        ValueError: rewards that are not finite, or a size that does not divide their number.
    """
    check_shape("rewards", rewards, ("S",))
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: got {scale!r}, expected 'group', 'batch' or 'none'")
    if not bool(rewards.isfinite().all()):
        place = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"rewards: got {float(rewards[place])} at {place}, expected finite numbers")
    if not isinstance(groups, Tensor):
        if groups < 1 or len(rewards) % groups:
            raise ValueError(f"groups: got {groups} a group for {len(rewards)} rewards, expected a divisor of them")
        groups = torch.arange(len(rewards), device=rewards.device) // groups
    check_shape("groups", groups, (len(rewards),))
    if not len(rewards):
        return rewards.float()
    _, which, count = groups.unique(return_inverse=True, return_counts=True)
    values, zeros = rewards.double(), torch.zeros(len(count), dtype=torch.float64, device=rewards.device)
    lone = count == 1
    mean = torch.where(lone, 0, zeros.index_add(0, which, values) / count)
    away = values - mean[which]
    if scale == "none":
        return away.float()
    if scale == "batch":
        return (away / (values.std() + eps if len(values) > 1 else 1 + eps)).float()
    deviation = (zeros.index_add(0, which, away.square()) / (count - 1).clamp(min=1)).sqrt()
    return (away / (torch.where(lone, 1, deviation)[which] + eps)).float()
