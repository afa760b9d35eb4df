"""Variable visual position encoding (V2PE) and the rotary embedding that consumes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import op
from .frequencies import rope_frequencies

__all__ = ["rope_frequencies", "v2pe_position_ids", "v2pe_rope", "v2pe_rope_"]


def v2pe_position_ids(
    input_ids: torch.Tensor,
    token_id: int,
    delta: float | str | torch.Tensor | Sequence[float | str] = 1.0,
    *,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    compress: torch.Tensor | None = None,
    tile_tokens: int = 256,
    compressed_tokens: int = 64,
    compressed_step: str = "span",
    generator: torch.Generator | None = None,
    check: bool = True,
    backend: str = "",
) -> torch.Tensor:
    """Position of every token: text advances by 1, a visual token by `delta`, and text after an image is integer again.

    An image is a contiguous run of placeholders (with all its tiles and its thumbnail; a video frame is one image).
    Its k-th token, k = 1, 2, ..., is at p + k * delta, p being the position of the token before; the text after it
    goes on from the next integer at or above the image's last position::

        delta = 1/2     text  <img>  v    v    v    v    v   </img>  text
                          0     1   1.5   2   2.5   3   3.5     5      6      (from 3.5 up to 4; then + 1)

    With InternVL3.5-Flash, a compressed tile (64 tokens instead of 256) spans the **same distance** as an uncompressed
    one: its tokens are 4 * delta apart, so the positions of the text do not depend on what the router decided.
    `compressed_step="same"` gives its tokens the step delta instead, so the tile spans a quarter::

        256 tokens, step 1/256  |................|  next tile      both end at p + 1
         64 tokens, step 4/256  |.   .   .   .   |  next tile

    Args:
        input_ids: [B, N] int64 token ids, after packing when tiles are compressed.
        token_id: the placeholder's id.
        delta: step of a visual token in (0, 1]: a number or a fraction such as "1/16" for all images; [images] (tensor
            or sequence), one an image in order of appearance; a [B, 1] tensor, one a row; "random", for training: each
            image draws one of 1, 1/2, 1/4, ... 1/256 (the published set).
        attention_mask: [B, N], zero at padding (either side), whose position is 1 as in transformers' generate.
        cu_seqlens: [segments + 1] boundaries of packed samples in the flattened batch; positions restart at each.
        compress: [T] bool, the compressed tiles in order of appearance. Needed only when tiles are compressed.
        tile_tokens, compressed_tokens: tokens of a tile and of a compressed one.
        compressed_step: "span" or "same", see above.
        generator: for "random"; the default generator when None.
        check: raise for images and tiles that do not fit, which reads five numbers from the device; False waits for
            nothing (unless delta is "random" or on the device) and leaves the positions of such an input undefined.
        backend: force a backend; empty picks the best.

    Returns:
        [B, N] float32. With delta = 1 the integers of the stock model.

    Raises:
        ValueError: a shape, a count of images or tiles or a value does not fit; or an image lies where float32 cannot
            hold its steps. Steps that are multiples of 2^-j, j <= 12, are exact up to 2^(24 - j) (1/256: 65536), and
            beyond that an error; other steps are rounded by at most delta / 32, else an error.
        TypeError: a dtype does not fit.

    No gradients. Deterministic; positions are p + k * delta rounded once, never accumulated. Nothing is checked while
    compiling.
    Source: V2PE (OpenGVLab/V2PE `get_rope_pos_id`; InternVL3, section on variable visual position encoding), without
    its loss of a token from position 65536 on. Text starts at 0, so an image with no text before it starts at
    -1 + delta. Compressed tiles are not defined there; "span" is this package's choice.

    Example:
        >>> ids = torch.tensor([[5, 9, 9, 9, 9, 6]])
        >>> v2pe_position_ids(ids, token_id=9, delta="1/4")
        tensor([[0.0000, 0.2500, 0.5000, 0.7500, 1.0000, 2.0000]])
    """
    return op.position_ids(
        input_ids, token_id, delta, attention_mask, cu_seqlens, compress, tile_tokens, compressed_tokens,
        compressed_step, generator, check, backend,
    )  # fmt: skip


def v2pe_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    scale: float = 1.0,
    rotary_dim: int | None = None,
    heads_dim: int = 1,
    rounding: str = "transformers",
    backend: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of q and k in one kernel, optionally after a per-head RMSNorm.

    With x = (a, b, rest), a and b the two halves of the first `rotary_dim` elements of a head, the result is
    (a cos - b sin, b cos + a sin, rest). The angles are given as cos and sin, or computed in the kernel:
    float32(position * inv_freq), then cos and sin to within 1 ulp of float32 for positions up to 131072, times `scale`.

    Args:
        q: [B, q heads, N, d], or [B, N, q heads, d] with `heads_dim=2`; float32, bfloat16, float16 or float64. Any
            strides; d even.
        k: the same with its own number of heads.
        positions: [B or 1, N] or [N] float32 (`v2pe_position_ids`) or integer.
        inv_freq: [rotary_dim / 2] float32 inverse frequencies (`rope_frequencies`, or a model's `rotary_emb.inv_freq`).
        cos, sin: instead of the two above, [B or 1, N, rotary_dim], whose second half repeats the first (transformers'
            `position_embeddings`), or [B or 1, N, rotary_dim / 2] (GPT-OSS); float32 or the dtype of q.
        q_weight, k_weight: [d], weights of the RMSNorm over d that precedes the rotation (Qwen3); None: no norm.
        eps: of the RMSNorm.
        scale: factor on computed cos and sin (yarn's attention scaling). Given cos and sin already contain it.
        rotary_dim: elements of a head that rotate; default all of them, or 2 * len(inv_freq). The rest only passes
            (through the norm).
        heads_dim: which dimension holds the heads, 1 or 2.
        rounding: "transformers": cos and sin, the norm and every product and sum are rounded to the dtype of q, as
            the models do; with given cos and sin the results are bit-identical to theirs (without a norm).
            "float32": float32 inside, rounded once.
        backend: force a backend; empty picks the best.

    Returns:
        q and k rotated: new tensors of the same shape, dtype and strides.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written then.

    Gradients flow to q, k and the weights, once (no double backward); the backward is the inverse rotation and keeps
    no copy of q or k (with the norm: a reference to its inputs). Deterministic; on the CPU also independent of the
    number of threads.
    Source: `apply_rotary_pos_emb`, `Qwen3RMSNorm`, `Qwen3RotaryEmbedding` and `GptOssRotaryEmbedding` of transformers.
    """
    return op.rope(
        q, k, positions, inv_freq, cos, sin, q_weight, k_weight, eps, scale, rotary_dim, heads_dim, rounding, backend
    )


def v2pe_rope_(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    scale: float = 1.0,
    rotary_dim: int | None = None,
    heads_dim: int = 1,
    rounding: str = "transformers",
    backend: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`v2pe_rope` in place, for inference: overwrites q and k and returns them.

    Raises:
        RuntimeError: gradients are needed (in place would overwrite what other backwards saved).
    """
    return op.rope_(
        q, k, positions, inv_freq, cos, sin, q_weight, k_weight, eps, scale, rotary_dim, heads_dim, rounding, backend
    )
