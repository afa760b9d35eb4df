"""The tile router of InternVL3.5-Flash: which tiles may be compressed to 64 tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import router, selection
from .router import Attention, Block, Gate

__all__ = ["Attention", "Block", "Gate", "select_tiles", "tile_router"]


def tile_router(
    z: torch.Tensor,
    query: torch.Tensor,
    attentions: Sequence[Attention],
    blocks: Sequence[Block],
    gate: Gate,
    *,
    skip: int = 0,
    heads: int = 16,
    eps: float = 1e-5,
    dropout: float = 0.0,
    folded: bool = True,
    return_logits: bool = False,
    backend: str = "",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Probability, for every tile, that compressing it is harmless (column 0) or not (column 1).

    The tokens of a tile are pooled by four attentions with one query each, the first with `query` and `attentions[0]`,
    the other three with the previous result and `attentions[1]`; every attention is followed by its LayerNorm. Four
    residual blocks `x + LayerNorm(Linear(GELU(Linear(x))))` and a LayerNorm with a linear gate follow.

    The query is pushed through the key weights once, `u = W_k^T q` for each head, so that the scores are `z u` and the
    output is `W_v (softmax(z u) z)`: one read of `z` for each attention, no keys and no values. The bias of the keys
    cancels in the softmax.

    Args:
        z: [T, skip + N, C] output of the vision transformer, one tile a row; float32, bfloat16, float16 or float64.
            Any strides; contiguous channels are read in place.
        query: [1, C] query token.
        attentions: two `Attention` of in_weight [3C, C], in_bias [3C], out_weight [C, C], out_bias [C], norm_weight
            [C], norm_bias [C].
        blocks: any number of `Block` of weight_in [I, C], bias_in [I], weight_out [C, I], bias_out [C], norm_weight
            [C], norm_bias [C]; released models have four with I = 4C.
        gate: `Gate` of norm_weight [C], norm_bias [C], weight [2, C], bias [2].
        skip: leading tokens to leave out (1 for the class token).
        heads: heads of the attentions; 16 in every released model.
        eps: of every LayerNorm.
        dropout: probability of the two dropouts of a block; the shipped modules apply it in train mode.
        folded: False computes as the shipped code does, keys, values and every rounding in the dtype of `z` (plain
            torch, for comparison). True computes in float32 (float64 for float64).
        return_logits: return the logits too.
        backend: force a backend; empty picks the best.

    Returns:
        Probabilities [T, 2] in the dtype of `z`; with `return_logits` also the logits [T, 2] in float32 (float64 for
        float64).

    Raises:
        ValueError: a shape or device does not fit, `heads` does not divide C, or `skip` leaves no token.
        TypeError: a parameter's dtype is not that of `z`.

    Gradients flow to `z` and every parameter; the bias of the keys gets zeros. Deterministic, and without dropout a
    tile's result on the CPU does not depend on the number of threads.
    Source: `CrossAttentionPooling` and `Gating` of the InternVL3.5-Flash remote code.
    """
    probabilities, logits = router.tile_router(
        z, query, attentions, blocks, gate, skip, heads, eps, dropout, folded, backend
    )
    return (probabilities, logits) if return_logits else probabilities


def select_tiles(
    scores: torch.Tensor | None,
    *,
    relative_threshold: float | None = None,
    absolute_threshold: float | None = None,
    rule: str = "released",
    groups: torch.Tensor | None = None,
    budget: int | None = None,
    mask: torch.Tensor | None = None,
    tokens: tuple[int, int] = (256, 64),
) -> torch.Tensor:
    """Which tiles to compress, by thresholds, by a token budget, or as given.

    Thresholds: a tile is compressed when its score exceeds the `relative_threshold`-quantile (linear interpolation, in
    float32, then rounded to the dtype of the scores) of its group and reaches `absolute_threshold`. A group of one tile
    and the lowest score of a group are never compressed by the released rule.

    Budget: in each group the fewest tiles that bring it to at most `budget` visual tokens are compressed, highest
    scores first; of equal scores the earlier tile. A group whose tiles exceed the budget even so is compressed whole.

    Args:
        scores: [T], column 0 of the probabilities; float32, bfloat16, float16 or float64.
        relative_threshold, absolute_threshold: `flash_relative_threshold` and `flash_absolute_threshold` of the model's
            config. There is no default.
        rule: "released" (`score > quantile and score >= absolute`) or "older" (`>=` and `>`, early snapshots).
        groups: [T] int64 or int32 number of each tile's image or request, in any order: the quantile or the budget is
            taken over each group by itself, so that a decision does not depend on the neighbours in a batch. None: over
            all tiles, as shipped.
        budget: visual tokens allowed (for each group); excludes the thresholds.
        mask: [T] bool, explicit decisions: returned as they are; excludes thresholds and budget.
        tokens: visual tokens of a full and of a compressed tile, for `budget`.

    Returns:
        [T] bool, True = compress. NaN scores are never compressed by thresholds and last by a budget.

    Raises:
        ValueError: not exactly one of thresholds, budget and mask; a threshold is missing; `budget` below the smallest
            possible (without groups); a shape or device does not fit.
        TypeError: a dtype does not fit.

    Not differentiable. Deterministic. Runs on the device of the scores without reading from it.
    Source: `extract_feature_flash` of the InternVL3.5-Flash remote code (thresholds).
    """
    return selection.select_tiles(scores, relative_threshold, absolute_threshold, rule, groups, budget, mask, tokens)
