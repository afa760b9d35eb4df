"""Mixed preference optimization and its reward shift."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import check_shape
from ._common import Number, over, per_sequence


class RewardShift(nn.Module):
    """delta of the quality loss: the plain running mean of the rewards, one number a call and rank.

    Args:
        momentum: None: the mean of all calls so far (InternVL's trainers); a float: `m delta + (1 - m) new`.
        update_in_eval: in evaluation too, as InternVL's trainers do.
        group: whose ranks' numbers are averaged; None: the default group, where there is one.

    `update(chosen [B], rejected [B])` -> scalar float64, this call included, without gradient. A call whose rewards are
    not finite is left out of the mean. The state is in the state dict and stays float64.
    Source: `RunningMoments` of TRL 0.21 as `bco_pair` uses it.
    """

    def __init__(self, momentum: float | None = None, *, update_in_eval: bool = False, group: Any = None) -> None:
        super().__init__()
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"momentum: got {momentum}, expected None or 0 <= momentum < 1")
        self.momentum, self.update_in_eval, self.group = momentum, update_in_eval, group
        self._state = torch.zeros(2, dtype=torch.float64)  # mean, count

    def get_extra_state(self) -> Tensor:
        return self._state.cpu().clone()

    def set_extra_state(self, state: Tensor) -> None:
        self._state = state.double().clone()

    @torch.no_grad()
    def update(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        self._state = self._state.to(chosen.device)
        mean, count = self._state
        ranks = 1
        new = torch.cat([chosen.detach().flatten(), rejected.detach().flatten()]).double().mean()
        if not self.training and not self.update_in_eval:
            return mean.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(new, group=self.group)
            ranks = dist.get_world_size(self.group)
            new /= ranks
        share = ranks / (count + ranks) if self.momentum is None else torch.where(count == 0, 1.0, 1 - self.momentum)
        after = torch.stack([mean + (new - mean) * share, count + ranks])
        self._state = torch.where(new.isfinite(), after, self._state)
        return self._state[0].clone()


class MPOOutput(NamedTuple):
    """`loss` with gradients; its three parts before weighting, rewards [B] and the shift without."""

    loss: Tensor
    preference: Tensor
    quality: Tensor
    generation: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    shift: Tensor


class MPOLoss(nn.Module):
    """Mixed preference optimization: preference (DPO), quality (BCO with a running shift) and generation (next token).

    With p and r the summed log-probabilities of a response under policy and reference, u = beta (p - r) of the chosen
    response and v of the rejected one, pair by pair::

        loss = w_p softplus(v - u) + w_q (softplus(shift - u) + softplus(v - shift)) - w_g sum_chosen logp / tokens

    Args:
        beta: of the rewards.
        weights: w_p, w_q, w_g.
        shift: None: a `RewardShift`; it is part of this module's state dict.
        label_smoothing: e of cDPO: the preference is the other way round with that probability.

    `forward(logp [N], offsets [2 B + 1], reference, pairs=None, tokens=None)` -> `MPOOutput`. The B chosen responses
    come first. reference: summed log-probabilities [2 B], or one a token [N] with `per_token=True`; no gradient reaches
    them. pairs, tokens: denominators; None: B and the number of chosen tokens of this call. An empty response sums to
    0.

    Raises:
        ValueError: an odd number of responses, or a reference that does not fit.

    Source: arXiv 2411.10442, section 4.1; InternVL3.5, section 2.3.
    """

    def __init__(
        self,
        beta: float = 0.1,
        weights: tuple[float, float, float] = (0.8, 0.2, 1.0),
        *,
        shift: RewardShift | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.beta, self.weights, self.label_smoothing = beta, weights, label_smoothing
        self.shift = RewardShift() if shift is None else shift

    def forward(
        self,
        logp: Tensor,
        offsets: Tensor,
        reference: Tensor,
        *,
        per_token: bool = False,
        pairs: Number | None = None,
        tokens: Number | None = None,
    ) -> MPOOutput:
        count = len(offsets) - 1
        if count % 2 or not count:
            raise ValueError(f"offsets: got {count} responses, expected pairs: the chosen ones, then the rejected ones")
        check_shape("reference", reference, logp.shape if per_token else (count,))
        reference = reference.detach()
        sums = per_sequence(logp, offsets)
        rewards = self.beta * (sums - (per_sequence(reference, offsets) if per_token else reference))
        chosen, rejected = rewards.chunk(2)
        shift = self.shift.update(chosen, rejected).to(rewards.dtype)
        margin, e = chosen - rejected, self.label_smoothing
        pairs = count // 2 if pairs is None else pairs
        tokens = offsets[count // 2] if tokens is None else tokens
        preference = over(((1 - e) * F.softplus(-margin) + e * F.softplus(margin)).sum(), pairs, "pairs")
        quality = over((F.softplus(shift - chosen) + F.softplus(rejected - shift)).sum(), pairs, "pairs")
        generation = over(-sums[: count // 2].sum(), tokens, "tokens")
        loss = sum(weight * part for weight, part in zip(self.weights, (preference, quality, generation)))
        return MPOOutput(loss, *(x.detach() for x in (preference, quality, generation, chosen, rejected, shift)))  # type: ignore[arg-type]
