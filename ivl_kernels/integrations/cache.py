"""Keys and values of new tokens are written behind those that a `DynamicCache` holds, which are not copied with them.

transformers' cache concatenates: every token copies all keys and values of a layer. Here they lie in memory with some
rows to spare, and what the cache holds is a view of its first rows. Everybody else reads and changes the cache as
before: whoever puts other tensors into it (beam search, cropping) is seen, and the next token starts new memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .._library import transformed
from ..models.families import text_stacks
from ..models.upstream import StandIn, forward_name, is_cache, replaced_before
from ._edit import Editor
from ._patch import Adapter, Feature, Site

_ROOMS = "_ivl_rooms"  # of a layer of a cache


class _Room:
    """Memory [B, heads, rows and spare ones, d] of which a cache holds `view`, the first rows."""

    def __init__(self, memory: torch.Tensor, rows: torch.Tensor) -> None:
        self.memory = memory
        self.memory[:, :, : rows.shape[2]] = rows
        self.view = rows

    def __reduce__(self) -> Any:  # copies and pickles of a cache hold their tensors and nothing of ours
        return type(None), ()

    def takes(self, rows: torch.Tensor, more: int) -> bool:
        """Whether `more` rows fit behind these, which the cache holds now."""
        usable = torch.is_inference_mode_enabled() or not self.memory.is_inference()
        # The same tensor may have been given other memory, as its `data`.
        begins = not rows.numel() or rows.data_ptr() == self.memory.data_ptr()
        here = rows is self.view and begins and rows.stride() == self.memory.stride()
        return here and usable and rows.shape[2] + more <= self.memory.shape[2]

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        start = self.view.shape[2]
        self.memory[:, :, start : start + rows.shape[2]] = rows
        self.view = self.memory[:, :, : start + rows.shape[2]]
        return self.view


def _memory(rows: torch.Tensor, more: int, count: int = 1) -> tuple[torch.Tensor, ...]:
    """`count` times memory for rows [B, heads, rows, d], for `more` behind them and for some to spare."""
    length = rows.shape[2] + more
    return rows.new_empty(count, *rows.shape[:2], length + max(64, length // 8), rows.shape[3]).unbind()


def _begin(cache: Any, layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """No rows yet, as upstream begins, in memory of ours.

    On the CPU all layers that are alike have theirs in one piece, or the heap would be left with holes between them
    that fit nothing; what is never written takes no room.
    """
    layer.update(keys[:, :, :0], values[:, :, :0])
    empty = layer.keys, layer.values
    if _ROOMS not in layer.__dict__:
        alike = [layer]
        if keys.device.type == "cpu":
            alike += [each for each in cache.layers if type(each) is type(layer) and each.keys is None]
        memories = (_memory(old, new.shape[2], len(alike)) for old, new in zip(empty, (keys, values)))
        for each, *pair in zip(alike, *memories):
            each.__dict__[_ROOMS] = tuple(_Room(memory, memory[:, :, :0]) for memory in pair)
    views = [room.view for room in layer.__dict__[_ROOMS]]
    if all((a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) for a, b in zip(views, empty)):
        layer.keys, layer.values = views


def _append(cache: Any, *args: Any, **kwargs: Any) -> Any:
    """`cache.update`."""
    if len(args) < 3:
        return cache.update(*args, **kwargs)
    keys, values, index, *_ = args
    layer = cache.layers[index] if type(index) is int and index < len(cache.layers) else None
    if layer is None or not _grows(cache, layer, keys, values):
        return cache.update(*args, **kwargs)
    if layer.keys is None:
        _begin(cache, layer, keys, values)
    rooms = layer.__dict__.get(_ROOMS) or (None, None)
    rooms = tuple(
        room if room is not None and room.takes(old, new.shape[2]) else _Room(_memory(old, new.shape[2])[0], old)
        for room, old, new in zip(rooms, (layer.keys, layer.values), (keys, values))
    )
    layer.keys, layer.values = (room.append(new) for room, new in zip(rooms, (keys, values)))
    layer.__dict__[_ROOMS] = rooms
    return layer.keys, layer.values


def _grows(cache: Any, layer: Any, keys: Any, values: Any) -> bool:
    """Whether upstream would concatenate here, and nothing else, without gradients."""
    from transformers.cache_utils import DynamicLayer

    if type(layer) is not DynamicLayer or "update" in vars(layer) or "update" in vars(cache):
        return False
    if any(type(each).update.__module__ != DynamicLayer.__module__ for each in (layer, cache)):
        return False  # changed by somebody else
    if torch.is_grad_enabled() or getattr(cache, "offloading", False) or transformed() or torch.jit.is_tracing():
        return False
    if layer.keys is None:
        return all(type(new) is torch.Tensor and new.dim() == 4 for new in (keys, values))
    return all(
        type(old) is torch.Tensor and type(new) is torch.Tensor and old.dim() == new.dim() == 4
        and old.shape[:2] == new.shape[:2] and old.shape[3] == new.shape[3]
        and old.dtype == new.dtype and old.device == new.device
        for old, new in ((layer.keys, keys), (layer.values, values))
    )  # fmt: skip


def _grown(value: Any) -> Any:
    """An argument of an attention layer; of a `DynamicCache`, one whose `update` is ours."""
    if not is_cache(value):
        return value
    from transformers.cache_utils import DynamicCache

    return StandIn(value, update=functools.partial(_append, value)) if type(value) is DynamicCache else value


def _given(value: Any) -> Any:
    """The cache behind what `_grown` made of it; any other value as it is."""
    return value._ivl_module if type(value) is StandIn and is_cache(value) else value


def _forward(inner: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return inner(self, *args, **kwargs)
    out = inner(self, *map(_grown, args), **{name: _grown(value) for name, value in kwargs.items()})
    # Bodies of old return the cache that they were given.
    return tuple(map(_given, out)) if type(out) is tuple else out


class Cache(Adapter):
    features = {"cache": Feature(True, "new tokens' keys and values written behind the old ones, which stay in place")}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, text in text_stacks(model):
            layers = [layer.self_attn for layer in text.layers if hasattr(layer, "self_attn")]
            reasons = {replaced_before(layer, forward_name(layer)) for layer in layers} - {""}
            reason = "; ".join(sorted(reasons)) or ("" if layers else "its layers have no self_attn")
            yield Site("cache", path, text, f"caches given to {len(layers)} attention layers", reason)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        for layer in site.module.layers:  # type: ignore[union-attr]
            if hasattr(layer, "self_attn"):
                edit.method(layer.self_attn, forward_name(layer.self_attn), _forward)

    def serving(self, site: Site) -> str:
        return "torch"


ADAPTER = Cache()
