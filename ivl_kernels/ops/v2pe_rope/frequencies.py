"""Inverse frequencies of the rotary embedding, with the context-extension rules that InternVL models use."""

from __future__ import annotations

import math

import torch


def rope_frequencies(
    rotary_dim: int,
    theta: float,
    kind: str = "default",
    *,
    factor: float = 1.0,
    max_positions: int = 0,
    length: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [rotary_dim / 2] float32, and the factor on cos and sin, for `v2pe_rope`.

    Args:
        rotary_dim: elements of a head that rotate.
        theta: base of the frequencies.
        kind: "default"; "linear" (divided by `factor`); "dynamic" (NTK: the base grows once `length` exceeds
            `max_positions`; InternVL3); "yarn" (GPT-OSS: low frequencies divided by `factor`, high ones kept, and
            cos and sin scaled by 0.1 ln(factor) + 1).
        factor: of the extension.
        max_positions: context length of the pretraining ("dynamic", "yarn").
        length: largest position + 1 ("dynamic"). With V2PE this is the span of the positions, not the token count.
        beta_fast, beta_slow: turns within `max_positions` above which a frequency is kept, below which it is divided
            ("yarn").
        truncate: round the limits that follow from them to whole indices.
        device: of the result.

    Raises:
        ValueError: an unknown kind, or one without its `max_positions`.

    Source: transformers `modeling_rope_utils`, whose values these are, bit for bit.
    """
    if kind not in ("default", "linear", "dynamic", "yarn"):
        raise ValueError(f"kind: got {kind!r}, expected 'default', 'linear', 'dynamic' or 'yarn'")
    if kind in ("dynamic", "yarn") and max_positions <= 0:
        raise ValueError(f"max_positions: got {max_positions}, expected the context length of the pretraining")
    if kind == "dynamic":
        grown = factor * max(length, max_positions) / max_positions - (factor - 1)
        theta = theta * grown ** (rotary_dim / (rotary_dim - 2))
    powers = theta ** (torch.arange(0, rotary_dim, 2, device=device).float() / rotary_dim)
    if kind != "yarn":
        inverse = 1.0 / powers
        return (inverse / factor if kind == "linear" else inverse), 1.0

    def index_of(turns: float) -> float:
        return rotary_dim * math.log(max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(beta_fast), index_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2, device=device).float() - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    inverse = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
    return inverse, 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
