"""An InternVL in two halves: pixels to visual tokens, visual tokens and a prompt to an answer, and what goes between.

What of it to use, and when: docs/dvd.md.
"""

from .cache import FeatureCache, content_key
from .features import Limits, MessageError, VisualFeatures
from .language import LanguageInputs, LanguageSide
from .vision import VisionSide

__all__ = [
    "FeatureCache",
    "LanguageInputs",
    "LanguageSide",
    "Limits",
    "MessageError",
    "VisionSide",
    "VisualFeatures",
    "content_key",
]
