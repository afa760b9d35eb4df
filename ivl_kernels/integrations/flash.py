"""InternVL3.5-Flash on both model families: tiles are routed first, projected once, and the sequence is packed."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..flash import (
    FlashInputs,
    FlashParts,
    Routing,
    flash_inputs,
    image_of_tile,
    is_chat_model,
    is_native_model,
    parts_of,
)
from ..ops import select_tiles
from ._edit import Editor, note
from ._patch import Adapter, Feature, Site
from ._report import serving
from .v2pe import announce

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
        for path, module in model.named_modules():
            if is_chat_model(module) or is_native_model(module):
                yield Site("flash", path, module, what, _problem(module))

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        forward = options["flash_forward"]
        find_parts = functools.partial(parts_of, backend=options["backend"], folded=options["flash_folded"])
        if is_chat_model(site.module):
            edit.method(site.module, "generate_flash", _chat_generate(find_parts))
            if forward:
                edit.method(site.module, "forward", _chat_forward(find_parts, forward))
        else:
            edit.method(site.module, "generate", _native_generate(find_parts))
            if forward:
                edit.method(site.module, "forward", _native_forward(find_parts, forward))

    def serving(self, site: Site) -> str:
        m: Any = site.module
        mlp2 = (m if is_chat_model(m) else m.flash).mlp2
        on = m.flash_mode if is_chat_model(m) else getattr(m.config, "flash_mode", False)
        return serving("tile_pool", mlp2) + ("" if on else "; idle while flash_mode is off")


def _problem(model: nn.Module) -> str:
    """Why the model's modules are not those of a Flash model, or ""."""
    m: Any = model
    holder = m if is_chat_model(model) else m.flash
    kinds = {
        "mlp2": (
            holder.mlp2,
            [(0, nn.LayerNorm), (1, nn.Linear), (2, nn.GELU), (4, nn.Linear), (5, nn.GELU), (7, nn.Linear)],
        ),
    }
    if is_chat_model(model):
        kinds["mlp1"] = (m.mlp1, [(0, nn.LayerNorm), (1, nn.Linear), (2, nn.GELU), (3, nn.Linear)])
        if not callable(getattr(model, "generate_flash", None)):
            return "it has no generate_flash"
    for name, (module, layers) in kinds.items():
        if not isinstance(module, nn.Sequential) or len(module) != layers[-1][0] + 1:
            return f"{name} is not the expected Sequential"
    try:
        from ..nn.router import TileRouter

        TileRouter.from_modules(holder.pooling_before_gating, holder.gating).parameters_of_op()
    except (AttributeError, TypeError, ValueError) as error:
        return f"the router is not the expected one ({error})"
    return ""


def _keep_routing(model: nn.Module, inputs: FlashInputs, ids: torch.Tensor, mask: Any, parts: FlashParts) -> None:
    note(model, "routing", Routing.of(inputs, ids, mask, parts))
    announce(model, inputs.packed.ids, inputs.packed.attention_mask, inputs.compress)


