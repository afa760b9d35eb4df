"""V2PE: fractional positions of visual tokens.

`v2pe` changes only what `rotary_emb` sees: the integer position_ids that the rest of the model reads (masks,
packed-sequence detection, caches) stay as they are, so nothing else can go wrong.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.upstream import class_of, named_instances, replaced_before
from ..ops import v2pe_position_ids
from ..ops.v2pe_rope.op import parse_delta
from ._edit import Editor, note
from ._patch import Adapter, Feature, Site


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
class _Prompt:
    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None = None  # given integer positions of packed samples, which restart at 0
    compress: torch.Tensor | None = None
    announced: bool = False


class _State:
    """Shared by the patched modules of one model. `shift` is what V2PE adds to the stock positions of this call."""

    def __init__(self, delta: Any = None, backend: str = "") -> None:
        self.delta, self.backend = delta, backend
        self.override: Any = None
        self.prompt: _Prompt | None = None
        self.shift: torch.Tensor | None = None
        self.report: ContextReport | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _State, (self.delta, self.backend)

    def __str__(self) -> str:
        return str(self.report or "no prompt with images yet")


_ATTRIBUTE = "_ivl_v2pe"  # of the patched modules: the state; of a cache: the shift of its last token [B, 1]


def announce(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, compress: torch.Tensor | None
) -> None:
    """Tell V2PE the ids that the language model is about to get as embeddings, packed, with the compressed tiles."""
    state = model.__dict__.get(_ATTRIBUTE)
    if state is not None:
        state.prompt = _Prompt(input_ids, attention_mask, None, compress, True)


def _parse(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError(f"patch: v2pe={value!r}, expected a step such as 1/16, '1/16' or 'random'")
    if not (isinstance(value, str) and value == "random") and not isinstance(value, (torch.Tensor, list, tuple)):
        parse_delta(value)
    return value


def _parts(model: Any) -> tuple[Any, Any, int | None]:
    """(the decoder stack, what gets input_ids, the placeholder's id unless it is set later)."""
    if hasattr(model, "vision_model"):  # remote code
        return model.language_model.model, model, None
    inside = model.model if hasattr(model, "model") else model
    return inside.language_model, inside, model.config.image_token_id


def _shift(state: _State, prompt: _Prompt, token: int, tiles: tuple[int, int]) -> Any:
    """Shift [B, N] of a prompt (float64) and that of its last token [B, 1]."""
    ids, mask = prompt.ids, prompt.mask
    if mask is not None:
        mask = mask[:, -ids.shape[1] :].to(ids.device, torch.bool) if mask.dim() == 2 else None
    starts = None
    if prompt.positions is not None and mask is None:
        starts = (prompt.positions.expand(ids.shape).reshape(-1) == 0).nonzero().squeeze(1)
        packed = len(starts) > 1 and starts[0] == 0
        starts = torch.cat((starts, starts.new_tensor([ids.numel()]))) if packed else None
    delta = state.delta if state.override is None else state.override
    compress = {} if prompt.compress is None else dict(
        compress=prompt.compress.to(ids.device), tile_tokens=tiles[0], compressed_tokens=tiles[1]
    )  # fmt: skip
    positions = v2pe_position_ids(
        ids, token, delta, attention_mask=mask, cu_seqlens=starts, **compress, backend=state.backend
    )
    if mask is not None:
        stock = mask.long().cumsum(-1) - 1
        shift = torch.where(mask, positions.double() - stock, 0.0)
        last = (mask * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1, keepdim=True)
        tokens = mask.sum(1)
    else:
        index = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        first = index[:, :1] if starts is None else starts[torch.searchsorted(starts, index, right=True) - 1]
        shift = positions.double() - (index - first)
        last = torch.full((ids.shape[0], 1), ids.shape[1] - 1, device=ids.device)
        tokens = last[:, 0] + 1
    if bool((ids == token).any()):
        valid = positions if mask is None else torch.where(mask, positions, 0.0)
        span = valid.amax(1) + 1
        state.report = ContextReport(tuple(tokens.tolist()), tuple(span.tolist()), str(delta))
    return shift, shift.gather(1, last)


def _repeat(x: torch.Tensor, rows: int) -> torch.Tensor:
    """One row of `x` for each beam."""
    return x if x.shape[0] in (1, rows) else x.repeat_interleave(rows // x.shape[0], 0)


def _text_forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    state: _State = self._ivl_v2pe
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
    cache = kwargs.get("past_key_values")
    carried = getattr(cache, _ATTRIBUTE, None) if cache is not None and cache.get_seq_length() else None
    prompt, state.prompt = state.prompt, None
    shift = last = None
    if prompt is not None and tokens is not None and prompt.ids.shape[1] == tokens.shape[1]:
        shift, last = _shift(state, prompt, self._ivl_v2pe_token(), self._ivl_v2pe_tiles)
        shift, last = _repeat(shift, tokens.shape[0]), _repeat(last, tokens.shape[0])
    if carried is not None and tokens is not None:
        carried = _repeat(carried, tokens.shape[0])
        shift, last = (carried, carried) if shift is None else (shift + carried, last + carried)
    state.shift = shift
    try:
        output = inner(self, *args, **kwargs)
    finally:
        state.shift = None
    cache = getattr(output, "past_key_values", None) if cache is None else cache
    if last is not None and cache is not None and not isinstance(cache, tuple):
        setattr(cache, _ATTRIBUTE, last)
    return output


def _rotary(inner: Any, self: Any, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    shift = self._ivl_v2pe.shift
    if shift is not None:
        position_ids = (position_ids + shift.to(position_ids.device)).float()
    return inner(self, x, position_ids, *args, **kwargs)


def _with_ids(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward that takes input_ids: remembers them for the language model below."""
    state: _State = self._ivl_v2pe
    before, state.override = state.override, kwargs.pop("v2pe_delta", state.override)
    try:
        given = _signature(class_of(self).forward).bind(self, *args, **kwargs).arguments
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        step = ids is not None and ids.shape[1] == 1 and cache is not None and bool(cache.get_seq_length())
        if ids is not None and not step and not (state.prompt is not None and state.prompt.announced):
            state.prompt = _Prompt(ids, given.get("attention_mask"), given.get("position_ids"))
        return inner(self, *args, **kwargs)
    finally:
        state.override = before


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _with_delta(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """A method that may get `v2pe_delta=`."""
    state: _State = self._ivl_v2pe
    before, state.override = state.override, kwargs.pop("v2pe_delta", state.override)
    try:
        return inner(self, *args, **kwargs)
    finally:
        state.override = before
        state.prompt = None


def _chat_generate(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    given = dict(zip(("pixel_values", "input_ids", "attention_mask"), args), **kwargs)
    if given.get("input_ids") is not None and not getattr(self, "flash_mode", False):
        self._ivl_v2pe.prompt = _Prompt(given["input_ids"], given.get("attention_mask"))
    return _with_delta(inner, self, *args, **kwargs)


def _chat_compress(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Upstream's own packing: which tiles it compressed can be seen in what it kept of each."""
    result = inner(self, *args, **kwargs)
    given = dict(zip(("input_embeds", "input_ids", "mask_idx", "img_context_token_id"), args), **kwargs)
    ids, packed, kept = given["input_ids"].reshape(-1), result[1].reshape(1, -1), result[3].reshape(-1)
    tiles = kept[ids == given["img_context_token_id"]].view(-1, 256)
    announce(self, packed, None, ~tiles.all(1))
    return result


class _Token:
    """Reads the placeholder's id where the model keeps it, when it is needed."""

    def __init__(self, model: nn.Module, fixed: int | None) -> None:
        self.model, self.fixed = model, fixed

    def __call__(self) -> int:
        return self.fixed if self.fixed is not None else self.model.img_context_token_id  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Token, (self.model, self.fixed)


class V2pe(Adapter):
    features = {"v2pe": Feature(False, "fractional visual positions: the step of a visual token, such as 1/16", _parse)}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        kinds = ("InternVLForConditionalGeneration", "InternVLChatModel", "InternVLModel")
        found = list(named_instances(model, *kinds))
        inside = {id(m.model) for _, m in found if hasattr(m, "model")}
        for path, module in found:
            if id(module) not in inside:
                yield Site("v2pe", path, module, "positions that rotary_emb sees", self._problem(module))

    @staticmethod
    def _problem(model: Any) -> str:
        try:
            text, _, _ = _parts(model)
        except AttributeError as error:
            return f"unknown structure: {error}"
        if not hasattr(text, "rotary_emb"):
            return f"unknown structure: {type(text).__name__} has no rotary_emb (the layers rotate by themselves)"
        return replaced_before(text.rotary_emb, "forward") or replaced_before(text, "forward")

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        model: Any = site.module
        text, with_ids, token = _parts(model)
        state = _State(options["v2pe"], options["backend"])
        for module in {id(m): m for m in (model, with_ids, text, text.rotary_emb)}.values():
            edit.attribute(module, _ATTRIBUTE, state)
        tokens = 256 if token is None else getattr(model.config, "image_seq_length", 256)
        edit.attribute(text, "_ivl_v2pe_token", _Token(model, token))
        edit.attribute(text, "_ivl_v2pe_tiles", (tokens, max(tokens // 4, 1)))
        edit.method(text, "forward", _text_forward)
        edit.method(text.rotary_emb, "forward", _rotary)
        edit.method(with_ids, "forward", _with_ids)
        if with_ids is not model:
            edit.method(model, "forward", _with_delta)
        if token is None:
            edit.method(model, "generate", _chat_generate)
            if hasattr(model, "compress_visual_tokens_in_sentence"):
                edit.method(model, "compress_visual_tokens_in_sentence", _chat_compress)
        elif hasattr(model, "generate"):
            edit.method(model, "generate", _with_delta)
        note(model, "v2pe", state)

    def serving(self, site: Site) -> str:
        return f"delta {site.module.__dict__[_ATTRIBUTE].delta}"


ADAPTER = V2pe()
