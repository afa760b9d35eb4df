"""The projector: pixel shuffle, LayerNorm and linear layers with GELU between, from vision tokens to LLM rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import op

__all__ = ["pixel_shuffle_mlp"]


def pixel_shuffle_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    *,
    merge: int = 2,
    grid: tuple[int, int] | None = None,
    skip: int = 0,
    order: str = "v2",
    eps: float = 1e-5,
    tile_indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_rows: torch.Tensor | None = None,
    backend: str = "",
) -> torch.Tensor:
    """Pixel shuffle by `merge`, LayerNorm, then Linear, GELU (erf), Linear, ... in one operator.

    Output row (i, j) of a tile is the MLP of the `merge` x `merge` patches around cell (i, j), concatenated patch row
    first, then patch column, then channel. `merge` 2 with two linears is `mlp1` / `multi_modal_projector` (256 tokens
    of a 32 x 32 grid); 4 with three is the `mlp2` of InternVL3.5-Flash (64 tokens).

    Args:
        x: [T, skip + h * w, C] vision tokens, rows of patches; float32, bfloat16, float16 or float64. Any strides with
            contiguous channels.
        norm_weight, norm_bias: [C * merge^2], dtype of x.
        weights: linears in order, [F1, C * merge^2], [F2, F1], ..., [H, F]; dtype of x.
        biases: [F1], ..., [H]; dtype of x.
        merge: patches merged along each side.
        grid: (h, w) of the patches, both multiples of `merge`; None: square.
        skip: leading tokens of each tile that are no patches (1: the CLS token).
        order: "v2": cells row by row; "v1": column by column (`ps_version` of the checkpoints).
        eps: of the LayerNorm.
        tile_indices: [K] int64, which tiles to project, in this order; None: all.
        out: [M, H] rows to write into, dtype of x; needs `out_rows`.
        out_rows: [K] int64 (K = T without `tile_indices`): the rows of the k-th tile go to
            out[out_rows[k] : out_rows[k] + h * w / merge^2]; the ranges must not overlap.
        backend: force a backend; empty picks the best.

    Returns:
        [K, h * w / merge^2, H], dtype of x; with `out`, `out` itself. Under `torch.autocast` all tensors are first cast
        to its dtype, as for the linear layers, unless `out` has another.

    Raises:
        ValueError: a shape, device or index does not fit (indices are checked on CPU tensors only: on a GPU that would
            wait for the device). Nothing has been written then.
        TypeError: a dtype does not fit.

    Gradients flow to x (zero at the skipped tokens and at tiles not chosen), the LayerNorm, every weight and bias, and
    to `out` (zero at the rows written). Sums are taken in float32 (float64 for float64). Kept for the backward: x, the
    parameters and the input of each GELU; the shuffled, normalised rows are computed again. Deterministic (but for the
    gradient of x on a GPU when `tile_indices` names a tile twice), and on the CPU independent of the number of threads.
    Source: `InternVLChatModel.extract_feature` and `pixel_shuffle`, transformers' `InternVLMultiModalProjector`.

    Example:
        >>> y = pixel_shuffle_mlp(vit, norm.weight, norm.bias, [l1.weight, l2.weight], [l1.bias, l2.bias], skip=1)
    """
    return op.pixel_shuffle_mlp(
        x, norm_weight, norm_bias, weights, biases, merge, grid, skip, order, eps, tile_indices, out, out_rows, backend
    )
