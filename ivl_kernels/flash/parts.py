"""The parts of a Flash model of any family."""

from __future__ import annotations

from torch import nn

from ..models.families import Family, family_of
from ..nn.router import TileRouter
from .inputs import FlashParts, LanguageParts, Projector, VisionParts


def vision_parts(family: Family, backend: str = "", folded: bool = True) -> VisionParts:
    """What routing and projecting need; nothing of the language model is asked for."""
    holder, settings = family.flash_holder, family.flash_settings
    router = TileRouter.from_modules(
        holder.pooling_before_gating, holder.gating, folded=folded, backend=backend if folded else ""
    )
    return VisionParts(
        tokens_of=family.tile_tokens,
        full=Projector(family.projector, 2),
        small=Projector(holder.mlp2, 4),
        router=router,
        relative_threshold=settings.flash_relative_threshold,
        absolute_threshold=settings.flash_absolute_threshold,
        tokens=family.tokens_a_tile,
        order=family.order,
        backend=backend,
        tile=family.tile_pixels,
    )


def language_parts(family: Family, backend: str = "") -> LanguageParts:
    """What packing needs; nothing of the vision side is asked for."""
    token_id = family.token_id
    if token_id is None:
        raise ValueError("token_id: the model has not been told its placeholder (img_context_token_id is None)")
    return LanguageParts(family.embedding, family.causal, token_id, family.tokens_a_tile, backend)


def flash_family(model: nn.Module) -> Family | None:
    """The description of a Flash model, or None: no InternVL, or none of the modules that Flash adds."""
    family = family_of(model)
    return family if family is not None and family.flash_holder is not None else None


def parts_of(model: nn.Module, backend: str = "", folded: bool = True) -> FlashParts:
    """The parts of a Flash model of any family, with the thresholds and ids it has now.

    Args:
        backend: force a backend of the ops.
        folded: False: the router computes as shipped, in plain torch whatever `backend` is.

    Raises:
        TypeError: no InternVL, or one without Flash modules.
        AttributeError: the model has no thresholds.
        ValueError: a remote-code model that has not been told its placeholder.
    """
    family = flash_family(model)
    if family is None:
        raise TypeError(
            f"model: got {type(model).__name__}, expected an InternVLChatModel with Flash modules, or an "
            "InternVLForConditionalGeneration with a FlashVision attached"
        )
    return FlashParts(vision_parts(family, backend, folded), language_parts(family, backend))