def _chat_generate(find_parts: FindParts) -> Callable[..., Any]:
    def generate_flash(
        inner: Callable[..., Any],
        self: Any,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
        generation_config: Any = None,
        output_hidden_states: bool | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        # Text alone; what raises; and train mode, where the dropouts of the shipped modules are live.
        shipped = pixel_values is None or visual_features is not None or self.img_context_token_id is None
        if shipped or input_ids is None or self.training:
            return inner(
                self,
                pixel_values=pixel_values,
                input_ids=input_ids,
                attention_mask=attention_mask,
                visual_features=visual_features,
                generation_config=generation_config,
                output_hidden_states=output_hidden_states,
                **generate_kwargs,
            )
        if attention_mask is None:
            raise TypeError("attention_mask: got None, expected a mask [B, N] (Flash cannot do without)")
        with torch.no_grad():
            parts = find_parts(self)
            inputs = flash_inputs(parts, input_ids, parts.vision(pixel_values), attention_mask=attention_mask)
            packed, one = inputs.packed, input_ids.shape[0] == 1
            if inputs.compress.shape[0] == 0:
                raise ValueError("pixel_values: got images, but input_ids has no placeholder for them")
            if one and packed.masked_tokens:
                raise ValueError(
                    f"attention_mask: got {packed.masked_tokens} zeros in a batch of one, expected none (only the "
                    "rows of larger batches are padded)"
                )
            random.uniform(0.0, 1.0)  # the shipped code draws once: what the caller draws next stays the same
            _keep_routing(self, inputs, input_ids, attention_mask, parts)
            mask = packed.attention_mask.float() if one else packed.attention_mask
            return self.language_model.generate(
                inputs_embeds=inputs.embeds,
                attention_mask=mask,
                generation_config=generation_config,
                output_hidden_states=output_hidden_states,
                use_cache=True,
                **generate_kwargs,
            )

    return generate_flash


def _chat_forward(find_parts: FindParts, layout: Any) -> Callable[..., Any]:
    def forward(
        inner: Callable[..., Any],
        self: Any,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        if not self.flash_mode or pixel_values is None or input_ids is None:
            return inner(
                self,
                pixel_values,
                input_ids,
                attention_mask,
                position_ids,
                image_flags,
                past_key_values,
                labels,
                use_cache,
                output_attentions,
                output_hidden_states,
                return_dict,
            )
        if image_flags is None:
            raise AttributeError("image_flags: got None, expected [T] flags, 1 for a real tile")
        if return_dict is False:
            raise AttributeError("return_dict: got False, which InternVLChatModel.forward does not support")
        _refuse(position_ids, past_key_values)
        parts = find_parts(self)
        vit = parts.vision(pixel_values)[image_flags.view(-1) == 1]
        inputs = flash_inputs(
            parts, input_ids, vit, attention_mask=attention_mask, labels=labels, padding=_padding(layout)
        )
        _keep_routing(self, inputs, input_ids, attention_mask, parts)
        options = {
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": True,
            **_sequence(inputs, layout, self.language_model),
        }
        outputs = self.language_model(inputs_embeds=inputs.embeds, **options)
        if labels is not None:
            targets = _targets(inputs)[:, 1:].flatten()
            outputs.loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets.to(outputs.logits.device))
        return outputs

    return forward


def _refuse(position_ids: Any, past_key_values: Any) -> None:
    if position_ids is not None:
        raise ValueError(
            "position_ids: got positions for the unpacked sequence, expected None (packing makes new ones)"
        )
    if past_key_values is not None and past_key_values.get_seq_length():
        raise ValueError("past_key_values: got a filled cache, expected none in a forward with images under Flash")


def _padding(layout: Any) -> str:
    return "none" if layout == "unpadded" else "right"


def _targets(inputs: FlashInputs) -> torch.Tensor:
    """Labels of the packed batch; with rows end to end, none for the first token of a row."""
    packed = inputs.packed
    assert packed.labels is not None
    first = (packed.position_ids == 0) & (packed.attention_mask != 0)
    return packed.labels.masked_fill(first, -100)


def _sequence(inputs: FlashInputs, layout: Any, model: nn.Module) -> dict[str, Any]:
    """Mask and positions for the language model. End to end, positions that restart mark the rows; flash-attn takes
    their starts."""
    packed = inputs.packed
    if layout != "unpadded":
        return {"attention_mask": packed.attention_mask, "position_ids": packed.position_ids}
    sequence: dict[str, Any] = {"attention_mask": None, "position_ids": packed.position_ids, "use_cache": False}
    config: Any = model.config
    if "flash" in str(getattr(config.get_text_config(), "_attn_implementation", "")):
        lengths = {"cu_seq_lens_q": packed.cu_seqlens, "cu_seq_lens_k": packed.cu_seqlens}
        sequence |= lengths | {"max_length_q": packed.max_length, "max_length_k": packed.max_length}
    return sequence


class _PromptStreamer:
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
        pixels, cache = kwargs.get("pixel_values"), kwargs.get("past_key_values")
        on = getattr(self.config, "flash_mode", False) and ids is not None
        cached: Any = getattr(cache, "_ivl_compress", None) if cache is not None and _length(cache) else None
        given = kwargs.get("inputs_embeds") is not None or kwargs.get("mm_encoder_outputs") is not None
        if not on or given or (pixels is None and cached is None):
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
            mask = _default_mask(self, ids, config, kwargs) if mask is None else mask
            flash = _native_inputs(self, parts, ids, mask, pixels, cache, cached)
            _keep_routing(self, flash, ids, mask, parts)
            packed = flash.packed
            kwargs.update(_new_tokens(self, ids.shape[1], config, kwargs))
            if kwargs.get("streamer") is not None:
                kwargs["streamer"] = _PromptStreamer(kwargs["streamer"], ids.cpu())
            if cache is not None:
                cache._ivl_compress = flash.compress
            embeds, past = flash.embeds, 0 if cache is None else _length(cache)
            if past and len(flash.compress) > len(cached) and hasattr(self, "_get_initial_cache_position"):
                # transformers 4 takes embeddings beside a filled cache only if they are those of its new positions.
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
        made = getattr(output, "past_key_values", None)
        if made is not None:
            made._ivl_compress = flash.compress
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        prompt = ids.repeat_interleave(sequences.shape[0] // ids.shape[0], 0).to(sequences.device)
        sequences = torch.cat([prompt, sequences[:, packed.ids.shape[1] :]], 1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    return generate


def _length(cache: Any) -> int:
    return int(cache.get_seq_length())


def _native_inputs(
    model: Any, parts: FlashParts, ids: torch.Tensor, mask: torch.Tensor, pixels: Any, cache: Any, cached: Any
) -> FlashInputs:
    if cache is None or not _length(cache):
        return flash_inputs(parts, ids, parts.vision(pixels), attention_mask=mask)
    if ids.shape[0] > 1:
        raise ValueError(
            f"past_key_values: got a filled cache and a batch of {ids.shape[0]}, expected a batch of one: the "
            "padding of packed rows changes as they grow"
        )
    tiles = len(image_of_tile(ids, mask, parts.token_id, parts.tokens))
    if cached is None:
        raise ValueError(
            "past_key_values: got a filled cache that no Flash call of this patch made, so which of its tiles are "
            "compressed is not known"
        )
    old, new, got = len(cached), tiles - len(cached), 0 if pixels is None else len(pixels)
    if got not in (new, tiles) or new < 0:
        raise ValueError(
            f"pixel_values: got {got} tiles for {tiles} in input_ids, of which the cache holds {old}; expected those "
            "of the new images, or all"
        )
    compress = cached
    vit = parts.embedding.weight.new_empty(0, 4 * parts.tokens + 1, parts.full.norm.normalized_shape[0] // 4)
    if new:
        vit = parts.vision(pixels[-new:])
        scores = parts.router(vit, skip=1)[:, 0]
        decided = select_tiles(
            scores,
            relative_threshold=parts.relative_threshold,
            absolute_threshold=parts.absolute_threshold,
        )
        compress = torch.cat([cached, decided])
    inputs = flash_inputs(parts, ids, vit, attention_mask=mask, compress=compress, cached_tiles=old)
    past, length = _length(cache), inputs.packed.ids.shape[1]
    held = int((inputs.packed.ids[:, :past] == parts.token_id).sum())
    expected = parts.tokens * old - (parts.tokens - parts.tokens // 4) * int(cached.sum())
    if past >= length or held != expected:
        raise ValueError(
            f"past_key_values: got {past} positions, {held} of them visual, for a packed prompt of {length}; expected "
            f"fewer than the prompt has, {expected} of them visual: those of the {old} tiles seen before"
        )
    return inputs


def _default_mask(model: Any, ids: torch.Tensor, config: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The mask transformers makes when none is given: padding is what equals a pad id that does not also end a text."""
    config = config or model.generation_config
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    ends = kwargs.get("eos_token_id", config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return (ids != pad).long()


def _new_tokens(model: Any, length: int, config: Any, kwargs: dict[str, Any]) -> dict[str, int]:
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
    def forward(
        inner: Callable[..., Any], self: Any, input_ids: Any = None, pixel_values: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        given = kwargs.get("inputs_embeds") is not None or kwargs.get("mm_encoder_outputs") is not None
        if not getattr(self.config, "flash_mode", False) or input_ids is None or pixel_values is None or given or args:
            return inner(self, input_ids, pixel_values, *args, **kwargs)
        _refuse(kwargs.pop("position_ids", None), kwargs.get("past_key_values"))
        mask, labels = kwargs.pop("attention_mask", None), kwargs.pop("labels", None)
        parts = find_parts(self)
        vit = parts.vision(pixel_values)
        inputs = flash_inputs(parts, input_ids, vit, attention_mask=mask, labels=labels, padding=_padding(layout))
        _keep_routing(self, inputs, input_ids, mask, parts)
        kwargs |= {"labels": None if labels is None else _targets(inputs), "inputs_embeds": inputs.embeds}
        return inner(self, **{**kwargs, **_sequence(inputs, layout, self)})

    return forward


ADAPTER = FlashAdapter()
