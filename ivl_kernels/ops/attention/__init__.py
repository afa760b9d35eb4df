"""Attention of packed sequences: full, causal and sliding-window with sinks, with grouped queries."""

from __future__ import annotations

from torch import Tensor

from . import op

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str = "",
) -> Tensor:
    """Scaled dot-product attention of sequences that lie one after the other, none of which sees another.

    With query head h, its key head h // (query heads / key heads), and the keys j that query i sees::

        out[i] = sum_j exp(scale * q[i] . k[j]) v[j] / (exp(sinks[h]) + sum_j exp(scale * q[i] . k[j]))

    The last query of a sequence sees its last key, whatever their numbers::

        causal, 2 queries, 5 keys        window=2          without causal
        q0  x x x x .                    . . x x .         every query
        q1  x x x x x                    . . . x x         sees every key

    Args:
        q: [N, query heads, d], packed, or [B, N, query heads, d], where each batch row is a sequence; float32,
            bfloat16, float16 or float64. Any strides whose last is 1 (a view of a fused qkv projection, or of
            [B, heads, N, d]); others are copied. d a multiple of 8 up to 256.
        k, v: [M, key heads, d] or [B, M, key heads, d], the dtype of q; query heads a multiple of key heads, which
            are not repeated in memory.
        cu_seqlens_q: [S + 1] int32 or int64, only with packed tensors: sequence s has the queries from
            cu_seqlens_q[s] to cu_seqlens_q[s + 1]. From 0 to N, never decreasing. None: one sequence.
        cu_seqlens_k: the same of keys, to M; None: as cu_seqlens_q.
        causal: a query sees no key after its own position.
        window: with causal, keys that a query sees at most, its own included.
        sinks: [query heads] float32 or the dtype of q, logits that join the sum below, not scaled (GPT-OSS).
        scale: default 1 / sqrt(d).
        max_seqlen_q, max_seqlen_k: the longest sequence; saves GPU backends from reading it off the device.
        backend: force a backend; empty picks the best.

    Returns:
        The shape and dtype of q, contiguous. A query that sees no key gets zeros.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written then. The values of cu_seqlens are
            checked on the CPU, not on GPUs.

    Gradients flow to q, k, v and sinks, once (no double backward). Saved: the inputs, the result and one float32 a
    query and head; the weights are computed again. No matrix of queries by keys is ever in memory (but for the
    reference, one sequence at a time). On the CPU deterministic and independent of the number of threads; on GPUs the
    gradients are with flash-attn, and with torch's kernels under `torch.use_deterministic_algorithms`. Under
    `torch.autocast` the dtype of q stays.
    Source: FlashAttention-2 (Dao 2023); sinks as in `modeling_gpt_oss.eager_attention_forward` of transformers.

    Example:
        >>> import torch
        >>> q = k = torch.zeros(3, 1, 8)
        >>> v = torch.tensor([1.0, 3.0, 5.0])[:, None, None].expand(3, 1, 8)
        >>> attention(q, k, v, torch.tensor([0, 2, 3]))[:, 0, 0]
        tensor([2., 2., 5.])
    """
    return op.attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, sinks, scale, max_seqlen_q, max_seqlen_k, backend
    )
