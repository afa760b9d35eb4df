"""The vision side of both InternVL families: the projector, and the visual rows in the text's embeddings.

Upstream's own bodies run on a stand-in of the model whose pixel shuffle, placeholder mask or embeddings are deferred
to one op: arguments, outputs and errors stay those of the installed version or of the checkpoint's code. Whoever looks
at a module, and what an op cannot read, gets upstream's own code.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .._checks import autocast_dtype
from .._library import transformed
from ..models.families import FAMILIES, Family, RemoteCode, family_of
from ..models.plain import gives_new_memory, linear_stack, watched
from ..models.upstream import (
    Deferred,
    StandIn,
    arguments,
    class_of,
    code_of,
    entering,
    forward_name,
    named_instances,
    replaced_before,
)
from ..ops.pixel_shuffle_mlp import reference
from ._deferred import DeferredEmbeddings, DeferredMask, DeferredShuffle, place
from ._edit import Editor, attachment
from ._patch import Adapter, Feature, Site
from ._report import serving


def _tracing() -> bool:
    """`torch.jit.trace` keeps what ran, and torch.func transforms it: upstream's code."""
    return torch.jit.is_tracing() or transformed()


def _family(core: Any) -> Family:
    family = family_of(core)
    assert family is not None
    return family


def _shuffle_problem(core: Any) -> str:
    """Why the tiles have to be shuffled by upstream, or ""."""
    family = _family(core)
    if not family.merge:
        return "the ratio of the pixel shuffle is not one over an integer"
    if attachment(family.projector) is None:
        return f"the projector is another one since, a {type(family.projector).__name__}"
    why = watched(family.projector)
    return f"the projector {why}" if why else _changed(core, "pixel_shuffle")


_STOCK = "_ivl_stock_"  # of a patched core, before a name: the part of its class that ours takes the place of


def _changed(core: Any, name: str) -> str:
    """Why ours does not take the place of this method any more, or ""."""
    now = core.__dict__.get(name) or getattr(class_of(core), name)
    same = now is core.__dict__.get(_STOCK + name, now)
    return "" if same and name not in core.__dict__ else f"{name} was replaced after patching"


