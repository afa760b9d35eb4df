"""Attention of the vision transformer on the package's kernel, through upstream's own body.

Of upstream's attention module one name is replaced: the table of attention functions, whose "sdpa" is ours where a call
is plain attention of whole tiles (no mask, no dropout, not causal) on the CPU. Whatever else was chosen is upstream's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import _native
from .._checks import KERNEL_DTYPES
from .._library import transformed
from ..models.families import families_in
from ..models.upstream import class_of, forward_name, renamed, replaced_before, unchanged, uses
from ..ops import attention
from ._edit import Editor
from ._patch import Adapter, Feature, Site
from ._report import serving

_TABLE = "ALL_ATTENTION_FUNCTIONS"
_SERVED = "sdpa"


class _Table:
    """Upstream's table of attention functions with ours in the place of sdpa."""

    def __init__(self, stock: Any, backend: str) -> None:
        self._stock, self._backend = stock, backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._ours(name, self._stock[name])

    def get_interface(self, name: str, default: Any) -> Callable[..., Any]:
        return self._ours(name, self._stock.get_interface(name, default))

    def _ours(self, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        own = getattr(stock, "__module__", "") == "transformers.integrations.sdpa_attention"
        return _attend(stock, self._backend) if name == _SERVED and own else stock


def _attend(stock: Callable[..., Any], backend: str) -> Callable[..., Any]:
    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any = None, *rest: Any, **options: Any) -> Any:
        plain = mask is None and not rest and not options.get("dropout") and options.get("is_causal") is False
        if not plain or not all(map(_reads, (q, k, v))) or torch.is_autocast_enabled("cpu"):
            return stock(module, q, k, v, mask, *rest, **options)
        heads_last = (x.transpose(1, 2) for x in (q, k, v))
        return attention(*heads_last, scale=options.get("scaling"), backend=backend), None

    return attend


def _reads(x: Any) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    fits = type(x) is torch.Tensor and x.device.type == "cpu" and x.dim() == 4 and x.shape[-1] % 8 == 0
    return fits and 0 < x.shape[-1] <= 256 and str(x.dtype).removeprefix("torch.") in KERNEL_DTYPES


def _layers(vision: Any) -> list[Any]:
    return [m for m in vision.modules() if uses(class_of(m).forward, _TABLE)]


def _forward(kind: Any, backend: str) -> Callable[..., Any]:
    stock = kind.forward
    body = renamed(stock, **{_TABLE: _Table(inspect.unwrap(stock).__globals__[_TABLE], backend)})

    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        if class_of(self) is not kind or kind.forward is not stock or not unchanged(body, stock):
            return inner(self, *args, **kwargs)
        return body(self, *args, **kwargs)

    return forward


class Attention(Adapter):
    features = {
        "attention": Feature(False, "attention of the vision transformer without a [tokens, tokens] matrix (CPU)"),
    }

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        paths = {id(module): path for path, module in model.named_modules()}
        for _, family in families_in(model):
            vision = family.vision
            layers = _layers(vision)
            reasons = {replaced_before(layer, forward_name(layer)) for layer in layers} - {""}
            if not layers:
                reasons = {f"{type(vision).__name__} does not choose its attention from transformers' table"}
            elif layers[0].config._attn_implementation != _SERVED:
                reasons = {f"its attention is {layers[0].config._attn_implementation}, not {_SERVED}"}
            reason = _native.problem() or "; ".join(sorted(reasons))
            yield Site("attention", paths[id(vision)], vision, f"{len(layers)} attention layers", reason)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        made: dict[Any, Any] = {}
        for layer in _layers(site.module):
            kind = class_of(layer)
            if kind not in made:
                made[kind] = _forward(kind, options["backend"])
            edit.method(layer, forward_name(layer), made[kind])

    def serving(self, site: Site) -> str:
        name = _layers(site.module)[0].config._attn_implementation
        return serving("attention", site.module) if name == _SERVED else f"upstream's own code: {name} was chosen"


ADAPTER = Attention()
