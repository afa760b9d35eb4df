"""InternVL3.5-Flash on both model families: tiles are routed first, projected once, and the sequence is packed."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..flash import FlashInputs, FlashParts, Routing, flash_family, flash_inputs, parts_of, router_problem
from ..models.families import FLASH, Family, RemoteCode, families_in, family_of
from ..models.packed import leak, takes_starts, varlen_keywords
from ..models.plain import linear_stack
from ..models.upstream import arguments, cache_of, class_of, filled, signature
from ..nn.router import TileRouter
from ._edit import Editor, attachment, note
from ._flash_cache import check_held, continued, held_in, hold, name_of
from ._patch import Adapter, Feature, Site
from ._report import serving
from .loss import asked, reduction_of, take_own
from .v2pe import announce
from .vision import shuffle_refused

FindParts = Callable[[nn.Module], FlashParts]
FORWARDS = (False, True, "unpadded")


def _parse_forward(value: Any) -> Any:
    if not any(value is known for known in FORWARDS[:2]) and value != "unpadded":
        raise TypeError(f"patch: flash_forward={value!r}, expected True, False or 'unpadded'")
    return value


class FlashAdapter(Adapter):
    features = {
        "flash": Feature(True, "Flash generation: route, project once, pack"),
        "flash_forward": Feature(
            False,
            "forward routes too (True), with the rows of the batch end to end ('unpadded'); by default it keeps 1/4",
            _parse_forward,
            option=True,
        ),
        "flash_folded": Feature(
            True, "the router with its attention folded; False: the arithmetic as shipped, bit for bit", option=True
        ),
    }

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterable[Site]:
        what = "route, project, pack" if options["flash_folded"] else "route as shipped, project, pack"
        for path, family in families_in(model):
            if family.flash_holder is None:
                continue
            problem = _problem(family)
            yield Site("flash", path, family.model, what, problem)
            apart = leak(family.text) if options["flash_forward"] == "unpadded" and not problem else ""
            if apart:  # such a forward raises for more than one row
                yield Site("flash", path, family.model, "forward: several rows end to end", apart)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        forward = options["flash_forward"]
        find_parts = functools.partial(parts_of, backend=options["backend"], folded=options["flash_folded"])
        if isinstance(flash_family(site.module), RemoteCode):
            edit.method(site.module, "generate_flash", _chat_generate(find_parts))
            if forward:
                edit.method(site.module, "forward", _chat_forward(find_parts, forward))
        else:
            edit.method(site.module, "generate", _native_generate(find_parts))
            if forward:
                edit.method(site.module, "forward", _native_forward(find_parts, forward))

    def serving(self, site: Site) -> str:
        family = flash_family(site.module)
        problem = "the modules of Flash are gone" if family is None else _problem(family)
        if family is None or problem:
            return f"cannot run: {problem}"
        holder = family.flash_holder
        text = serving("tile_pool", next(holder.pooling_before_gating.parameters()))
        if not _on(family):
            return f"{text}; idle while flash_mode is off"
        called = {
            "router": router_problem(TileRouter.from_modules(holder.pooling_before_gating, holder.gating)),
            "projector 1/4": _reason(family.projector),
            "projector 1/16": _reason(holder.mlp2),
        }
        return text + "".join(f"; {name} by its own modules: {why}" for name, why in called.items() if why)


def _on(family: Family) -> bool:
    return bool(getattr(family.flash_settings, "flash_mode", False))


def _reason(projector: nn.Module) -> str:
    stack = linear_stack(projector)
    return stack if isinstance(stack, str) else ""


def _problem(family: Family) -> str:
    """Why the model's modules are not those of a Flash model, or "". Modules that cannot be read are called."""
    holder, model = family.flash_holder, family.model
    missing = [name for name in FLASH if not isinstance(getattr(holder, name, None), nn.Module)]
    if missing:
        return f"unknown structure: no {', '.join(missing)}"
    if isinstance(family, RemoteCode) and not callable(getattr(model, "generate_flash", None)):
        return "it has no generate_flash"
    taken = signature(class_of(model).forward).parameters
    unknown = [name for name in ("input_ids", "pixel_values") if name not in taken]
    if unknown:  # Flash would wait for images that never come
        return f"unknown structure: forward of {class_of(model).__name__} takes no {' and '.join(unknown)}"
    why = next(filter(None, (shuffle_refused(family, merge) for merge in (2, 4))), "")
    if why:
        return why
    width, hidden = family.vision.config.hidden_size, family.text.config.hidden_size
    for name, module, merge in (("the projector", family.projector, 2), ("mlp2", holder.mlp2, 4)):
        stack = linear_stack(module)
        if isinstance(stack, str):
            continue
        wanted = (width * merge**2, hidden)
        got = (stack.norm.normalized_shape[0], stack.linears[-1].out_features)
        if got != wanted:
            return f"{name} takes {got[0]} and gives {got[1]}, expected {wanted[0]} and {wanted[1]}"
    return ""


