"""Drop-in modules: the parameter names and state dict of what they replace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .expert_parallel import ExpertParallelExperts
from .experts import FusedExperts
from .losses import (
    ConsistencyLoss,
    GRPOLoss,
    GSPOLoss,
    MPOLoss,
    NextTokenLoss,
    RatioWindow,
    RewardShift,
    RouterLoss,
    StepScores,
    best_of_n,
    group_advantages,
)
from .projector import PixelShuffleProjector
from .quantised_experts import QuantisedExperts
from .router import TileRouter

if TYPE_CHECKING:
    from ..flash import FlashVision, ImageRouting, Routing, ViCO

__all__ = [
    "ConsistencyLoss",
    "ExpertParallelExperts",
    "FlashVision",
    "FusedExperts",
    "GRPOLoss",
    "GSPOLoss",
    "ImageRouting",
    "MPOLoss",
    "NextTokenLoss",
    "PixelShuffleProjector",
    "QuantisedExperts",
    "RatioWindow",
    "RewardShift",
    "RouterLoss",
    "Routing",
    "StepScores",
    "TileRouter",
    "ViCO",
    "best_of_n",
    "group_advantages",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # of Flash, whose modules are built from those above
        from .. import flash

        return getattr(flash, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
