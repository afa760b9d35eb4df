"""Attention in plain torch, a sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .op import Attended, Attention, AttentionBackward, Gradients, arithmetic, check_offsets


def sequences(a: Attention) -> Iterator[tuple[int, slice, slice]]:
    """(batch row, its queries, its keys) of each sequence; checks the offsets, which it copies to the CPU."""
    if a.cu_q is None or a.cu_k is None:
        for b in range(a.q.shape[0]):
            yield b, slice(0, a.q.shape[1]), slice(0, a.k.shape[1])
        return
    cu_q, cu_k = a.cu_q.cpu(), a.cu_k.cpu()
    check_offsets("cu_seqlens_q", cu_q, a.q.shape[1])
    check_offsets("cu_seqlens_k", cu_k, a.k.shape[1])
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
    return x.to(arithmetic(x)).unflatten(1, (heads, -1)).permute(1, 2, 0, 3)


def _flat(x: Tensor) -> Tensor:
    """Back to [n, query heads, d]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, a: Attention) -> Tensor:
    """[key heads, heads a key head, queries, keys]; -inf where a key is not seen."""
    scores = q @ k.transpose(-1, -2) * a.scale
    return scores.masked_fill(~visible(q.shape[2], k.shape[2], a.causal, a.window, q.device), -torch.inf)


def attention(a: Attention) -> Attended:
    out, heads = a.q.new_empty(a.q.shape), a.k.shape[2]
    lse = out.new_empty(a.q.shape[2], *a.q.shape[:2], dtype=arithmetic(a.q))
    for b, rows, keys in sequences(a):
        query, key, value = _grouped(a.q[b, rows], heads), _grouped(a.k[b, keys], heads), _grouped(a.v[b, keys], heads)
        scores = _scores(query, key, a)
        if a.sinks is not None:
            sink = a.sinks.to(lse.dtype).view(heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), -1)
        total = scores.logsumexp(-1)
        weights = (scores[..., : key.shape[2]] - total.unsqueeze(-1)).exp()
        weights = weights.masked_fill((total == -torch.inf).unsqueeze(-1), 0.0)
        out[b, rows] = _flat(weights @ value).to(out.dtype)
        lse[:, b, rows] = total.flatten(0, 1)
    return Attended(out, lse.flatten(1))


def attention_backward(call: AttentionBackward) -> Gradients:
    a = call.forward
    dq, dk, dv = (x.new_empty(x.shape) for x in (a.q, a.k, a.v))
    dsinks = call.lse.new_zeros(0 if a.sinks is None else a.q.shape[2])
    lse, heads = call.lse.view(a.q.shape[2], *a.q.shape[:2]), a.k.shape[2]
    for b, rows, keys in sequences(a):
        query, key, value = _grouped(a.q[b, rows], heads), _grouped(a.k[b, keys], heads), _grouped(a.v[b, keys], heads)
        upstream, result = _grouped(call.grad[b, rows], heads), _grouped(call.out[b, rows], heads)
        total = lse[:, b, rows].view(*upstream.shape[:3], 1)
        weights = (_scores(query, key, a) - total).exp()
        weights = weights.masked_fill(total == -torch.inf, 0.0)
        delta = (upstream * result).sum(-1, keepdim=True)
        change = weights * (upstream @ value.transpose(-1, -2) - delta) * a.scale
        dq[b, rows] = _flat(change @ key).to(dq.dtype)
        dk[b, keys] = _flat((change.transpose(-1, -2) @ query).sum(1, keepdim=True)).to(dk.dtype)
        dv[b, keys] = _flat((weights.transpose(-1, -2) @ upstream).sum(1, keepdim=True)).to(dv.dtype)
        if a.sinks is not None:
            sink = a.sinks.to(lse.dtype).view(*total.shape[:2], 1, 1)
            dsinks -= ((sink - total).exp() * delta).sum((2, 3)).flatten()
    return Gradients(dq, dk, dv, dsinks)
