"""transformers' own InternVL: `InternVLForConditionalGeneration`, `InternVLModel`.

Upstream's bodies of `get_image_features` and `forward` run as they are, on a stand-in of the model whose pixel
shuffle, projector and placeholder mask are ours: outputs, keyword arguments and errors stay those of the installed
version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .._library import transformed
from ..models.upstream import StandIn, named_instances, replaced_before
from ._edit import Editor
from ._patch import PACKING, PROJECTOR, Adapter, Site
from ._report import serving
from ._vision import DeferredMask, DeferredShuffle, place, projector_problem

_LAYERS = (("layer_norm", nn.LayerNorm), ("linear_1", nn.Linear), ("act", nn.GELU), ("linear_2", nn.Linear))
_PARTS = ("vision_tower", "multi_modal_projector", "language_model", "pixel_shuffle", "get_placeholder_mask")


def _problem(model: Any) -> str:
    """Why the projector of an InternVLModel has to be called as upstream does, or ""."""
    projector = model.multi_modal_projector
    if type(projector).__name__ != "InternVLMultiModalProjector":
        return f"multi_modal_projector is a {type(projector).__module__}.{type(projector).__name__}"
    factor = round(1 / model.config.downsample_ratio)
    if factor * model.config.downsample_ratio != 1:
        return f"downsample_ratio is {model.config.downsample_ratio}, not one over an integer"
    return projector_problem(projector, _LAYERS, model.config.vision_config.hidden_size * factor**2)


def _get_image_features(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if _problem(self):
        return inner(self, *args, **kwargs)

    def pixel_shuffle(x: torch.Tensor, scale_factor: float = 0.5) -> DeferredShuffle:
        return DeferredShuffle(x, scale_factor, self.pixel_shuffle)

    return inner(StandIn(self, pixel_shuffle=pixel_shuffle), *args, **kwargs)


def _project(backend: str) -> Any:
    def forward(inner: Any, self: Any, x: Any) -> torch.Tensor:
        if not isinstance(x, DeferredShuffle):
            return inner(self, x)
        return x.project(self.layer_norm, (self.linear_1, self.linear_2), backend)

    return forward


def _forward(backend: str) -> Any:
    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        # Upstream's mask has a fixed shape: no break in the compiled graph.
        if torch.compiler.is_compiling() or transformed():
            return inner(self, *args, **kwargs)

        def get_placeholder_mask(input_ids: Any, *rest: Any, **named: Any) -> Any:
            def mask() -> torch.Tensor:
                return self.get_placeholder_mask(input_ids, *rest, **named)

            def write(embeds: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
                embedding = self.get_input_embeddings()
                return place(embedding, embeds, input_ids, rows, self.config.image_token_id, backend)

            return mask() if input_ids is None else DeferredMask(mask, write)

        return inner(StandIn(self, get_placeholder_mask=get_placeholder_mask), *args, **kwargs)

    return forward


class Native(Adapter):
    features = {"projector": PROJECTOR, "packing": PACKING}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, module in named_instances(model, "InternVLModel"):
            missing = [name for name in _PARTS if not hasattr(module, name)]
            strange = f"unknown structure: no {', '.join(missing)}" if missing else ""
            reason = (
                strange
                or replaced_before(module, "get_image_features")
                or replaced_before(module.multi_modal_projector, "forward")
                or _problem(module)
            )
            yield Site("projector", path, module, "get_image_features: shuffle, LayerNorm, MLP", reason)
            reason = strange or replaced_before(module, "forward")
            yield Site("packing", path, module, "forward: visual rows into placeholders", reason)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        if site.feature == "projector":
            edit.method(site.module.multi_modal_projector, "forward", _project(options["backend"]))
            edit.method(site.module, "get_image_features", _get_image_features)
        else:
            edit.method(site.module, "forward", _forward(options["backend"]))

    def serving(self, site: Site) -> str:
        model: Any = site.module
        if site.feature == "packing":
            return serving("place_rows_", model.get_input_embeddings().weight)
        problem = _problem(model)
        if problem:
            return f"upstream's own code: {problem}"
        return serving("pixel_shuffle_mlp", model.multi_modal_projector.linear_1.weight)


ADAPTER = Native()
