"""A decoder stack run for the sake of its parts: one layer of each kind, and no product of queries and keys."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from .upstream import StandIn, class_of, signature


class _Reached(Exception):
    """An attention layer hands its keys and values to the cache."""


@functools.cache
def _cache_class() -> type:
    from transformers.cache_utils import DynamicCache

    class Stop(DynamicCache):  # type: ignore[misc]
        """Empty, and stays so."""

        def update(self, *args: Any, **kwargs: Any) -> Any:
            raise _Reached

    return Stop


class _Layer:
    """Stands for a decoder layer: runs it once for all of its kind, its attention as far as the cache."""

    def __init__(self, layer: Any, outputs: dict[Any, Any]) -> None:
        self.__dict__.update(_layer=layer, _outputs=outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer, outputs = self._layer, self._outputs
        kind = _kind(layer)
        if kind not in outputs:
            parts = {}
            if hasattr(layer, "self_attn"):
                parts["self_attn"] = functools.partial(_up_to_cache, layer.self_attn)
            outputs[kind] = inspect.unwrap(class_of(layer).forward)(StandIn(layer, **parts), *args, **kwargs)
        return outputs[kind]


def _kind(layer: Any) -> Any:
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    tensors = tuple((name, p.shape, p.dtype, p.device) for name, p in layer.named_parameters())
    return modules, tensors, getattr(layer, "attention_type", None)


def _up_to_cache(attention: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return attention(*args, **kwargs)
    except _Reached:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return torch.zeros_like(hidden), None


@torch.no_grad()
def run_layers(text: Any, batch: int, tokens: int) -> None:
    """Upstream's forward of a decoder stack on zeros [batch, tokens], a layer of each kind.

    Norms, projections, rotation, MLPs and experts run as they do when a prompt of `tokens` is prefilled, or when
    `batch` sequences decode a token; the product of queries and keys does not.
    """
    forward = class_of(text).forward
    weight = next(p for p in text.parameters() if p.is_floating_point())
    embeds = torch.zeros(batch, tokens, text.config.hidden_size, dtype=weight.dtype, device=weight.device)
    names = signature(forward).parameters
    cache = next(name for name in ("cache", "past_key_values") if name in names)
    outputs: dict[Any, Any] = {}
    layers = [_Layer(layer, outputs) for layer in text.layers]
    forward(StandIn(text, layers=layers), inputs_embeds=embeds, use_cache=True, **{cache: _cache_class()()})
