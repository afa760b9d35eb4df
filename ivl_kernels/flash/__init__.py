"""InternVL3.5-Flash: route the tiles, project each one once at its ratio, pack what is left of the sequence."""

from .checkpoint import FlashVision
from .inputs import FlashInputs, FlashParts, Projector, flash_inputs
from .parts import is_chat_model, is_native_model, parts_of
from .routing import ImageRouting, Routing
from .tiles import image_of_tile
from .vico import ViCO, ViCOOutput

__all__ = [
    "FlashInputs",
    "FlashParts",
    "FlashVision",
    "ImageRouting",
    "Projector",
    "Routing",
    "ViCO",
    "ViCOOutput",
    "flash_inputs",
    "image_of_tile",
    "is_chat_model",
    "is_native_model",
    "parts_of",
]
