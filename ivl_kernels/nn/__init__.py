"""Drop-in modules: the parameter names and state dict of what they replace."""

from .router import TileRouter

__all__ = ["TileRouter"]
