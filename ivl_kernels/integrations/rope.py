"""Rotary embedding in the language models: Qwen2, Qwen3, Qwen3-MoE, GPT-OSS, InternLM3 and their like.

`rope` replaces the forward of the attention modules of one model by a bound method that is the same sequence of calls
with one op for q/k norm and rotation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.plain import not_plain
from ..models.upstream import class_of, replaced_before
from ..ops import v2pe_rope, v2pe_rope_
from ._edit import Editor
from ._patch import Adapter, Feature, Site
from ._report import serving

# Every name that the forward of an attention class we reproduce may use. One with another name does something else.
_KNOWN = {
    *("ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "apply_rotary_pos_emb", "attention_dropout", "config"),
    *("contiguous", "eager_attention_forward", "get_interface", "head_dim", "k_norm", "k_proj", "layer_idx", "o_proj"),
    *("q_norm", "q_proj", "reshape", "scaling", "shape", "sinks", "sliding_window", "training", "transpose"),
    *("update", "v_proj", "view"),
}
_ARGUMENTS = ("self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values")
_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "scaling", "attention_dropout", "config")


@dataclass(frozen=True)
class _Upstream:
    """What the installed version's attention class does."""

    names: frozenset[str]
    apply: Any
    eager: Any
    functions: Any
    cache_position: bool
    half_width: bool  # cos and sin of half the width


@functools.cache
def _upstream(kind: type) -> _Upstream | str:
    """How an attention class works, or why we do not know."""
    function: Any = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    code, scope = function.__code__, function.__globals__
    names, arguments = frozenset(code.co_names), code.co_varnames[: code.co_argcount]
    unknown = sorted(names - _KNOWN)
    if unknown or "apply_rotary_pos_emb" not in names:
        return f"the forward of {kind.__name__} uses {', '.join(unknown) or 'no apply_rotary_pos_emb'}"
    if arguments not in (_ARGUMENTS, (*_ARGUMENTS, "cache_position")):
        return f"the forward of {kind.__name__} takes {', '.join(arguments)}"
    wanted = ("apply_rotary_pos_emb", "eager_attention_forward", "ALL_ATTENTION_FUNCTIONS")
    missing = [name for name in wanted if name not in scope]
    if missing:
        return f"the module of {kind.__name__} has no {', '.join(missing)}"
    apply = scope["apply_rotary_pos_emb"]
    return _Upstream(
        names, apply, scope["eager_attention_forward"], scope["ALL_ATTENTION_FUNCTIONS"],
        "cache_position" in arguments, "rotate_half" not in inspect.unwrap(apply).__code__.co_names,
    )  # fmt: skip


def _attention_problem(attention: Any) -> str:
    missing = [name for name in _PARTS if not hasattr(attention, name)]
    if missing:
        return f"unknown structure: {type(attention).__name__} has no {', '.join(missing)}"
    upstream = _upstream(class_of(attention))
    if isinstance(upstream, str):
        return f"unknown structure: {upstream}"
    return replaced_before(attention, "forward")


def _norm_problem(norm: Any) -> str:
    """Why a q/k norm has to be called as it is, or ""."""
    if not type(norm).__name__.endswith("RMSNorm") or not hasattr(norm, "variance_epsilon"):
        return f"{type(norm).__name__} is not an RMSNorm as we know it"
    if "GptOss" in type(norm).__name__:
        return "GPT-OSS multiplies by the weight in float32"
    return not_plain(norm, type(norm), type(norm).__name__)


def _fusable(upstream: _Upstream, attention: Any, q: torch.Tensor) -> bool:
    norms = (attention.q_norm, attention.k_norm)
    if q.dtype == torch.float64:
        return False  # upstream's norm rounds to float32 inside, whatever the dtype
    return all(n.weight.dtype == q.dtype and n.weight.shape == q.shape[-1:] and not _norm_problem(n) for n in norms)


