"""Drop-in modules: the parameter names and state dict of what they replace."""

from .flash import FlashVision, ImageRouting, Routing, ViCO
from .router import TileRouter

__all__ = ["FlashVision", "ImageRouting", "Routing", "TileRouter", "ViCO"]
