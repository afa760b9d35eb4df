"""Remote code: `InternVLChatModel` of InternVL3, 3.5 and 3.5-Flash checkpoints, wherever its module lives.

Everything the model lets change later (`img_context_token_id`, `ps_version`, `select_layer`, `downsample_ratio`) is
read at the call. What raises upstream still raises; what `forward` does on a wrong count is left to upstream.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .._library import transformed
from ..models.upstream import StandIn, class_of, named_instances, replaced_before
from ._edit import Editor
from ._patch import PACKING, PROJECTOR, Adapter, Site
from ._report import serving
from ._vision import DeferredShuffle, place, projector_problem

_LAYERS = (("0", nn.LayerNorm), ("1", nn.Linear), ("2", nn.GELU), ("3", nn.Linear))
_PARTS = ("vision_model", "mlp1", "language_model", "extract_feature", "pixel_shuffle", "generate", "downsample_ratio")


def _problem(model: Any) -> str:
    """Why mlp1 has to be called as upstream does, or ""."""
    if type(model.mlp1) is not nn.Sequential or len(model.mlp1) != len(_LAYERS):
        return f"mlp1 is a {type(model.mlp1).__name__} of other layers than LayerNorm, Linear, GELU, Linear"
    factor = round(1 / model.downsample_ratio)
    if factor * model.downsample_ratio != 1:
        return f"downsample_ratio is {model.downsample_ratio}, not one over an integer"
    return projector_problem(model.mlp1, _LAYERS, model.mlp1[0].weight.shape[0])


def _extract_feature(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if _problem(self):
        return inner(self, *args, **kwargs)

    def pixel_shuffle(x: torch.Tensor, scale_factor: float = 0.5) -> DeferredShuffle:
        return DeferredShuffle(x, scale_factor, self.pixel_shuffle, "v1" if self.ps_version == "v1" else "v2")

    return inner(StandIn(self, pixel_shuffle=pixel_shuffle), *args, **kwargs)


def _mlp1(backend: str) -> Any:
    def forward(inner: Any, self: Any, x: Any) -> torch.Tensor:
        return x.project(self[0], (self[1], self[3]), backend) if isinstance(x, DeferredShuffle) else inner(self, x)

    return forward


def _generate(backend: str) -> Any:
    @torch.no_grad()
    def generate(
        inner: Any,
        self: Any,
        pixel_values: Any = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        visual_features: Any = None,
        generation_config: Any = None,
        output_hidden_states: Any = None,
        **generate_kwargs: Any,
    ) -> Any:
        token = self.img_context_token_id
        if pixel_values is None or input_ids is None or token is None:
            return inner(
                self,
                pixel_values=pixel_values,
                input_ids=input_ids,
                attention_mask=attention_mask,
                visual_features=visual_features,
                generation_config=generation_config,
                output_hidden_states=output_hidden_states,
                **generate_kwargs,
            )
        rows = visual_features if visual_features is not None else self.extract_feature(pixel_values)
        embedding = self.language_model.get_input_embeddings()
        embeds = embedding(input_ids)
        rows = rows.reshape(-1, embeds.shape[-1]).to(embeds.device)
        if rows.shape[0] == 0:
            raise ValueError("pixel_values: got no tile")
        return self.language_model.generate(
            inputs_embeds=place(embedding, embeds, input_ids, rows, token, backend),
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            **generate_kwargs,
        )

    return generate


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _forward(backend: str) -> Any:
    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        given = _signature(class_of(self).forward).bind(self, *args, **kwargs).arguments
        ids, flags, token = given.get("input_ids"), given.get("image_flags"), self.img_context_token_id
        if ids is None or flags is None or token is None or torch.compiler.is_compiling() or transformed():
            return inner(self, *args, **kwargs)
        features = self.extract_feature(given["pixel_values"])
        embedding = self.language_model.get_input_embeddings()
        embeds = embedding(ids)
        rows = features[flags.squeeze(-1) == 1].reshape(-1, features.shape[-1])
        if rows.shape[0] != int((ids == token).sum()) or rows.dtype != embeds.dtype or rows.device != embeds.device:
            # Upstream has its own answer to this (it prints a warning, and the two code bases differ).
            return inner(StandIn(self, extract_feature=lambda pixel_values: features), *args, **kwargs)
        placed = place(embedding, embeds, ids, rows, token, backend)
        # Upstream's body then finds the rows in place: nothing is marked as a placeholder, there is nothing to write.
        return inner(
            StandIn(
                self,
                img_context_token_id=-1,
                extract_feature=lambda pixel_values: features[:, :0],
                language_model=StandIn(self.language_model, get_input_embeddings=lambda: lambda input_ids: placed),
            ),
            *args,
            **kwargs,
        )

    return forward


class Chat(Adapter):
    features = {"projector": PROJECTOR, "packing": PACKING}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, module in named_instances(model, "InternVLChatModel"):
            missing = [name for name in _PARTS if not hasattr(module, name)]
            strange = f"unknown structure: no {', '.join(missing)}" if missing else ""
            reason = (
                strange
                or replaced_before(module, "extract_feature")
                or replaced_before(module.mlp1, "forward")
                or _problem(module)
            )
            yield Site("projector", path, module, "extract_feature: shuffle, mlp1", reason)
            reason = strange or replaced_before(module, _generator(module)) or replaced_before(module, "forward")
            yield Site("packing", path, module, "generate, forward: visual rows into placeholders", reason)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        backend = options["backend"]
        if site.feature == "projector":
            edit.method(site.module.mlp1, "forward", _mlp1(backend))  # type: ignore[arg-type]
            edit.method(site.module, "extract_feature", _extract_feature)
        else:
            edit.method(site.module, _generator(site.module), _generate(backend))
            edit.method(site.module, "forward", _forward(backend))

    def serving(self, site: Site) -> str:
        model: Any = site.module
        if site.feature == "packing":
            return serving("place_rows_", model.language_model.get_input_embeddings().weight)
        problem = _problem(model)
        return f"upstream's own code: {problem}" if problem else serving("pixel_shuffle_mlp", model.mlp1[1].weight)


def _generator(model: nn.Module) -> str:
    """The method that embeds without routing: Flash code dispatches `generate` to it."""
    return "generate_normal" if hasattr(model, "generate_normal") else "generate"


ADAPTER = Chat()