def _attention(backend: str) -> Any:
    def forward(
        inner: Any,
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        upstream = _upstream(class_of(self))
        if rest or position_embeddings is None or "past_key_value" in kwargs or isinstance(upstream, str):
            return inner(self, hidden_states, position_embeddings, attention_mask, past_key_values, *rest, **kwargs)
        cache_position = kwargs.pop("cache_position", None) if upstream.cache_position else None
        shape = hidden_states.shape[:-1]
        per_head = (*shape, -1, self.head_dim)
        q, k = self.q_proj(hidden_states).view(per_head), self.k_proj(hidden_states).view(per_head)
        value = self.v_proj(hidden_states).view(per_head).transpose(1, 2)
        cos, sin = position_embeddings
        weights: dict[str, Any] = {}
        if "q_norm" in upstream.names:
            if _fusable(upstream, self, q) and self.q_norm.variance_epsilon == self.k_norm.variance_epsilon:
                weights = dict(q_weight=self.q_norm.weight, k_weight=self.k_norm.weight)
                weights["eps"] = self.q_norm.variance_epsilon
            else:
                q, k = self.q_norm(q), self.k_norm(k)
        width = self.head_dim // 2 if upstream.half_width else self.head_dim
        if cos.dtype != q.dtype or cos.dim() != 3 or cos.shape[-1] != width:  # autocast, multi-axis positions
            if weights:
                q, k = self.q_norm(q), self.k_norm(k)
            query, key = upstream.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        else:
            # In place unless somebody else may hold the projections: autograd, or a hook.
            mine = not (torch.is_grad_enabled() or self.q_proj._forward_hooks or self.k_proj._forward_hooks)
            rotate = v2pe_rope_ if mine else v2pe_rope
            q, k = rotate(q, k, cos=cos, sin=sin, heads_dim=2, **weights, backend=backend)
            query, key = q.transpose(1, 2), k.transpose(1, 2)
        if past_key_values is not None:
            extra = ({"sin": sin, "cos": cos, "cache_position": cache_position},) if upstream.cache_position else ()
            key, value = past_key_values.update(key, value, self.layer_idx, *extra)
        name = self.config._attn_implementation
        if hasattr(upstream.functions, "get_interface"):
            attend = upstream.functions.get_interface(name, upstream.eager)
        else:
            attend = upstream.eager if name == "eager" else upstream.functions[name]
        if "sliding_window" in upstream.names:
            kwargs["sliding_window"] = self.sliding_window
        if "sinks" in upstream.names:
            kwargs["s_aux"] = self.sinks
        output, attention_weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), attention_weights

    return forward


def _text_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of the decoder stacks: what holds `layers` with a `self_attn` each."""
    for path, module in model.named_modules():
        layers = getattr(module, "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or not hasattr(module, "embed_tokens"):
            continue
        if all(hasattr(layer, "self_attn") for layer in layers):
            yield path, module


class Rope(Adapter):
    features = {"rope": Feature(True, "q/k RMSNorm and rotary embedding in one op")}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, text in _text_models(model):
            problems = {_attention_problem(layer.self_attn) for layer in text.layers}
            what = f"{len(text.layers)} attention layers: q/k norm, rotary"
            yield Site("rope", path, text, what, "; ".join(sorted(problems - {""})))

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        for layer in site.module.layers:  # type: ignore[union-attr]
            edit.method(layer.self_attn, "forward", _attention(options["backend"]))  # type: ignore[union-attr, arg-type]

    def serving(self, site: Site) -> str:
        layer = site.module.layers[0].self_attn  # type: ignore[union-attr, index]
        norms = [getattr(layer, name) for name in ("q_norm", "k_norm") if hasattr(layer, name)]
        problem = next(filter(None, map(_norm_problem, norms)), "")
        text = serving("v2pe_rope_", layer.o_proj.weight)
        return f"{text}; q/k norm as upstream: {problem}" if problem else text


ADAPTER = Rope()
