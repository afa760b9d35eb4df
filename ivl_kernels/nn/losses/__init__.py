"""Losses of InternVL's training: plain torch over `ops.linear_logprob` and its kin.

Every mean has its denominator as an argument, because only the caller knows what it runs over: several micro-batches
and ranks (`shared`). Sequences lie end to end, sequence i from `offsets[i]` to `offsets[i + 1]` (`RowPlan.offsets`).
"""

from ._common import per_sequence, shared
from .policy import GRPOLoss, GSPOLoss, PolicyOutput, group_advantages
from .preference import MPOLoss, MPOOutput, RewardShift
from .router import RatioWindow, RouterLoss, loss_ratio
from .scores import Scores, StepScores, best_of_n
from .supervised import ConsistencyLoss, NextTokenLoss

__all__ = [
    "ConsistencyLoss",
    "GRPOLoss",
    "GSPOLoss",
    "MPOLoss",
    "MPOOutput",
    "NextTokenLoss",
    "PolicyOutput",
    "RatioWindow",
    "RewardShift",
    "RouterLoss",
    "Scores",
    "StepScores",
    "best_of_n",
    "group_advantages",
    "loss_ratio",
    "per_sequence",
    "shared",
]
