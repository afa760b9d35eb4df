"""Drop-in modules: the parameter names and state dict of what they replace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .expert_parallel import ExpertParallelExperts
from .experts import FusedExperts
from .projector import PixelShuffleProjector
from .quantised_experts import QuantisedExperts
from .router import TileRouter

if TYPE_CHECKING:
    from ..flash import FlashVision, ImageRouting, Routing, ViCO

__all__ = [
    "ExpertParallelExperts",
    "FlashVision",
    "FusedExperts",
    "ImageRouting",
    "PixelShuffleProjector",
    "QuantisedExperts",
    "Routing",
    "TileRouter",
    "ViCO",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # of Flash, whose modules are built from those above
        from .. import flash

        return getattr(flash, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
