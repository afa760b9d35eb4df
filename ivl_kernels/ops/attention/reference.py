"""Attention in plain torch, a sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .op import check_offsets


def sequences(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Iterator[tuple[int, slice, slice]]:
    """(batch row, its queries, its keys) of each sequence; checks the offsets, which it copies to the CPU."""
    if cu_q is None or cu_k is None:
        for b in range(q.shape[0]):
            yield b, slice(0, q.shape[1]), slice(0, k.shape[1])
        return
    cu_q, cu_k = cu_q.cpu(), cu_k.cpu()
    check_offsets("cu_seqlens_q", cu_q, q.shape[1])
    check_offsets("cu_seqlens_k", cu_k, k.shape[1])
    offsets = list(zip(cu_q.tolist(), cu_k.tolist()))
    for (q_begin, k_begin), (q_end, k_end) in zip(offsets, offsets[1:]):
        yield 0, slice(q_begin, q_end), slice(k_begin, k_end)


def visible(queries: int, keys: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """[queries, keys] bool."""
    position = torch.arange(queries, device=device)[:, None] + keys - queries
    key = torch.arange(keys, device=device)
    seen = key <= position if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    return seen & (key > position - window) if window else seen


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[n, query heads, d] to [key heads, heads a key head, n, d] in the arithmetic type."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(wide).unflatten(1, (heads, -1)).permute(1, 2, 0, 3)


def _flat(x: Tensor) -> Tensor:
    """Back to [n, query heads, d]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, window: int) -> Tensor:
    """[key heads, heads a key head, queries, keys]; -inf where a key is not seen."""
    scores = q @ k.transpose(-1, -2) * scale
    return scores.masked_fill(~visible(q.shape[2], k.shape[2], causal, window, q.device), -torch.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    max_q: int,
    max_k: int,
) -> tuple[Tensor, Tensor]:
    """The result and, [query heads, B * N], the logarithm of each softmax's denominator."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, heads = torch.empty(q.shape, dtype=q.dtype, device=q.device), k.shape[2]
    lse = torch.empty(q.shape[2], *q.shape[:2], dtype=wide, device=q.device)
    for b, rows, keys in sequences(q, k, cu_q, cu_k):
        query, key, value = _grouped(q[b, rows], heads), _grouped(k[b, keys], heads), _grouped(v[b, keys], heads)
        scores = _scores(query, key, scale, causal, window)
        if sinks is not None:
            sink = sinks.to(wide).view(heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), -1)
        total = scores.logsumexp(-1)
        weights = (scores[..., : key.shape[2]] - total.unsqueeze(-1)).exp()
        weights = weights.masked_fill((total == -torch.inf).unsqueeze(-1), 0.0)
        out[b, rows] = _flat(weights @ value).to(q.dtype)
        lse[:, b, rows] = total.flatten(0, 1)
    return out, lse.flatten(1)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    max_q: int,
    max_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dsinks = lse.new_zeros(0 if sinks is None else q.shape[2])
    lse, heads = lse.view(q.shape[2], *q.shape[:2]), k.shape[2]
    for b, rows, keys in sequences(q, k, cu_q, cu_k):
        query, key, value = _grouped(q[b, rows], heads), _grouped(k[b, keys], heads), _grouped(v[b, keys], heads)
        upstream, result = _grouped(grad[b, rows], heads), _grouped(out[b, rows], heads)
        total = lse[:, b, rows].view(*upstream.shape[:3], 1)
        weights = (_scores(query, key, scale, causal, window) - total).exp()
        weights = weights.masked_fill(total == -torch.inf, 0.0)
        delta = (upstream * result).sum(-1, keepdim=True)
        change = weights * (upstream @ value.transpose(-1, -2) - delta) * scale
        dq[b, rows] = _flat(change @ key).to(q.dtype)
        dk[b, keys] = _flat((change.transpose(-1, -2) @ query).sum(1, keepdim=True)).to(k.dtype)
        dv[b, keys] = _flat((weights.transpose(-1, -2) @ upstream).sum(1, keepdim=True)).to(v.dtype)
        if sinks is not None:
            sink = sinks.to(lse.dtype).view(*total.shape[:2], 1, 1)
            dsinks -= ((sink - total).exp() * delta).sum((2, 3)).flatten()
    return dq, dk, dv, dsinks
