"""The parts of a Flash model of either family."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..nn.router import TileRouter
from .checkpoint import FlashVision
from .inputs import FlashParts, Projector


def _sequential(module: nn.Module, merge: int, norm: int, *linears: int) -> Projector:
    assert isinstance(module, nn.Sequential)
    return Projector(module, module[norm], tuple(module[i] for i in linears), merge)


def is_chat_model(model: nn.Module) -> bool:
    """The remote code of a Flash checkpoint, by class name and structure."""
    named = any(base.__name__ == "InternVLChatModel" for base in type(model).__mro__)
    needed = ("vision_model", "language_model", "mlp1", "mlp2", "pooling_before_gating", "gating")
    return named and all(isinstance(getattr(model, name, None), nn.Module) for name in needed)


def is_native_model(model: nn.Module) -> bool:
    """A transformers-native model with a `FlashVision` attached."""
    named = any(base.__name__ == "InternVLForConditionalGeneration" for base in type(model).__mro__)
    return named and isinstance(getattr(model, "flash", None), FlashVision)


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def parts_of(model: nn.Module, backend: str = "", folded: bool = True) -> FlashParts:
    """The parts of a Flash model of either family, with the thresholds and ids it has now.

    Args:
        backend: force a backend of the ops.
        folded: False: the router computes as shipped, in plain torch whatever `backend` is.

    Raises:
        TypeError: neither an `InternVLChatModel` with Flash modules nor an `InternVLForConditionalGeneration` with a
            `FlashVision` attached.
        AttributeError: the model has no thresholds.
    """
    m: Any = model
    router = functools.partial(TileRouter.from_modules, folded=folded, backend=backend if folded else "")
    if is_chat_model(model):
        return FlashParts(
            vision=lambda pixels: (
                m.vision_model(pixel_values=pixels, output_hidden_states=False, return_dict=True).last_hidden_state
            ),
            embedding=m.language_model.get_input_embeddings(),
            full=_sequential(m.mlp1, 2, 0, 1, 3),
            small=_sequential(m.mlp2, 4, 0, 1, 4, 7),
            router=router(m.pooling_before_gating, m.gating),
            relative_threshold=m.flash_relative_threshold,
            absolute_threshold=m.flash_absolute_threshold,
            token_id=m.img_context_token_id,
            tokens=256,
            order=m.ps_version,
            language=m.language_model,
            backend=backend,
            tile=_side(getattr(m.config, "force_image_size", None) or m.config.vision_config.image_size),
        )
    if is_native_model(model):
        projector, config = m.model.multi_modal_projector, m.config
        return FlashParts(
            vision=lambda pixels: m.model.vision_tower(pixel_values=pixels.to(m.dtype)).last_hidden_state,
            embedding=m.get_input_embeddings(),
            full=Projector(projector, projector.layer_norm, (projector.linear_1, projector.linear_2), 2),
            small=_sequential(m.flash.mlp2, 4, 0, 1, 4, 7),
            router=router(m.flash.pooling_before_gating, m.flash.gating),
            relative_threshold=config.flash_relative_threshold,
            absolute_threshold=config.flash_absolute_threshold,
            token_id=config.image_token_id,
            tokens=config.image_seq_length,
            order="v2",
            language=m,
            backend=backend,
            tile=_side(config.vision_config.image_size),
        )
    raise TypeError(
        f"model: got {type(model).__name__}, expected an InternVLChatModel with Flash modules, or an "
        "InternVLForConditionalGeneration with a FlashVision attached"
    )
