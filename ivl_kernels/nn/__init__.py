"""Drop-in modules: the parameter names and state dict of what they replace."""

from .experts import FusedExperts
from .flash import FlashVision, ImageRouting, Routing, ViCO
from .projector import PixelShuffleProjector
from .router import TileRouter

__all__ = ["FlashVision", "FusedExperts", "ImageRouting", "PixelShuffleProjector", "Routing", "TileRouter", "ViCO"]
