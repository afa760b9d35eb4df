"""V2PE: fractional positions of visual tokens.

`v2pe` changes only what `rotary_emb` sees: the integer position_ids that the rest of the model reads (masks,
packed-sequence detection, caches) stay as they are, so nothing else can go wrong.

The ids of a call come from above (a forward or a generate notes them, for its thread and its time), the shift of a call
goes down in a stand-in of the decoder stack, and what the next call has to know goes with the cache.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models.families import Family, families_in, family_of
from ..models.upstream import (
    StandIn,
    arguments,
    cache_of,
    class_of,
    code_of,
    filled,
    forward_name,
    is_cache,
    keys_at,
    replaced_before,
)
from ..ops.v2pe_rope.op import parse_delta
from ._edit import Editor, note
from ._patch import Adapter, Feature, Site
from ._timeline import Timeline, Tokens, empty, padding_of
from .loss import take_own


@dataclass(frozen=True)
class ContextReport:
    """Tokens and position span of every row of the last prompt, and the step of its visual tokens."""

    tokens: tuple[int, ...]
    span: tuple[float, ...]
    delta: str

    @property
    def saved(self) -> tuple[float, ...]:
        return tuple(t - s for t, s in zip(self.tokens, self.span))

    def __str__(self) -> str:
        rows = ", ".join(f"{t} tokens in {s:g} positions ({t - s:g} saved)" for t, s in zip(self.tokens, self.span))
        return f"{rows}, delta {self.delta}"


@dataclass
class _Call:
    """A forward or a generate in progress: the step, and the ids of what the decoder stack will get.

    Attributes:
        ids: [B, N]; of the whole prompt, cached tokens included, when `whole`, else of this forward.
        compress: [T] which tiles are compressed.
        reached: whether the decoder stack has been called.
    """

    delta: Any
    ids: torch.Tensor | None = None
    whole: bool = False
    compress: torch.Tensor | None = None
    reached: bool = False


class _State:
    """What the patched modules of one model share: its settings, and the calls in progress, each in its thread."""

    def __init__(self, family: Family, delta: Any, compressed_step: str, backend: str) -> None:
        self.family, self.delta, self.compressed_step, self.backend = family, delta, compressed_step, backend
        self.report: ContextReport | None = None
        self._local = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return _State, (self.family, self.delta, self.compressed_step, self.backend)

    def __str__(self) -> str:
        return str(self.report or "no prompt with images yet")

    @property
    def call(self) -> _Call:
        """The innermost call of this thread."""
        return getattr(self._local, "call", None) or _Call(self.delta)

    @torch.compiler.disable
    def enter(self, delta: Any, ids: Any = None, *, whole: bool = False) -> Any:
        """Begin a call; returns what `leave` takes. What is not given is that of the call around it."""
        before = getattr(self._local, "call", None)
        call = self.call if delta is None else replace(self.call, delta=_parse(delta))
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            # What is announced of these ids is still known where they are handed on.
            call = replace(call, ids=ids, whole=whole, compress=call.compress if ids is call.ids else None)
        self._local.call = replace(call, reached=False)
        return before

    @torch.compiler.disable
    def leave(self, before: Any) -> bool:
        """End a call; whether it came to the decoder stack."""
        reached = self.call.reached
        if before is not None:
            before.reached = before.reached or reached
        self._local.call = before
        return reached

    @torch.compiler.disable
    def plan(self, given: Mapping[str, Any]) -> tuple[torch.Tensor | None, Timeline | None]:
        """For a call of the decoder stack: the shift of its tokens [B, N] (None: nowhere any), and what to carry."""
        call = self.call
        call.reached = True
        if torch.jit.is_tracing():
            raise RuntimeError("v2pe: positions depend on the ids, which a trace would fix; undo the patch to trace")
        cache = cache_of(given)
        seen, ids = filled(cache), given.get("input_ids")
        tokens: Any = given.get("inputs_embeds") if ids is None else ids
        if tokens is None:
            return None, None  # upstream raises
        rows, count, device = tokens.shape[0], tokens.shape[1], tokens.device
        before = self._carried(cache, seen).rows(rows) if seen else empty(rows, device)
        if seen:
            _check_rows(before, cache)
        new = self._tokens(call, ids, rows, seen, count, device)
        if seen and seen >= before.length and not bool(new.visual.any()):
            shift = before.shift[:, -1:]
            return (shift if bool(shift.any()) else None), replace(before, seen=seen + count)

        present = padding_of(given.get("attention_mask"), rows, seen, count, device)
        positions = _packed(given.get("position_ids"), rows, count) if not seen and bool(present.all()) else None
        options: Any = dict(compressed_step=self.compressed_step, backend=self.backend)
        after = before.extended(seen, new, present, positions, delta=call.delta, **options)
        shift = after.shift[:, seen:-1]
        if bool(after.tokens.visual.any()):
            present = after.present.sum(1)
            self.report = ContextReport(tuple(present.tolist()), tuple(after.span.tolist()), str(call.delta))
        # The text after packed samples would need positions of its own.
        return (shift if bool(shift.any()) else None), (None if positions is not None else after)

    @staticmethod
    def _carried(cache: Any, seen: int) -> Timeline:
        carried = getattr(cache, _ATTRIBUTE, None)
        if carried is None or carried.seen < seen:
            known = 0 if carried is None else carried.seen
            raise ValueError(
                f"cache: got one that holds {seen} positions, {known} of them from calls with v2pe; expected one that "
                "this patched model filled, of which it is known what each position was"
            )
        return carried

    def _tokens(self, call: _Call, ids: Any, rows: int, seen: int, count: int, device: torch.device) -> Tokens:
        compress, start = None, 0
        if ids is None and call.ids is not None:
            ids, compress = call.ids, call.compress
            start = seen if call.whole else 0
        if ids is None or ids.shape[1] - start != count:
            got = "without input_ids" if ids is None else f"of {count} tokens for {ids.shape[1] - start} new ids"
            raise ValueError(
                f"inputs_embeds: got embeddings {got}, expected input_ids beside them: v2pe has to know which tokens "
                "are visual (give both, or undo the patch)"
            )
        tile = self.family.tokens_a_tile
        tokens = Tokens.of(ids.to(device), self.family.token_id, compress, (tile, max(tile // 4, 1)))
        return tokens.since(start).rows(rows)


_ATTRIBUTE = "_ivl_v2pe"  # of the patched modules: the state; of a cache: the timeline of what it holds


def _packed(positions: Any, rows: int, count: int) -> torch.Tensor | None:
    """[B, N] positions that restart inside a row: samples packed one after the other. None for any other."""
    if positions is None or positions.shape[-1] != count or positions.dim() > 2:
        return None
    positions = positions.reshape(-1, count).expand(rows, count)
    packed = bool((positions[:, :1] == 0).all()) and bool((positions[:, 1:] == 0).any())
    return positions if packed else None


def announce(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, compress: torch.Tensor | None
) -> None:
    """Tell V2PE the ids that the language model is about to get as embeddings, packed, with the compressed tiles."""
    state: _State | None = model.__dict__.get(_ATTRIBUTE)
    if state is not None:
        call = state.call
        call.ids, call.compress = input_ids, compress


@contextlib.contextmanager
def prompt(
    model: nn.Module, input_ids: torch.Tensor, compress: torch.Tensor | None, delta: Any = None
) -> Iterator[None]:
    """Tell V2PE the packed ids of a generation that gets embeddings, and which of its tiles are compressed."""
    state: _State | None = model.__dict__.get(_ATTRIBUTE)
    if state is None:
        yield
        return
    before = state.enter(delta, input_ids, whole=True)
    state.call.compress = compress
    try:
        yield
    finally:
        state.leave(before)


def _parse(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError(f"patch: v2pe={value!r}, expected a step such as 1/16, '1/16' or 'random'")
    if not (isinstance(value, str) and value == "random") and not isinstance(value, (torch.Tensor, list, tuple)):
        parse_delta(value)
    return value


def _parse_compressed_step(value: Any) -> str:
    if value not in ("span", "same"):
        raise ValueError(f"patch: v2pe_compressed_step={value!r}, expected 'span' or 'same'")
    return value


def _stack_forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    state: _State = self._ivl_v2pe
    given = arguments(class_of(self).forward, self, *args, **kwargs)
    shift, timeline = state.plan(given)
    me = self
    if shift is not None:

        def rotary_emb(*rest: Any, **named: Any) -> Any:
            # Whatever they are called and wherever they stand: the only integers among the tensors.
            given = [*rest, *named.values()]
            (stock,) = [v for v in given if isinstance(v, torch.Tensor) and not v.is_floating_point()]
            moved = (stock + shift.to(stock.device)).float()
            rest = tuple(moved if value is stock else value for value in rest)
            return self.rotary_emb(*rest, **{k: moved if v is stock else v for k, v in named.items()})

        me = StandIn(self, rotary_emb=rotary_emb)
    output = inner(me, *args, **kwargs)
    _carry(timeline, given, output)
    return output


def _check_rows(before: Timeline, cache: Any) -> None:
    now = None if before.keys is None else keys_at(cache, before.length - 1)
    if now is not None and not torch.equal(now, before.keys.to(now.device)):  # type: ignore[union-attr]
        raise ValueError(
            "cache: got one whose rows are not those that calls with v2pe left in it, or in another order; expected a "
            "cache that is only continued, cropped, or repeated row by row"
        )


@torch.compiler.disable
def _carry(timeline: Timeline | None, given: Mapping[str, Any], output: Any) -> None:
    fields = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    for value in (*given.values(), *fields):
        if is_cache(value):
            if timeline is not None and timeline.keys is None and timeline.length:
                keys = keys_at(value, timeline.length - 1)
                timeline = replace(timeline, keys=None if keys is None else keys.detach().clone())
            setattr(value, _ATTRIBUTE, timeline)


def _with_delta(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The whole model's forward, which may get `v2pe_delta=`."""
    state: _State = self._ivl_v2pe
    before = state.enter(kwargs.pop("v2pe_delta", None))
    try:
        return inner(self, *args, **kwargs)
    finally:
        state.leave(before)


