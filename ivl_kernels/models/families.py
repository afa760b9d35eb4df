"""What an InternVL is: one description a family, of upstream's modules only, read when it is asked.

A new vision family is a class here and its adapter; a new text family is nothing, unless its decoder stack is built in
a way that `text_stack` does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .upstream import named_instances

# The modules that Flash adds.
FLASH = ("mlp2", "pooling_before_gating", "gating")


@dataclass(frozen=True)
class Family:
    """A model and where its parts are. Everything is read at the call: a model may be changed after it was patched.

    Attributes:
        model: the module that has `generate` (or the core alone).
        class_name: of `model`, in whatever package.
        core_name: of the class of `core`.
        features_name: method of `core` that turns pixels into rows of the language model.
        model_type: in a checkpoint's config.json.
        vision_name, projector_name: attributes of `core`, and so of a checkpoint's tensors.
        generate_name: method of `model` that embeds prompt and images and generates without routing.
    """

    model: Any
    class_name: ClassVar[str]
    core_name: ClassVar[str]
    features_name: ClassVar[str]
    model_type: ClassVar[str]
    vision_name: ClassVar[str]
    projector_name: ClassVar[str]

    @property
    def generate_name(self) -> str:
        return "generate"

    @property
    def core(self) -> Any:
        """The module whose forward takes input_ids and pixels and hands embeddings to `language`."""
        raise NotImplementedError

    @property
    def vision(self) -> Any:
        """The vision transformer: pixels [T, 3, h, w] -> `last_hidden_state` [T, 1 + n, C]."""
        return getattr(self.core, self.vision_name)

    @property
    def has_vision(self) -> bool:
        return getattr(self.core, self.vision_name, None) is not None

    def drop_vision(self) -> None:
        """Leave the language model: transformer, projector and Flash modules are gone."""
        raise NotImplementedError

    def drop_language(self) -> None:
        """Leave the vision side."""
        raise NotImplementedError

    def tile_tokens(self, pixels: Any) -> Any:
        """[T, 1 + n, C]: what `vision` makes of pixels [T, 3, h, w], the class token still in place."""
        raise NotImplementedError

    @property
    def projector(self) -> Any:
        """Shuffled tokens [T, n / 4, 4 C] -> [T, n / 4, H]."""
        return getattr(self.core, self.projector_name)

    @property
    def language(self) -> Any:
        """What takes `inputs_embeds`."""
        return self.core.language_model

    @property
    def causal(self) -> Any:
        """What takes `inputs_embeds` and gives logits, and a loss for `labels`."""
        raise NotImplementedError

    @property
    def text(self) -> Any:
        """The decoder stack in `language`: `layers`, and usually `embed_tokens` and `rotary_emb`."""
        return text_stack(self.language)

    @property
    def embedding(self) -> Any:
        """The token embedding."""
        return self.language.get_input_embeddings()

    @property
    def head(self) -> Any:
        """The language model's head, or None for a core alone."""
        raise NotImplementedError

    @property
    def token_id(self) -> int | None:
        """The placeholder's id; None while a remote-code model has not been told."""
        raise NotImplementedError

    @property
    def tokens_a_tile(self) -> int:
        """Placeholders a tile."""
        raise NotImplementedError

    @property
    def tile_pixels(self) -> int:
        """Pixels of a tile's side."""
        raise NotImplementedError

    @property
    def merge(self) -> int:
        """Patches that the projector merges along each side, or 0 where the ratio is not one over an integer."""
        ratio = self._ratio
        factor = round(1 / ratio)
        return factor if factor * ratio == 1 else 0

    @property
    def _ratio(self) -> float:
        raise NotImplementedError

    @property
    def order(self) -> str:
        """Of the pixel shuffle's tokens, "v2" or "v1"."""
        return "v2"

    def forward_inputs(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        """What the model's forward wants beside what its generate gets."""
        return {}

    @property
    def flash_holder(self) -> Any:
        """The module that holds `mlp2`, `pooling_before_gating` and `gating`; None without Flash."""
        raise NotImplementedError

    @property
    def flash_settings(self) -> Any:
        """What holds `flash_mode` and the thresholds."""
        raise NotImplementedError


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def text_stack(language: Any) -> Any:
    """The module below `language`, itself included, that holds the decoder layers.

    Raises:
        AttributeError: there is none.
    """
    for module in language.modules():
        if _has_layers(module):
            return module
    raise AttributeError(f"{type(language).__name__} has no decoder layers")


def text_stacks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of every decoder stack in a model: layers beside the embedding of their tokens."""
    for path, module in model.named_modules():
        embeds = hasattr(module, "embed_tokens") or any(isinstance(m, nn.Embedding) for m in module.children())
        if embeds and _has_layers(module):
            yield path, module


def _has_layers(module: nn.Module) -> bool:
    layers = getattr(module, "layers", None)
    return isinstance(layers, nn.ModuleList) and len(layers) > 0


class Transformers(Family):
    """transformers' own `InternVLForConditionalGeneration`, or its `InternVLModel` alone."""

    class_name = "InternVLForConditionalGeneration"
    core_name = "InternVLModel"
    features_name = "get_image_features"
    model_type = "internvl"
    vision_name, projector_name = "vision_tower", "multi_modal_projector"

    @property
    def core(self) -> Any:
        return self.model.model if hasattr(self.model, "model") else self.model

    def drop_vision(self) -> None:
        self.core.vision_tower = self.core.multi_modal_projector = None
        if hasattr(self.model, "flash"):
            del self.model.flash

    def drop_language(self) -> None:
        self.core.language_model = self.model.lm_head = None

    def tile_tokens(self, pixels: Any) -> Any:
        return self.vision(pixel_values=pixels.to(self.model.dtype)).last_hidden_state

    @property
    def causal(self) -> Any:
        return self.model

    @property
    def head(self) -> Any:
        return getattr(self.model, "lm_head", None)

    @property
    def token_id(self) -> int | None:
        return self.model.config.image_token_id

    @property
    def tokens_a_tile(self) -> int:
        return self.model.config.image_seq_length

    @property
    def tile_pixels(self) -> int:
        return _side(self.model.config.vision_config.image_size)

    @property
    def _ratio(self) -> float:
        return self.model.config.downsample_ratio

    @property
    def flash_holder(self) -> Any:
        return getattr(self.model, "flash", None)

    @property
    def flash_settings(self) -> Any:
        return self.model.config


class RemoteCode(Family):
    """`InternVLChatModel` of InternVL3, 3.5 and 3.5-Flash checkpoints, wherever its module lives."""

    class_name = core_name = "InternVLChatModel"
    features_name = "extract_feature"
    model_type = "internvl_chat"
    vision_name, projector_name = "vision_model", "mlp1"

    @property
    def core(self) -> Any:
        return self.model

    def drop_vision(self) -> None:
        for name in (self.vision_name, self.projector_name, *FLASH):
            if hasattr(self.model, name):
                delattr(self.model, name)

    def drop_language(self) -> None:
        self.model.language_model = None

    def tile_tokens(self, pixels: Any) -> Any:
        return self.vision(pixel_values=pixels, output_hidden_states=False, return_dict=True).last_hidden_state

    @property
    def causal(self) -> Any:
        return self.language

    @property
    def head(self) -> Any:
        return self.language.get_output_embeddings()

    @property
    def generate_name(self) -> str:
        # Flash code dispatches `generate` to the one that does not route.
        return "generate_normal" if hasattr(self.model, "generate_normal") else "generate"

    @property
    def token_id(self) -> int | None:
        return self.model.img_context_token_id

    @property
    def tokens_a_tile(self) -> int:
        return self.model.num_image_token

    @property
    def tile_pixels(self) -> int:
        config = self.model.config
        return _side(getattr(config, "force_image_size", None) or config.vision_config.image_size)

    @property
    def _ratio(self) -> float:
        return self.model.downsample_ratio

    @property
    def order(self) -> str:
        return "v1" if self.model.ps_version == "v1" else "v2"

    def forward_inputs(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        flags = torch.ones(len(pixel_values), 1, dtype=torch.int64, device=pixel_values.device)
        return {"image_flags": flags}  # every tile is a real one

    @property
    def flash_holder(self) -> Any:
        return self.model if hasattr(self.model, "mlp2") else None

    @property
    def flash_settings(self) -> Any:
        return self.model


FAMILIES: tuple[type[Family], ...] = (Transformers, RemoteCode)


def family_of(model: nn.Module) -> Family | None:
    """The description of this model, or None when it is no InternVL."""
    names = {base.__name__ for base in type(model).__mro__}
    for family in FAMILIES:
        if names & {family.class_name, family.core_name}:
            return family(model)
    return None


def families_in(model: nn.Module) -> Iterator[tuple[str, Family]]:
    """(path, description) of every InternVL in a model; a core inside a whole one is not listed by itself."""
    inside: set[int] = set()
    for family in FAMILIES:
        for path, module in named_instances(model, family.class_name, family.core_name):
            if id(module) not in inside:
                found = family(module)
                inside.add(id(found.core) if hasattr(module, "language_model") or hasattr(module, "model") else 0)
                yield path, found
