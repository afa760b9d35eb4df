"""Rows of a batch laid end to end in one row: does the decoder stack keep them apart?"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from .upstream import StandIn, class_of

# Two rows, of three tokens and of two.
_POSITIONS = (0, 1, 2, 0, 1)
_FIRST = 3
_MASKED = ("eager", "sdpa")  # attention that does what its mask says
OWN_ATTENTION = "ivl_packed"  # ours, in transformers' table (`integrations.packed`)


class _Recorder:
    """Stands for a decoder layer: keeps what it is given, and computes nothing."""

    def __init__(self, layer: Any, seen: list[dict[str, Any]]) -> None:
        self._layer, self._seen = layer, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._seen.append(kwargs)
        return hidden


def takes_starts(text: Any) -> bool:
    """Whether the attention of this stack is told where samples start: ours, or a flash-attention library's (no
    relation to InternVL-Flash)."""
    return re.fullmatch(rf"flash_attention_\d+|{OWN_ATTENTION}", str(text.config._attn_implementation)) is not None


def varlen_keywords(starts: torch.Tensor, longest: int) -> dict[str, Any]:
    """What tells flash-attention where the rows start, under the names that this transformers takes.

    Raises:
        ValueError: it takes other names.
    """
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

    made = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    known = FlashAttentionKwargs.__annotations__
    unknown = [name for name in made if name not in known]
    if unknown:
        raise ValueError(f"flash-attention of this transformers takes {', '.join(known)}, not {', '.join(unknown)}")
    return made


def leak(text: Any) -> str:
    """Why a row could see another one when positions that restart are all that parts them, or "".

    Asked of what upstream's own body hands to its layers, without running a layer: for eager and sdpa attention the
    mask must part the rows, ours and flash-attention must get their starts. There must be no mask and no cache in the
    call.
    """
    kind, seen = class_of(text), []  # type: ignore[var-annotated]
    try:
        attention = text.config._attn_implementation
        by_starts = takes_starts(text)
        if not by_starts and attention not in _MASKED:
            return f"whether attention '{attention}' of {kind.__name__} keeps rows apart is not known"
        weight = next(p for p in text.parameters() if p.device.type != "meta")
        positions = torch.tensor([_POSITIONS], device=weight.device)
        starts = torch.tensor([0, _FIRST, len(_POSITIONS)], dtype=torch.int32, device=weight.device)
        embeds = weight.new_zeros(1, len(_POSITIONS), text.config.hidden_size)
        me = StandIn(text, layers=[_Recorder(layer, seen) for layer in text.layers], norm=lambda x: x)
        with torch.no_grad():
            inspect.unwrap(kind.forward)(
                me,
                inputs_embeds=embeds,
                attention_mask=None,
                position_ids=positions,
                use_cache=False,
                **(varlen_keywords(starts, _FIRST) if by_starts else {}),
            )
    except Exception as error:
        return f"whether {kind.__name__} keeps rows apart is not known ({type(error).__name__}: {error})"
    if len(seen) != len(text.layers):
        return f"whether {kind.__name__} keeps rows apart is not known: it ran {len(seen)} of its layers"
    problems = [
        _starts_problem(layer, given, starts) if by_starts else _mask_problem(given)
        for layer, given in zip(text.layers, seen)
    ]
    return next((f"layer {i} of {kind.__name__} {problem}" for i, problem in enumerate(problems) if problem), "")


def _mask_problem(given: dict[str, Any]) -> str:
    mask = given.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.shape[-2:] != (len(_POSITIONS),) * 2:
        return "gets no mask that parts the rows"
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if bool(seen[..., _FIRST:, :_FIRST].any() or seen[..., :_FIRST, _FIRST:].any()):
        return "gets a mask in which one row sees another"
    return ""


def _starts_problem(layer: Any, given: dict[str, Any], starts: torch.Tensor) -> str:
    if given.get("attention_mask") is not None:
        return "gets a mask, which flash-attention takes for padding"
    if any(given.get(name) is None for name in varlen_keywords(starts, _FIRST)):
        return "does not get the starts of the rows"
    if layer.self_attn.config._attn_implementation == OWN_ATTENTION:
        return ""
    for name in ("sliding_window", "sinks"):
        if getattr(layer.self_attn, name, None) is not None:
            return f"has {name}: whether flash-attention then keeps rows apart is not known"
    return ""