def _features(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Pixels to rows of the language model; the projector decides whether it shuffles as well."""
    if _tracing() or _shuffle_problem(self):
        return inner(self, *args, **kwargs)

    def pixel_shuffle(*rest: Any, **named: Any) -> Any:
        given = [*rest, *named.values()]
        if [isinstance(value, torch.Tensor) for value in given] != [True, False] or not isinstance(given[1], float):
            return self.pixel_shuffle(*rest, **named)
        x, ratio = given
        return DeferredShuffle(x, ratio, self.pixel_shuffle, _family(self).order)

    return inner(StandIn(self, pixel_shuffle=pixel_shuffle), *args, **kwargs)


def _project(backend: str) -> Any:
    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, DeferredShuffle):
            if x.source and hasattr(self, "_hf_hook"):
                self._hf_hook.input_device = x.source  # accelerate looks for it in tensors alone
            stack = linear_stack(self)
            if not isinstance(stack, str) and _reads(x.x, stack.norm.weight):
                return x.project(stack, backend)
        return entering(functools.partial(inner, self))(*args, **kwargs)

    return forward


def _reads(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the op takes this mix of dtypes and devices; what upstream makes of another is upstream's to say."""
    cast = autocast_dtype(x) is not None and autocast_dtype(weight) is not None
    return x.device == weight.device and (x.dtype == weight.dtype or cast)


def _masked(backend: str) -> Any:
    """transformers' own forward: `masked_scatter` with a mask of the placeholders."""

    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _tracing():
            return inner(self, *args, **kwargs)  # upstream's mask has a fixed shape: no break in the compiled graph

        def get_placeholder_mask(*rest: Any, **named: Any) -> Any:
            mask = functools.partial(self.get_placeholder_mask, *rest, **named)
            ids = arguments(self.get_placeholder_mask, *rest, **named).get("input_ids")

            def write(embeds: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
                # As the scatter: the embeddings stay what they were.
                return place(embeds, ids, rows, _family(self).token_id, backend, ours=False)  # type: ignore[arg-type]

            stock = ids is None or _changed(self, "get_placeholder_mask")
            return mask() if stock else DeferredMask(mask, write)

        return inner(StandIn(self, get_placeholder_mask=get_placeholder_mask), *args, **kwargs)

    return forward


def _written(backend: str) -> Any:
    """The remote code's forward and generate: rows written over a mask of the embeddings."""

    def method(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _tracing():
            return inner(self, *args, **kwargs)
        family = _family(self)
        embedding, language = family.embedding, family.language

        def embed(*rest: Any, **named: Any) -> Deferred:
            value = embedding(*rest, **named)
            return DeferredEmbeddings(value, gives_new_memory(embedding), family.token_id, backend)

        # A core alone may hold a language model that does not generate.
        generate = {"generate": entering(language.generate)} if hasattr(language, "generate") else {}
        me = StandIn(self, language_model=StandIn(language, get_input_embeddings=lambda: embed, **generate))
        return inner(me, *args, **kwargs)

    return method


class Vision(Adapter):
    features = {
        "projector": Feature(True, "pixel shuffle and projector in one op, at every ratio the model has"),
        "packing": Feature(True, "visual rows written over the placeholder tokens by an op, with a count check"),
    }

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, core in named_instances(model, *(kind.core_name for kind in FAMILIES)):
            family = _family(core)
            what = f"{family.features_name}: shuffle, projector"
            yield Site("projector", path, core, what, _refused(_projector_refused, family))
            what = f"{', '.join(_writers(family))}: visual rows into placeholders"
            yield Site("packing", path, core, what, _refused(_packing_refused, family))

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        family, backend = _family(site.module), options["backend"]
        replaced = "pixel_shuffle" if site.feature == "projector" else "get_placeholder_mask"
        if hasattr(class_of(site.module), replaced):
            edit.attribute(site.module, _STOCK + replaced, getattr(class_of(site.module), replaced))
        if site.feature == "projector":
            edit.method(family.projector, forward_name(family.projector), _project(backend))
            edit.method(site.module, family.features_name, _features)
            return
        for name in _writers(family):
            edit.method(site.module, name, (_written if isinstance(family, RemoteCode) else _masked)(backend))

    def serving(self, site: Site) -> str:
        family = _family(site.module)
        if site.feature == "packing":
            return serving("place_rows_", family.embedding)
        stack = linear_stack(family.projector, later=True)
        why = _shuffle_problem(site.module) or (stack if isinstance(stack, str) else "")
        return f"upstream's own code: {why}" if why else serving("pixel_shuffle_mlp", family.projector)


def _writers(family: Family) -> tuple[str, ...]:
    """The methods of the core that write the visual rows."""
    forward = forward_name(family.core)
    return (family.generate_name, forward) if isinstance(family, RemoteCode) else (forward,)


def _refused(reason: Any, family: Family) -> str:
    try:
        return reason(family)
    except AttributeError as error:
        return f"unknown structure: {error}"


def _projector_refused(family: Family) -> str:
    core, projector, merge = family.core, family.projector, family.merge
    why = replaced_before(core, family.features_name) or replaced_before(projector, forward_name(projector))
    # Hooks come and go: while there are any, upstream's code serves.
    stack = linear_stack(projector, later=True) if not any(map(watched, projector.modules())) else ""
    why = why or (stack if isinstance(stack, str) else "") or _not_called(core, family.features_name, "pixel_shuffle")
    return why or shuffle_refused(family, merge)


def shuffle_refused(family: Family, merge: int) -> str:
    """Why upstream's pixel shuffle, judged by what it computes, is not ours, or ""."""
    core = family.core
    if not merge:
        return "the ratio of the pixel shuffle is not one over an integer"
    with torch.device("cpu"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # v1's
        x = torch.arange(8.0 * merge * merge).view(1, 2 * merge, 2 * merge, 2)
        try:
            got = core.pixel_shuffle(x, 1 / merge).flatten(1, 2)
        except Exception as error:
            return f"unknown structure: pixel_shuffle of {type(core).__name__} raises {type(error).__name__}"
        expected = reference.shuffle(x.flatten(1, 2), merge, 2 * merge, 2 * merge, 0, family.order == "v1")
    same = got.shape == expected.shape and torch.equal(got, expected)
    return "" if same else f"unknown structure: pixel_shuffle of {type(core).__name__} computes something else"


def _packing_refused(family: Family) -> str:
    core = family.core
    why = next(filter(None, (replaced_before(core, name) for name in _writers(family))), "")
    if why or isinstance(family, RemoteCode):
        return why or ("" if family.embedding is not None else "unknown structure: no embedding")
    return _not_called(core, "forward", "get_placeholder_mask", "masked_scatter")


def _not_called(core: Any, method: str, *names: str) -> str:
    missing = [name for name in names if name not in code_of(getattr(class_of(core), method)).co_names]
    kind = class_of(core).__name__
    return f"unknown structure: {method} of {kind} does not call {' and '.join(missing)}" if missing else ""


ADAPTER = Vision()
