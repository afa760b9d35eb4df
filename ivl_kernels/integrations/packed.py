"""Attention of the language model over rows in which samples lie end to end, none of which sees another.

A name of ours in transformers' tables of attention and mask functions, chosen by the config of a patched instance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.families import families_in, text_stacks
from ..models.packed import OWN_ATTENTION
from ..models.upstream import class_of
from ..ops import attention
from ._edit import Editor
from ._patch import Adapter, Feature, Site
from ._report import serving


def starts_of(positions: torch.Tensor) -> torch.Tensor:
    """[S + 1] int32: where the sequences of the flattened positions [B, N] begin: wherever they do not go on by one."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=1) != 1
    places = begins.flatten().nonzero().squeeze(1)
    return torch.cat([places, places.new_tensor([positions.numel()])]).to(torch.int32)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers: [B, heads, N, d] in, [B, N, heads, d] out."""
    if dropout:
        raise ValueError(f"attention_dropout: got {dropout} in training, expected 0 with packed attention")
    batch, _heads, length, width = query.shape
    if width % 8:  # the op's heads are multiples of 8
        query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
        given: dict[str, Any] = dict(
            dropout=dropout, sliding_window=sliding_window, s_aux=s_aux, position_ids=position_ids
        )
        given |= dict(cu_seq_lens_q=cu_seq_lens_q, max_length_q=max_length_q, scaling=scaling or width**-0.5)
        return _attend(module, query, key, value, attention_mask, **given)[0][..., :width], None
    past = key.shape[2] != length
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {"causal": True, "window": sliding_window, "sinks": s_aux, "scale": scaling}
    if (
        (past or attention_mask is not None)
        and cu_seq_lens_q is not None
        and cu_seq_lens_q.numel() not in (2, batch + 1)
    ):
        what = "padding" if attention_mask is not None else "a filled cache"
        raise ValueError(f"cu_seq_lens_q: got packed samples beside {what}, expected one or the other")
    positions = None
    if not past and position_ids is not None and position_ids.shape[-1] == length:
        positions = position_ids.view(-1, length).expand(batch, length)
    if attention_mask is not None:
        return _unpadded(q, k, v, attention_mask, positions, options), None
    if past:  # a cache goes before: each row of the batch is one sequence
        return attention(q, k, v, **options), None
    if cu_seq_lens_q is None and positions is not None:
        cu_seq_lens_q, max_length_q = starts_of(positions), None
    if cu_seq_lens_q is None or batch > 1 and cu_seq_lens_q.numel() == batch + 1:
        return attention(q, k, v, **options), None
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = attention(q, k, v, cu_seq_lens_q.view(-1), max_seqlen_q=max_length_q, max_seqlen_k=max_length_q, **options)
    return out.unflatten(0, (batch, length)), None


def _unpadded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """A padded batch, of which only what the mask [B, keys] keeps is computed; zeros in the padding.

    Of samples that lie end to end in a row another one begins where positions [B, keys] do not go on.
    """
    if mask.dim() != 2 or mask.shape[1] != k.shape[1]:
        raise ValueError(f"attention_mask: got {list(mask.shape)}, expected [{k.shape[0]}, {k.shape[1]}] or None")
    kept = mask != 0
    asked = kept[:, -q.shape[1] :]
    where = asked.flatten().nonzero().squeeze(1)
    keys = kept.flatten().nonzero().squeeze(1)
    zero = kept.new_zeros(1, dtype=torch.int32)
    if positions is None:
        cu_q, cu_k = (torch.cat([zero, x.sum(1).cumsum(0).to(torch.int32)]) for x in (asked, kept))
    else:
        row, begins = kept.nonzero()[:, 0], torch.ones_like(keys, dtype=torch.bool)
        begins[1:] = (positions[kept].diff() <= 0) | (row.diff() > 0)
        cu_q = cu_k = torch.cat([begins.nonzero().squeeze(1), keys.new_tensor([keys.numel()])]).to(torch.int32)
    k, v = (x.flatten(0, 1)[keys] for x in (k, v))
    packed = attention(q.flatten(0, 1)[where], k, v, cu_q, cu_k, **options)
    return (
        packed.new_zeros(q.shape[0] * q.shape[1], *q.shape[2:]).index_copy(0, where, packed).unflatten(0, q.shape[:2])
    )


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Mask function of transformers: nothing unless there is padding; what parts samples are their starts."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(OWN_ATTENTION, _attend)
    AttentionMaskInterface.register(OWN_ATTENTION, _mask)


class Packed(Adapter):
    features = {
        "packed": Feature(False, "samples end to end in a row do not see each other (language model)"),
    }

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        paths = {id(module): path for path, module in model.named_modules()}
        stacks = [family.text for _, family in families_in(model)] or [stack for _, stack in text_stacks(model)]
        for stack in stacks:
            yield Site("packed", paths[id(stack)], stack, f"{len(stack.layers)} attention layers", _problem(stack))

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        _register()
        for config in _configs(site.module):
            edit.attribute(config, "_attn_implementation_internal", OWN_ATTENTION)

    def serving(self, site: Site) -> str:
        name = site.module.config._attn_implementation
        return serving("attention", site.module) if name == OWN_ATTENTION else f"not served: {name} was chosen since"


def _configs(stack: Any) -> list[Any]:
    """The configs that a decoder stack and its layers choose their attention by, each once."""
    configs = [stack.config, *(layer.self_attn.config for layer in stack.layers)]
    return list({id(config): config for config in configs}.values())


def _problem(stack: Any) -> str:
    kind = class_of(stack).__name__
    try:
        configs = _configs(stack)
    except AttributeError as error:
        return f"unknown structure of {kind}: {error}"
    if any("_attn_implementation_internal" not in vars(config) for config in configs):
        return f"{kind} does not choose its attention by its config"
    head = getattr(stack.config, "head_dim", None) or stack.config.hidden_size // stack.config.num_attention_heads
    if head > 256:
        return f"heads of {head}, expected at most 256"
    return ""


ADAPTER = Packed()
