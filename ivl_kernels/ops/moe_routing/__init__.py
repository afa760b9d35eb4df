"""Mixture-of-experts routing: router logits to expert ids and weights, and the slots sorted by expert."""

from __future__ import annotations

from torch import Tensor

from . import op
from .op import Dispatch

__all__ = ["Dispatch", "moe_dispatch", "moe_routing"]


def moe_routing(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax_then_topk",
    renormalize: bool = False,
    bias: Tensor | None = None,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    """Pick k experts for every token, and their weights.

    * "softmax_then_topk" (Qwen3-MoE): softmax in float32 over all experts, the k largest, with `renormalize` divided
      by their sum, rounded to the dtype of `logits`.
    * "topk_then_softmax" (GPT-OSS): the k largest logits, softmax over those.

    Args:
        logits: [S, E] router logits; float32, bfloat16, float16 or float64 (float64 is computed in float64).
        top_k: k, 1 to E.
        scoring: which of the two conventions.
        renormalize: only for "softmax_then_topk" (`norm_topk_prob`).
        bias: [E], added to the logits first (and the sum rounded to their dtype), the dtype of `logits`.
        backend: force a backend; empty picks the best.

    Returns:
        ids [S, k] int64 and weights [S, k] in the dtype of `logits`, largest first. Of equal scores the lower expert id
        comes first (`torch.topk` leaves that open).

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit.

    Gradients flow from the weights to `logits` and `bias`. Deterministic. Does not read from the device.
    Source: transformers `Qwen3MoeTopKRouter` and `GptOssTopKRouter`.
    """
    return op.moe_routing(op.Routing(logits, bias, top_k, scoring, renormalize), backend)


def moe_dispatch(ids: Tensor, num_experts: int, *, tile: int = 0, backend: str = "") -> Dispatch:
    """Sort the (token, choice) slots by expert, stably.

    Args:
        ids: [S, k] int64 or int32 expert ids. Any id outside 0 to E - 1 means "no expert here"; E is what
            expert-parallel transformers uses for it.
        num_experts: E.
        tile: also list the tiles of this many rows that a grouped matrix product runs over.
        backend: force a backend; empty picks the best.

    Returns:
        A `Dispatch`, all on the device of `ids`, with sizes that depend on shapes only.

    Raises:
        ValueError, TypeError: a shape, dtype or option does not fit.

    Deterministic. Does not read from the device.
    """
    return op.moe_dispatch(op.Sorting(ids, num_experts, tile), backend)
