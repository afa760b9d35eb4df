"""Attention of the vision transformer and of the language model on the package's kernel.

Upstream's own forward runs on a stand-in whose configuration chooses ours, which is registered with transformers under
a name of its own. It serves what a call is known to mean: no mask, or one that says causal, sliding window or
everything. Whatever else was chosen or given goes to the function that upstream would have called: so does eager
attention, which also returns its weights, where somebody may look at them. Bodies that spell attention out (vision
transformers of checkpoints) run with a stand-in of their scale.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import _cpu, ops
from .._checks import KERNEL_FLOATS
from .._library import recorded
from .._plan import counted
from ..models.families import families_in, text_stacks
from ..models.plain import watched
from ..models.upstream import StandIn, class_of, code_of, forward_name, replaced_before, signature, uses
from ..ops import attention
from ..ops.attention.reference import visible
from ._edit import Editor
from ._patch import Adapter, Feature, Site
from ._report import serving
from ._scores import Scale

_TABLE = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"
_SDPA = "transformers.integrations.sdpa_attention"
# What transformers' sdpa takes and ours knows; other parameters of it must be left out.
_KNOWN = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}


@functools.cache
def _names(function: Any) -> dict[str, Any]:
    """The names of the module that holds the forward of an attention layer; none where that does not use the table."""
    inside = inspect.unwrap(function)
    return inside.__globals__ if _TABLE in inside.__code__.co_names else {}


def _stock(module: Any) -> tuple[str, Any]:
    """The name of the attention that was chosen, and what upstream's forward would call, if ours may take its place."""
    name = getattr(module.config, "_attn_implementation", None)
    names = _names(class_of(module).forward)
    if name == "sdpa" and _TABLE in names and name in names[_TABLE]:
        stock = names[_TABLE][name]
        return (name, stock) if getattr(stock, "__module__", "") == _SDPA else ("", None)
    if name == "eager" and _eager_as_ours(names.get(_EAGER), hasattr(module, "sinks")):
        return name, names[_EAGER]
    return "", None


def _meaning(
    mask: Any, q_shape: torch.Size, keys: int, causal: bool, window: int, eager: bool
) -> tuple[bool, int] | None:
    """(causal, window) of what a call means by its mask [B, 1, queries, keys]; None where that is not known."""
    batch, _, queries, _ = q_shape
    if mask is None:  # as transformers reads it: causal from the first key on
        return causal and queries > 1, 0
    shapes = ((1, 1, queries, keys), (batch, 1, queries, keys))
    if type(mask) is not torch.Tensor or mask.shape not in shapes:
        return None
    seen = mask
    if mask.dtype != torch.bool or eager:  # which adds a mask of whatever kind to its scores
        if not mask.is_floating_point() or mask.requires_grad:
            return None
        seen = mask == 0
        if not bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            return None
    if bool(seen.all()):
        return False, 0
    for size in {0, window}:
        pattern = visible(queries, keys, True, size, mask.device)
        if queries <= keys and torch.equal(seen, pattern.expand_as(seen)):
            return True, size
    return None


def _attend(stock: Callable[..., Any], backend: str, eager: bool, has_sinks: bool) -> Callable[..., Any]:
    unknown = {"softcap", *signature(stock).parameters} - _KNOWN

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *rest: Any, **options: Any) -> Any:
        def theirs() -> Any:
            return stock(module, query, key, value, attention_mask, *rest, **options)

        sinks, causal = options.get("s_aux"), options.get("is_causal")
        plain = not (rest or options.get("dropout") or options.get("output_attentions"))
        plain = plain and all(options.get(name) is None for name in unknown)
        plain = plain and isinstance(options.get("scaling"), (float, int, types.NoneType))  # a tensor may be learned
        if not plain or (sinks is None) == has_sinks or not _reads(query, key, value):
            return theirs()
        if sinks is not None and (sinks.dtype not in (torch.float32, query.dtype) or sinks.device != query.device):
            return theirs()
        causal = getattr(module, "is_causal", True) if causal is None else causal
        queries, keys = query.shape[2], key.shape[2]
        window = options.get("sliding_window") or 0
        found = _meaning(attention_mask, query.shape, keys, causal and not eager, window, eager)
        if found is None or found[0] and queries > keys:
            return theirs()
        causal, window = found
        if attention_mask is None and causal:
            key, value = key[:, :, :queries], value[:, :, :queries]
        heads_last = (x.transpose(1, 2) for x in (query, key, value))
        out = attention(
            *heads_last,
            causal=causal,
            window=window or None,
            sinks=sinks,
            scale=options.get("scaling"),
            backend=backend,
        )
        return out, None

    return attend


def _reads(q: Any, k: Any, v: Any) -> bool:
    if recorded() or counted() or torch.is_autocast_enabled("cpu"):
        return False
    if any(
        type(x) is not torch.Tensor or x.device.type != "cpu" or x.dim() != 4 or x.dtype != q.dtype for x in (q, k, v)
    ):
        return False
    if q.shape[-1] % 8 or not 0 < q.shape[-1] <= 256 or q.dtype not in KERNEL_FLOATS:
        return False
    same = k.shape == v.shape and k.shape[0] == q.shape[0] and k.shape[-1] == q.shape[-1]
    return same and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0