def _keep_routing(model: nn.Module, inputs: FlashInputs, ids: torch.Tensor, mask: Any, parts: FlashParts) -> None:
    note(model, "routing", Routing.of(inputs, ids, mask, parts))
    announce(model, inputs.packed.ids, inputs.packed.attention_mask, inputs.compress)


def _chat_generate(find_parts: FindParts) -> Callable[..., Any]:
    def generate_flash(inner: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        given = arguments(class_of(self).generate_flash, self, *args, **kwargs)
        pixels, ids, mask = (given.get(name) for name in ("pixel_values", "input_ids", "attention_mask"))
        # Text alone; what raises; and train mode, where the dropouts of the shipped modules are live.
        shipped = pixels is None or given.get("visual_features") is not None or self.img_context_token_id is None
        cache = cache_of(given)
        held = held_in(cache)
        if shipped or ids is None or self.training:
            if held is not None and ids is not None and bool((ids == self.img_context_token_id).any()):
                raise ValueError(
                    f"{name_of(cache, given)}: got a cache that Flash filled, expected another one where Flash does "
                    "not run (no pixel_values, or train mode)"
                )
            return inner(self, *args, **kwargs)
        if mask is None:
            raise TypeError("attention_mask: got None, expected a mask [B, N] (Flash cannot do without)")
        with torch.no_grad():
            parts = find_parts(self)
            inputs = flash_inputs(parts, ids, parts.vision.tokens_of(pixels), attention_mask=mask)
            packed, one = inputs.packed, ids.shape[0] == 1
            if inputs.compress.shape[0] == 0:
                raise ValueError("pixel_values: got images, but input_ids has no placeholder for them")
            if one and packed.masked_tokens:
                raise ValueError(
                    f"attention_mask: got {packed.masked_tokens} zeros in a batch of one, expected none (only the "
                    "rows of larger batches are padded)"
                )
            if filled(cache):  # the released code decides for all tiles at every call
                check_held(held, cache, inputs, parts, name_of(cache, given))
            random.uniform(0.0, 1.0)  # the shipped code draws once: what the caller draws next stays the same
            _keep_routing(self, inputs, ids, mask, parts)
            taken = ("self", "pixel_values", "input_ids", "attention_mask", "visual_features")
            options = {"generation_config": None, "output_hidden_states": None}
            options |= {name: value for name, value in given.items() if name not in taken}
            output = self.language_model.generate(
                inputs_embeds=inputs.embeds,
                attention_mask=packed.attention_mask.float() if one else packed.attention_mask,
                use_cache=True,
                **options,
            )
            hold(cache if isinstance(output, torch.Tensor) else cache_of(output) or cache, inputs, parts)
            return output

    return generate_flash


def _chat_forward(find_parts: FindParts, layout: Any) -> Callable[..., Any]:
    def forward(inner: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        own = take_own(self, kwargs)
        given = arguments(class_of(self).forward, self, *args, **kwargs)
        pixels, ids, mask, labels, flags = (
            given.get(name) for name in ("pixel_values", "input_ids", "attention_mask", "labels", "image_flags")
        )
        if not self.flash_mode or pixels is None or ids is None:
            return inner(self, *args, **kwargs, **own)
        if flags is None:
            raise AttributeError("image_flags: got None, expected [T] flags, 1 for a real tile")
        if given.get("return_dict") is False:
            raise AttributeError("return_dict: got False, which InternVLChatModel.forward does not support")
        _refuse(self, layout, ids, given)
        parts = find_parts(self)
        vit = parts.vision.tokens_of(pixels)[flags.view(-1) == 1]
        inputs = flash_inputs(parts, ids, vit, attention_mask=mask, labels=labels, padding=_padding(layout))
        _keep_routing(self, inputs, ids, mask, parts)
        taken = ("self", "pixel_values", "input_ids", "image_flags", "labels")
        options = {name: value for name, value in given.items() if name not in taken and value is not None}
        options |= {"return_dict": True, **_sequence(inputs, layout, flash_family(self))}
        if labels is not None and reduction_of(self):
            own = {**own, "row_plan": None, "position_ids": options["position_ids"]}  # of what is packed now
            language = functools.partial(self.language_model, inputs_embeds=inputs.embeds, **options)
            return asked(reduction_of(self), own, _targets(inputs), language)
        outputs = self.language_model(inputs_embeds=inputs.embeds, **options)
        if labels is not None:
            targets = _targets(inputs)[:, 1:].flatten()
            outputs.loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets.to(outputs.logits.device))
        return outputs

    return forward


def _refuse(model: nn.Module, layout: Any, ids: torch.Tensor, given: Mapping[str, Any]) -> None:
    if given.get("position_ids") is not None:
        raise ValueError(
            "position_ids: got positions for the unpacked sequence, expected None (packing makes new ones)"
        )
    cache = cache_of(given)
    if filled(cache):
        raise ValueError(
            f"{name_of(cache, given)}: got a filled cache, expected none in a forward with images under Flash"
        )
    if layout != "unpadded" or ids.shape[0] == 1:
        return
    # Without mask and cache, positions that restart part the rows: in the models where that is so.
    if cache is not None:
        raise ValueError(f"{name_of(cache, given)}: got a cache, expected none: its rows would lie end to end")
    family = flash_family(model)
    why = leak(family.text) if family is not None else ""
    state = attachment(model)
    if state is not None and any(feature == "v2pe" for feature, _ in state.edits):
        why = why or "v2pe knows no rows end to end"
    if why:
        raise ValueError(
            f"flash_forward: got 'unpadded' and a batch of {ids.shape[0]}, expected a batch of one or "
            f"flash_forward=True: {why}"
        )


def _padding(layout: Any) -> str:
    return "none" if layout == "unpadded" else "right"


def _targets(inputs: FlashInputs) -> torch.Tensor:
    """Labels of the packed batch; with rows end to end, none for the first token of a row."""
    packed = inputs.packed
    assert packed.labels is not None
    first = (packed.position_ids == 0) & (packed.attention_mask != 0)
    return packed.labels.masked_fill(first, -100)


def _sequence(inputs: FlashInputs, layout: Any, family: Family | None) -> dict[str, Any]:
    """Mask and positions for the language model. End to end, positions that restart mark the rows; a flash-attention
    library takes their starts."""
    packed = inputs.packed
    if layout != "unpadded":
        return {"attention_mask": packed.attention_mask, "position_ids": packed.position_ids}
    sequence: dict[str, Any] = {"attention_mask": None, "position_ids": packed.position_ids, "use_cache": False}
    if family is not None and takes_starts(family.text):
        sequence |= varlen_keywords(packed.cu_seqlens, packed.max_length)
    return sequence


class PromptStreamer:
    """Hands a streamer the prompt the caller gave instead of the packed one, then what is generated."""

    def __init__(self, streamer: Any, prompt: torch.Tensor) -> None:
        self.streamer, self.prompt = streamer, prompt

    def put(self, value: torch.Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt, None  # type: ignore[assignment]
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def _native_generate(find_parts: FindParts) -> Callable[..., Any]:
    def generate(
        inner: Callable[..., Any], self: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        ids: Any = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is None or kwargs.get("inputs_embeds") is not None or kwargs.get("mm_encoder_outputs") is not None:
            return inner(self, inputs, *args, **kwargs)
        family: Any = family_of(self)
        on, pixels, cache = (
            family.flash_holder is not None and _on(family),
            kwargs.get("pixel_values"),
            cache_of(kwargs),
        )
        held = held_in(cache)
        if not on:
            if held is not None and bool((ids == family.token_id).any()) and held.is_in(cache):
                raise ValueError(
                    f"{name_of(cache, kwargs)}: got a cache that Flash filled, expected another one while flash_mode "
                    "is off"
                )
            return inner(self, inputs, *args, **kwargs)
        if pixels is None and not (filled(cache) and bool((ids == family.token_id).any())):
            return inner(self, inputs, *args, **kwargs)
        if kwargs.get("position_ids") is not None:
            raise ValueError(
                "position_ids: got positions for the unpacked prompt, expected None (packing makes new ones)"
            )
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("inputs: got inputs and input_ids, expected one of them")
        for name in ("input_ids", "pixel_values"):
            kwargs.pop(name, None)
        config = args[0] if args else kwargs.get("generation_config")
        with torch.no_grad():
            parts = find_parts(self)
            mask = kwargs.pop("attention_mask", None)
            mask = default_mask(self, ids, config, kwargs) if mask is None else mask
            past = filled(cache)
            if past:
                flash = continued(parts, ids, mask, pixels, cache, held, name_of(cache, kwargs))
            else:
                flash = flash_inputs(parts, ids, parts.vision.tokens_of(pixels), attention_mask=mask)
            _keep_routing(self, flash, ids, mask, parts)
            packed, embeds = flash.packed, flash.embeds
            kwargs.update(new_tokens(self, ids.shape[1], config, kwargs))
            if kwargs.get("streamer") is not None:
                kwargs["streamer"] = PromptStreamer(kwargs["streamer"], ids.cpu())
            if past and hasattr(self, "_get_initial_cache_position"):
                # transformers up to 5.1 takes embeddings beside a filled cache only if they are those of its new
                # positions; later ones cut them.
                embeds = embeds[:, past:]
                kwargs["cache_position"] = torch.arange(past, packed.ids.shape[1], device=embeds.device)
            output = inner(
                self,
                None,
                *args,
                input_ids=packed.ids,
                inputs_embeds=embeds,
                attention_mask=packed.attention_mask,
                **kwargs,
            )
        hold(cache if isinstance(output, torch.Tensor) else cache_of(output) or cache, flash, parts)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        prompt = ids.repeat_interleave(sequences.shape[0] // ids.shape[0], 0).to(sequences.device)
        sequences = torch.cat([prompt, sequences[:, packed.ids.shape[1] :]], 1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    return generate


def default_mask(model: Any, ids: torch.Tensor, config: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The mask transformers makes when none is given: padding is what equals a pad id that does not also end a text."""
    config = config or model.generation_config
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    ends = kwargs.get("eos_token_id", config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return (ids != pad).long()


def new_tokens(model: Any, length: int, config: Any, kwargs: dict[str, Any]) -> dict[str, int]:
    """`max_length` and `min_length` count the prompt as the caller sees it, not as it is packed."""
    changes = {}
    for kind, default in (("max", 20), ("min", 0)):
        limit, new = f"{kind}_length", f"{kind}_new_tokens"
        sources = [source for source in (config, model.generation_config) if source is not None]
        if kwargs.get(new) is not None or any(getattr(source, new, None) is not None for source in sources):
            continue
        value = kwargs.pop(limit, None)
        for source in sources:
            value = getattr(source, limit, None) if value is None else value
        if value is not None and value != default:
            if value <= length and kind == "max":
                raise ValueError(f"max_length: got {value}, expected more than the {length} tokens of the prompt")
            changes[new] = max(0, value - length)
    return changes


def _native_forward(find_parts: FindParts, layout: Any) -> Callable[..., Any]:
    def forward(inner: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        given = arguments(class_of(self).forward, self, *args, **kwargs)
        ids, pixels, mask, labels = (
            given.get(name) for name in ("input_ids", "pixel_values", "attention_mask", "labels")
        )
        embedded = given.get("inputs_embeds") is not None or given.get("mm_encoder_outputs") is not None
        family = flash_family(self)
        if family is None or not _on(family) or ids is None or pixels is None or embedded:
            return inner(self, *args, **kwargs)
        _refuse(self, layout, ids, given)
        parts = find_parts(self)
        vit = parts.vision.tokens_of(pixels)
        inputs = flash_inputs(parts, ids, vit, attention_mask=mask, labels=labels, padding=_padding(layout))
        _keep_routing(self, inputs, ids, mask, parts)
        taken = ("self", "input_ids", "pixel_values", "position_ids", "row_plan")
        options = {name: value for name, value in given.items() if name not in taken}
        options |= {"labels": None if labels is None else _targets(inputs), "inputs_embeds": inputs.embeds}
        return inner(self, **{**options, **_sequence(inputs, layout, family)})

    return forward


ADAPTER = FlashAdapter()