def _with_ids(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward that takes input_ids: notes them for the decoder stack below."""
    state: _State = self._ivl_v2pe
    delta = kwargs.pop("v2pe_delta", None)
    upstreams = dict(kwargs)
    take_own(self, upstreams)
    before = state.enter(delta, arguments(class_of(self).forward, self, *args, **upstreams).get("input_ids"))
    reached = False
    try:
        output = inner(self, *args, **kwargs)
    finally:
        reached = state.leave(before)
    if not reached:
        raise RuntimeError("v2pe: the language model was replaced after patching, so its positions are the stock ones")
    return output


def _generate(name: str) -> Any:
    def generate(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        """Notes the ids of the whole prompt, which the language model may get as embeddings only."""
        state: _State = self._ivl_v2pe
        delta = kwargs.pop("v2pe_delta", None)
        given = arguments(getattr(class_of(self), name), self, *args, **kwargs)
        ids = given.get("input_ids")
        before = state.enter(delta, given.get("inputs") if ids is None else ids, whole=True)
        try:
            return inner(self, *args, **kwargs)
        finally:
            state.leave(before)

    return generate


def _compress(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Upstream's own packing: which tiles it compressed can be seen in what it kept of each."""
    result = inner(self, *args, **kwargs)
    given = arguments(getattr(class_of(self), _COMPRESS), self, *args, **kwargs)
    ids, packed, kept = given["input_ids"].reshape(-1), result[1].reshape(1, -1), result[3].reshape(-1)
    tiles = kept[ids == given["img_context_token_id"]].view(-1, self._ivl_v2pe.family.tokens_a_tile)
    announce(self, packed, None, ~tiles.all(1))
    return result


_COMPRESS = "compress_visual_tokens_in_sentence"
_GENERATORS = ("generate", "generate_normal", "generate_flash")


class V2pe(Adapter):
    features = {
        "v2pe": Feature(False, "fractional visual positions: the step of a visual token, such as 1/16", _parse),
        "v2pe_compressed_step": Feature(
            "span",
            "a tile compressed by Flash spans what it would uncompressed ('span'), or its tokens have the same step",
            _parse_compressed_step,
            option=True,
        ),
    }

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, family in families_in(model):
            yield Site("v2pe", path, family.model, "positions that rotary_emb sees", self._problem(family))

    @staticmethod
    def _problem(family: Family) -> str:
        try:
            text = family.text
        except AttributeError as error:
            return f"unknown structure: {error}"
        kind = class_of(text)
        if not hasattr(text, "rotary_emb") or "rotary_emb" not in code_of(kind.forward).co_names:
            return f"unknown structure: {kind.__name__} calls no rotary_emb (the layers rotate by themselves)"
        if any(hasattr(module, "rotary_emb") for module in text.layers.modules()):
            return f"unknown structure: the layers of {kind.__name__} have a rotary_emb of their own"
        return replaced_before(text, forward_name(text))

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        family: Any = family_of(site.module)
        model, core, text = family.model, family.core, family.text
        state = _State(family, options["v2pe"], options["v2pe_compressed_step"], options["backend"])
        for module in {id(m): m for m in (model, core, text)}.values():
            edit.attribute(module, _ATTRIBUTE, state)
        edit.method(text, forward_name(text), _stack_forward)
        edit.method(core, "forward", _with_ids)
        if core is not model:
            edit.method(model, "forward", _with_delta)
        for name in _GENERATORS:
            if hasattr(model, name):
                edit.method(model, name, _generate(name))
        if hasattr(model, _COMPRESS):
            edit.method(model, _COMPRESS, _compress)
        note(model, "v2pe", state)

    def serving(self, site: Site) -> str:
        state: _State = site.module.__dict__[_ATTRIBUTE]
        if state.family.text.__dict__.get(_ATTRIBUTE) is not state:
            return "does nothing: the language model was replaced after patching"
        return f"delta {state.delta}"


ADAPTER = V2pe()
