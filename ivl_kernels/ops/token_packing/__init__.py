"""Token packing: drop the tokens that compressed tiles do not need, and write visual rows into the embeddings."""

from __future__ import annotations

import torch

from . import op
from .packed import PackedTokens

__all__ = ["PackedTokens", "embed_text", "pack_tokens", "place_rows"]


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


def embed_text(ids: torch.Tensor, table: torch.Tensor, token_id: int, *, backend: str = "") -> torch.Tensor:
    """Embeddings of the text of a packed batch; the rows of placeholders are left for the projector to write.

    Args:
        ids: [B, N] int64, each but the placeholders in [0, V).
        table: [V, H] weight of the embedding; float32, bfloat16, float16 or float64.
        token_id: the placeholder's id.
        backend: force a backend; empty picks the best.

    Returns:
        [B, N, H], dtype of `table`. **Rows of placeholders are not initialised**: whoever calls this must write them.

    Raises:
        IndexError: an id is out of range (on the CPU; on a GPU its row is NaN, since raising would wait for the device:
            let `pack_tokens` check, with its `vocabulary`).
        ValueError, TypeError: a shape, device or dtype does not fit.

    No gradients: use the embedding itself where they are needed. Deterministic.
    """
    return op.embed_text(ids, table, token_id, backend)


def pack_tokens(
    input_ids: torch.Tensor,
    compress: torch.Tensor,
    token_id: int,
    *,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
    embedding: torch.Tensor | None = None,
    padding: str = "left",
    capacity: bool = False,
    pad_id: int = 0,
    vocabulary: int | None = None,
    tokens_per_tile: int = 256,
    compressed_tokens: int = 64,
    backend: str = "",
) -> PackedTokens:
    """Shorten a batch to the tokens that routed tiles need.

    A tile is 256 consecutive placeholder tokens; where `compress` is true only its first 64 stay. Tiles are counted in
    order of appearance over the batch, row by row. Masked tokens (padding) are dropped, and what remains of each row is
    laid out anew, so positions have no holes.

    Args:
        input_ids: [B, N] int64. Rows may hold any mix: no image, several images, videos.
        compress: [T] bool, the decision of each tile of the whole batch.
        token_id: the placeholder's id.
        attention_mask: [B, N] bool or number, 0 where padding (left, right or anywhere); None: no padding.
        labels: [B, N] int64, carried along.
        loss_weights: [B, N] float32, carried along.
        embedding: [V, H] weight of the embedding: the packed text is embedded as well, as by `embed_text`, and ids
            outside [0, V) are errors.
        padding: "left" (for generation), "right", or "none": one row [1, N'] with the batch's rows end to end, for
            variable-length attention with `cu_seqlens`.
        capacity: do not shrink: N' = N (B * N with padding "none"), so that nothing is read from the device. On a GPU
            wrong input is then found only by `PackedTokens.check()`.
        pad_id: id of the padding.
        vocabulary: ids outside [0, vocabulary) are errors; None: only negative ids are.
        tokens_per_tile, compressed_tokens: 256 and 64 in the released models.
        backend: force a backend; empty picks the best.

    Returns:
        PackedTokens: ids, mask, positions, labels, weights, embeddings, lengths, `cu_seqlens`, and `tile_rows`, where
        the projector writes each tile (its `out_rows`).

    Raises:
        ValueError: a run of placeholders is not a multiple of `tokens_per_tile`, the number of decisions is not the
            number of tiles, an id is out of range (naming the row and the counts), or a shape or device does not fit.
        TypeError: a dtype does not fit.

    No gradients. Deterministic. One host read a call, none in capacity mode.
    Source: `compress_visual_tokens_in_sentence` of the released InternVL3.5-Flash code (batch 1); batches are ours.
    """
    return op.pack_tokens(
        input_ids,
        compress,
        token_id,
        attention_mask,
        labels,
        loss_weights,
        embedding,
        padding,
        capacity,
        pad_id,
        vocabulary,
        tokens_per_tile,
        compressed_tokens,
        backend,
    )
