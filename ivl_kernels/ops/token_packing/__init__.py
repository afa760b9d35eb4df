"""Token packing: visual rows into the placeholder positions of the text embeddings."""

from __future__ import annotations

import torch

from . import op

__all__ = ["place_rows"]


def place_rows(
    embeds: torch.Tensor,
    input_ids: torch.Tensor,
    rows: torch.Tensor,
    token_id: int,
    *,
    inplace: bool = False,
    backend: str = "",
) -> torch.Tensor:
    """Write visual rows over the embeddings of the placeholder tokens, in order of appearance.

    The i-th position (batch-major) where `input_ids == token_id` receives `rows[i]`; every other position keeps its
    embedding. Same result as `embeds.masked_scatter(mask, rows)`, in one pass and with a count check.

    Args:
        embeds: [B, N, H] text embeddings; float32, bfloat16, float16 or float64. Any strides with contiguous rows.
        input_ids: [B, N] int64 token ids.
        rows: [..., H] visual rows, the dtype of `embeds`; all leading dimensions are flattened.
        token_id: the placeholder's id.
        inplace: write into `embeds` and return it.
        backend: force a backend; empty picks the best.

    Returns:
        [B, N, H], dtype of `embeds`.

    Raises:
        ValueError: the number of placeholders is not the number of rows (nothing has been written then), or a shape
            or device does not fit.
        TypeError: a dtype does not fit.

    Gradients flow to `embeds` (zero at the placeholders) and to `rows`. Deterministic.
    Reads one number from the device (the count check).
    Source: transformers `InternVLModel.get_placeholder_mask` and `forward`; reference of `InternVLChatModel.generate`.
    """
    return op.place_rows(embeds, input_ids, rows, token_id, inplace, backend)
