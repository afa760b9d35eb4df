"""Drop-in modules: the parameter names and state dict of what they replace."""

from .flash import FlashVision, ImageRouting, Routing, ViCO
from .projector import PixelShuffleProjector
from .router import TileRouter

__all__ = ["FlashVision", "ImageRouting", "PixelShuffleProjector", "Routing", "TileRouter", "ViCO"]
