"""Drop-in modules: the parameter names and state dict of what they replace."""

from .expert_parallel import ExpertParallelExperts
from .experts import FusedExperts
from .flash import FlashVision, ImageRouting, Routing, ViCO
from .projector import PixelShuffleProjector
from .router import TileRouter

__all__ = [
    "ExpertParallelExperts",
    "FlashVision",
    "FusedExperts",
    "ImageRouting",
    "PixelShuffleProjector",
    "Routing",
    "TileRouter",
    "ViCO",
]
