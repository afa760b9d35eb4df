"""Rotary embedding in the language models: Qwen2, Qwen3, Qwen3-MoE, GPT-OSS, InternLM3 and their like.

The attention's own forward runs, with the rotary function of its module replaced by one op for q/k norm and rotation.
Nothing is known of its arguments, its cache or its attention interface.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .._library import transformed
from ..models.families import text_stacks
from ..models.plain import not_plain, rms_norm
from ..models.upstream import (
    Deferred,
    StandIn,
    class_of,
    forward_name,
    made,
    renamed,
    replaced_before,
    unchanged,
    uses,
)
from ..ops import v2pe_rope
from ._edit import Editor
from ._patch import Adapter, Feature, Site
from ._report import serving

_ROTARY = "apply_rotary_pos_emb"


class DeferredNorm(Deferred):
    """Stands for `norm(x)` between upstream's norm and its rotation, which then does both at once."""

    def __init__(self, norm: Any, x: Any) -> None:
        self.norm, self.x = norm, made(x)

    def tensor(self) -> torch.Tensor:
        return self.norm(self.x)

    def transpose(self, one: int, other: int) -> Any:
        last = self.x.dim() - 1
        if last in (one % self.x.dim(), other % self.x.dim()):
            return self.tensor().transpose(one, other)
        return DeferredNorm(self.norm, self.x.transpose(one, other))


@functools.cache
def _angles(function: Any) -> tuple[int, ...]:
    """How many times the width of cos and sin a head is wide (1, 2) for which the rotary function is ours."""
    generator = torch.Generator().manual_seed(0)
    widths = []
    for times in (1, 2):
        q, k = (torch.randn(1, heads, 3, 8, generator=generator, dtype=torch.float64) for heads in (4, 2))
        angles = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
        angles = angles if times == 2 else torch.cat((angles, angles), -1)
        expected = v2pe_rope(q, k, cos=angles.cos(), sin=angles.sin(), backend="reference")
        try:
            got = function(q, k, angles.cos(), angles.sin())
            same = all(torch.allclose(g, e, rtol=0, atol=1e-12) for g, e in zip(got, expected))
        except Exception:
            continue
        widths += [times] if same else []
    return tuple(widths)


def _rotation(kind: type) -> tuple[Any, str]:
    """(the rotary function that the attention class calls, why it cannot be ours)."""
    function = kind.forward  # type: ignore[attr-defined]
    if not uses(function, _ROTARY):
        return None, f"unknown structure: the forward of {kind.__name__} does not call {_ROTARY} of its module"
    stock = inspect.unwrap(function).__globals__[_ROTARY]
    with torch.device("cpu"):
        known = _angles(stock)
    return stock, "" if known else f"unknown structure: {_ROTARY} of {kind.__name__} is not a rotation as we know it"


def _attention_problem(attention: Any) -> str:
    kind = class_of(attention)
    problem = _rotation(kind)[1] or replaced_before(attention, forward_name(attention))
    if problem:
        return problem
    try:
        renamed(kind.forward, **{_ROTARY: None})
    except ValueError as error:
        return f"unknown structure: {error}"
    return ""


def _layer_problem(layer: Any) -> str:
    if not hasattr(layer, "self_attn"):
        return f"unknown structure: {type(layer).__name__} has no self_attn"
    return _attention_problem(layer.self_attn)


def _norm_problem(norm: nn.Module) -> str:
    """Why a q/k norm has to be called as it is, or ""."""
    kind: Any = class_of(norm)
    return rms_norm(kind)[1] or not_plain(norm, kind, kind.__name__, later=True)


def _rotate(stock: Any, eps: str, backend: str) -> Callable[..., Any]:
    """What takes the place of `stock`, the module's rotary function; like it, never in place."""
    widths = _angles(stock)

    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        deferred = isinstance(q, DeferredNorm) and isinstance(k, DeferredNorm)
        x = q.x if deferred else made(q)
        # Autocast, axes of several positions and transforms are upstream's, and so is a layout that was asked for.
        known = cos.dim() == 3 and cos.dtype == x.dtype and any(x.shape[-1] == n * cos.shape[-1] for n in widths)
        # A norm of another dtype gives another dtype than its input's; in float64 upstream's rounds to float32 inside.
        weights: tuple[Any, ...] = (q.norm.weight, k.norm.weight) if deferred else ()
        fusable = all(w.dtype == x.dtype != torch.float64 and w.device == x.device for w in weights)
        if args or kwargs or not known or not fusable or transformed():
            return stock(made(q), made(k), cos, sin, *args, **kwargs)
        if not deferred:
            return v2pe_rope(x, made(k), cos=cos, sin=sin, backend=backend)
        norms = {"q_weight": weights[0], "k_weight": weights[1], "eps": getattr(q.norm, eps)}
        return v2pe_rope(x, k.x, cos=cos, sin=sin, **norms, backend=backend)

    return apply_rotary_pos_emb


def _fusable(q: Any, k: Any, norm: type[nn.Module], eps: str) -> bool:
    plain = all(not not_plain(each, norm, "") and each.weight.dim() == 1 for each in (q, k))
    return plain and getattr(q, eps) == getattr(k, eps)


def _attention(kind: Any, norm: Any, backend: str) -> Callable[..., Any]:
    stock = kind.forward
    rotary = _rotation(kind)[0]
    eps = rms_norm(norm)[0] if norm else ""
    stock_norm = norm.forward if norm else None
    body = renamed(stock, **{_ROTARY: _rotate(rotary, eps, backend)})

    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = class_of(self) is kind and kind.forward is stock and unchanged(body, stock)
        if not ours or torch.jit.is_tracing():
            return inner(self, *args, **kwargs)
        me = self
        if eps and norm and norm.forward is stock_norm and _fusable(self.q_norm, self.k_norm, norm, eps):
            norms = {
                name: functools.partial(DeferredNorm, module)
                for name, module in (("q_norm", self.q_norm), ("k_norm", self.k_norm))
            }
            me = StandIn(self, **norms)
        return body(me, *args, **kwargs)

    return forward


class Rope(Adapter):
    features = {"rope": Feature(True, "q/k RMSNorm and rotary embedding in one op")}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, text in text_stacks(model):
            problems = {_layer_problem(layer) for layer in text.layers}
            what = f"{len(text.layers)} attention layers: q/k norm, rotary"
            yield Site("rope", path, text, what, "; ".join(sorted(problems - {""})))

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        made: dict[Any, Any] = {}
        for layer in site.module.layers:  # type: ignore[union-attr]
            attention: Any = layer.self_attn  # type: ignore[union-attr]
            key = (class_of(attention), class_of(attention.q_norm) if hasattr(attention, "q_norm") else None)
            if key not in made:
                made[key] = _attention(*key, options["backend"])
            edit.method(attention, forward_name(attention), made[key])

    def serving(self, site: Site) -> str:
        layer = site.module.layers[0].self_attn  # type: ignore[union-attr, index]
        norms = [getattr(layer, name) for name in ("q_norm", "k_norm") if hasattr(layer, name)]
        problem = next(filter(None, map(_norm_problem, norms)), "")
        text = serving("v2pe_rope", layer, site.module)
        return f"{text}; q/k norm as upstream: {problem}" if problem else text


ADAPTER = Rope()
