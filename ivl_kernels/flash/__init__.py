"""InternVL3.5-Flash: route the tiles, project each one once at its ratio, pack what is left of the sequence."""

from .checkpoint import FlashVision
from .inputs import (
    Decisions,
    FlashInputs,
    FlashParts,
    LanguageParts,
    Projector,
    VisionParts,
    flash_inputs,
    pack,
    project_into,
    route,
)
from .parts import flash_family, language_parts, parts_of, vision_parts
from .router import router_problem
from .routing import ImageRouting, Routing
from .tiles import image_of_tile
from .vico import ViCO, ViCOLoss, ViCOOutput, score_images, score_tiles

__all__ = [
    "Decisions",
    "FlashInputs",
    "FlashParts",
    "FlashVision",
    "ImageRouting",
    "LanguageParts",
    "Projector",
    "Routing",
    "ViCO",
    "ViCOLoss",
    "ViCOOutput",
    "VisionParts",
    "flash_family",
    "flash_inputs",
    "image_of_tile",
    "language_parts",
    "pack",
    "parts_of",
    "project_into",
    "route",
    "router_problem",
    "score_images",
    "score_tiles",
    "vision_parts",
]