@functools.cache
def _eager_as_ours(function: Any, has_sinks: bool) -> bool:
    """Whether an eager attention function computes softmax, with sinks as GPT-OSS's: judged by what it computes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(2, generator=generator, dtype=torch.float64) if has_sinks else None
    layer: Any = nn.Module()
    layer.sinks, layer.num_key_value_groups, layer.training = sinks, 1, False
    seen = visible(5, 5, True, 0, q.device)
    mask = torch.zeros(1, 1, 5, 5, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
    try:
        with torch.device("cpu"), torch.no_grad():
            got = function(layer, q, k, v, mask, scaling=0.3, dropout=0.0, s_aux=sinks)[0]
            heads_last = (x.transpose(1, 2) for x in (q, k, v))
            expected = ops.attention(*heads_last, causal=True, sinks=sinks, scale=0.3, backend="reference")
        # Weights rounded to float32 on the way are what upstream's own are.
        return bool(torch.allclose(got, expected, rtol=0, atol=1e-6))
    except Exception:
        return False


@functools.cache
def _registered(table: Any, stock: Callable[..., Any], name: str, has_sinks: bool, backend: str) -> str:
    """The name in transformers' table of attention functions under which ours takes the place of `stock`."""
    function = _attend(stock, backend, name == "eager", has_sinks)
    ours = f"ivl_kernels {name} {id(stock)} {has_sinks} {backend}".strip()
    table.register(ours, function)
    return ours


def _forward(backend: str) -> Callable[..., Any]:
    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        name, stock = ("", None) if torch.compiler.is_compiling() else _stock(self)
        # Eager attention also returns its weights: whoever may look at them gets them.
        if not name or name == "eager" and (watched(self) or getattr(self.config, "output_attentions", False)):
            return inner(self, *args, **kwargs)
        table: Any = type(_names(class_of(self).forward)[_TABLE])
        chosen = _registered(table, stock, name, hasattr(self, "sinks"), backend)
        return inner(StandIn(self, config=StandIn(self.config, _attn_implementation=chosen)), *args, **kwargs)

    return forward


def _layers(root: Any) -> list[Any]:
    return [m for m in root.modules() if uses(class_of(m).forward, _TABLE) and hasattr(m, "config")]


_NAIVE = "_naive_attn"  # where a checkpoint's vision transformer spells attention out, unless its forward does


def _spelled(root: Any) -> list[Any]:
    """The attention layers of a vision transformer that multiply their queries by `scale` themselves."""
    scaled = (m for m in root.modules() if isinstance(vars(m).get("scale"), float))
    return [m for m in scaled if not uses(class_of(m).forward, _TABLE) and "scale" in _body(m).co_names]


def _body(module: Any) -> Any:
    kind = class_of(module)
    return code_of(getattr(kind, _NAIVE, kind.forward))


def _spelled_forward(backend: str) -> Callable[..., Any]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor | None:
        if not _reads(q, k, v):
            return None
        heads_last = (x.transpose(1, 2) for x in (q, k, v))
        return attention(*heads_last, scale=scale, backend=backend).transpose(1, 2)

    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        scale = self.scale
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(scale) is not float:
            return inner(self, *args, **kwargs)
        return inner(StandIn(self, scale=Scale(scale, attend)), *args, **kwargs)

    return forward


def _method(layer: Any) -> str:
    return _NAIVE if hasattr(class_of(layer), _NAIVE) else forward_name(layer)


def _roots(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    paths = {id(module): path for path, module in model.named_modules()}
    for _, family in families_in(model):
        if family.has_vision:
            yield paths[id(family.vision)], family.vision
    yield from text_stacks(model)


class Attention(Adapter):
    features = {
        "attention": Feature(True, "attention without a [tokens, tokens] matrix or repeated keys (CPU)"),
    }

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, root in _roots(model):
            chosen, spelled = _layers(root), _spelled(root)
            layers = chosen or spelled
            reasons = {replaced_before(layer, _method(layer)) for layer in layers} - {""}
            theirs = _cpu.problem() or ""
            if not layers:
                theirs = f"how {type(root).__name__} computes its attention is not known"
            elif chosen and not _stock(chosen[0])[0]:
                theirs = f"its attention is {chosen[0].config._attn_implementation}"
            elif all(p.device.type not in ("cpu", "meta") for p in layers[0].parameters()):
                theirs = "not on a CPU"
            what, reason = f"{len(layers)} attention layers", "; ".join(sorted(reasons))
            yield Site("attention", path, root, what, reason or theirs, upstream=not reason)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        for layers, function in ((_layers, _forward), (_spelled, _spelled_forward)):
            for layer in layers(site.module):
                edit.method(layer, _method(layer), function(options["backend"]))

    def serving(self, site: Site) -> str:
        chosen = _layers(site.module)
        if chosen and not _stock(chosen[0])[0]:
            return f"upstream's own code: {chosen[0].config._attn_implementation} was chosen"
        return serving("attention", site.module)


ADAPTER = Attention()
