"""Which tiles may be compressed: the decision rules."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import FLOATS, check_dtype, check_same, check_shape
from .op import sum_dtype

RULES = ("released", "older")


def select_tiles(
    scores: Tensor | None,
    relative_threshold: float | None,
    absolute_threshold: float | None,
    rule: str,
    groups: Tensor | None,
    budget: int | None,
    mask: Tensor | None,
    tokens: tuple[int, int],
) -> Tensor:
    given = {
        "thresholds": relative_threshold is not None or absolute_threshold is not None,
        "budget": budget is not None,
        "mask": mask is not None,
    }
    if sum(given.values()) != 1:
        got = " and ".join(name for name, on in given.items() if on) or "none"
        raise ValueError(f"select_tiles: got {got}, expected one of thresholds, budget and mask")
    if mask is not None:
        check_shape("mask", mask, ("T",) if scores is None else (scores.shape[0],))
        check_dtype("mask", mask, (torch.bool,))
        return mask.clone()
    if scores is None:
        raise TypeError("scores: got None, expected a tensor (only with mask= they may be missing)")
    check_shape("scores", scores, ("T",))
    check_dtype("scores", scores, FLOATS)
    if groups is not None:
        check_shape("groups", groups, scores.shape)
        check_dtype("groups", groups, (torch.int64, torch.int32))
        check_same("groups", groups, "scores", scores, dtype=False)
        groups = groups.long()
    scores = scores.detach()
    if budget is not None:
        full, small = tokens
        if not 0 < small < full:
            raise ValueError(f"tokens: got {tokens}, expected (full, compressed) with 0 < compressed < full")
        if groups is None:
            if budget < small * scores.shape[0]:
                raise ValueError(
                    f"budget: got {budget} tokens for {scores.shape[0]} tiles, expected at least "
                    f"{small * scores.shape[0]} ({small} a tile)"
                )
            groups = torch.zeros_like(scores, dtype=torch.int64)
        return _most_harmless(scores.to(sum_dtype(scores.dtype)), groups, budget, tokens)
    if relative_threshold is None or absolute_threshold is None:
        missing = "relative_threshold" if relative_threshold is None else "absolute_threshold"
        raise ValueError(
            f"{missing}: got None, expected a number (both thresholds are needed; read them from the config)"
        )
    if not 0 <= relative_threshold <= 1:
        raise ValueError(f"relative_threshold: got {relative_threshold}, expected a quantile between 0 and 1")
    if rule not in RULES:
        raise ValueError(f"rule: got '{rule}', expected one of {', '.join(RULES)}")
    if scores.shape[0] == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if groups is None:
        relative = torch.quantile(scores.float(), relative_threshold)
    else:
        relative = _group_quantile(scores.float(), groups, relative_threshold)
    # The shipped comparison, with a 0-dim threshold, rounds it to the scores' dtype; so must the [T] thresholds.
    relative = relative.to(scores.dtype)
    if rule == "released":
        return (scores > relative) & (scores >= absolute_threshold)
    return (scores >= relative) & (scores > absolute_threshold)


def _group_quantile(scores: Tensor, groups: Tensor, q: float) -> Tensor:
    """For each tile the q-quantile (linear interpolation, as `torch.quantile`) of the scores of its group: [T]."""
    by_score = scores.argsort(stable=True)
    order = by_score[groups[by_score].argsort(stable=True)]
    ids = groups[order]
    first = torch.searchsorted(ids, groups)
    last = torch.searchsorted(ids, groups, right=True) - 1
    ordered = scores[order]
    rank = q * (last - first).to(scores.dtype)
    below = ordered[first + rank.floor().long()]
    above = ordered[first + rank.ceil().long()]
    # NaN sorts last: one in a group makes the group's quantile NaN.
    return torch.where(ordered[last].isnan(), torch.nan, torch.lerp(below, above, rank - rank.floor()))


def _most_harmless(scores: Tensor, groups: Tensor, budget: int, tokens: tuple[int, int]) -> Tensor:
    """The fewest tiles, highest scores first and earlier tiles first on ties, that bring each group within budget."""
    by_score = scores.nan_to_num(nan=-torch.inf).argsort(stable=True, descending=True)
    order = by_score[groups[by_score].argsort(stable=True)]
    ids = groups[order]
    first = torch.searchsorted(ids, ids)
    count = torch.searchsorted(ids, ids, right=True) - first
    full, small = tokens
    excess = (count * full - budget).clamp(min=0)
    wanted = (excess + (full - small) - 1) // (full - small)
    place = torch.arange(len(ids), device=ids.device) - first
    return torch.zeros_like(ids, dtype=torch.bool).scatter(0, order, place < wanted)
