"""Attention on GPUs: flash-attn where it is installed, else torch's build of it; float32 by SDPA, a sequence at a time.

The kernels know no sinks, but a sink only joins the denominator: with lse the logarithm of the sum without it, the
result is theirs times sigmoid(lse - sink), and theirs to the backward are that result and log(exp(lse) + exp(sink)).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .reference import sequences, visible

Offsets = tuple[Tensor, Tensor, int, int]


@functools.cache
def _flash_attn() -> Any:
    """The module of flash-attn 2 with its kernels for packed sequences, or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    module = importlib.import_module("flash_attn.flash_attn_interface")
    return module if hasattr(module, "_flash_attn_varlen_forward") else None


def _offsets(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int) -> Offsets:
    """Offsets of queries and keys as int32, and the longest sequences, read from the device where not given."""
    if cu_q is None or cu_k is None:
        batch = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
        return batch * q.shape[1], batch * k.shape[1], q.shape[1], k.shape[1]
    if not (max_q and max_k):
        longest = torch.stack([cu_q.diff().max(), cu_k.diff().max()]).tolist() if len(cu_q) > 1 else [0, 0]
        max_q, max_k = max_q or longest[0], max_k or longest[1]
    return cu_q.to(torch.int32), cu_k.to(torch.int32), max_q, max_k


def _rows(x: Tensor) -> Tensor:
    """[B * N, heads, d] with adjacent elements."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.flatten(0, 1)


def _left(causal: bool, window: int) -> tuple[int, int]:
    """Keys before and after a query's own that it sees; -1: all."""
    return (window - 1 if window else -1), (0 if causal else -1)


def flash(q: Tensor, k: Tensor, v: Tensor, offsets: Offsets, scale: float, causal: bool, window: int) -> Any:
    """Result [N, heads, d] and lse [heads, N], of packed tensors."""
    left, right = _left(causal, window)
    module = _flash_attn()
    if module is not None:
        return module._flash_attn_varlen_forward(
            q, k, v, *offsets, dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=left,
            window_size_right=right,
        )[:2]  # fmt: skip
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *offsets, 0.0, causal, False, scale=scale, window_size_left=left, window_size_right=right
    )[:2]


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Offsets, scale: float,
    causal: bool, window: int,
) -> Any:  # fmt: skip
    left, right = _left(causal, window)
    module = _flash_attn()
    if module is not None:
        grads = [torch.empty_like(x) for x in (q, k, v)]
        module._flash_attn_varlen_backward(
            grad, q, k, v, out, lse, *grads, *offsets, dropout_p=0.0, softmax_scale=scale, causal=causal,
            window_size_left=left, window_size_right=right, softcap=0.0, alibi_slopes=None, deterministic=True,
        )  # fmt: skip
        return grads
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the random numbers that no dropout draws
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *offsets, 0.0, causal, state, torch.empty(0, device=q.device), scale=scale,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """One sequence, [n, heads, d]."""
    mask = visible(len(q), len(k), True, 0, q.device) if causal and len(q) != len(k) else None
    out = functional.scaled_dot_product_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), mask, is_causal=causal and mask is None, scale=scale,
        enable_gqa=True,
    )  # fmt: skip
    out = out.squeeze(0).transpose(0, 1)
    return out if mask is None else out.masked_fill(~mask.any(1)[:, None, None], 0.0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, sinks: Tensor | None, scale: float,
    causal: bool, window: int, max_q: int, max_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.dtype == torch.float32:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for b, rows, keys in sequences(q, k, cu_q, cu_k):
            out[b, rows] = _sdpa(q[b, rows], k[b, keys], v[b, keys], scale, causal)
        return out, out.new_zeros(q.shape[2], q.shape[0] * q.shape[1])  # which its backward does not need
    offsets = _offsets(q, k, cu_q, cu_k, max_q, max_k)
    out, lse = flash(_rows(q), _rows(k), _rows(v), offsets, scale, causal, window)
    if sinks is not None:
        sink = sinks.float()[:, None]
        out = (out * torch.sigmoid(lse - sink).T.unsqueeze(-1)).to(q.dtype)
        lse = torch.logaddexp(lse, sink)
    return out.reshape(q.shape).contiguous(), lse.contiguous()


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    sinks: Tensor | None, scale: float, causal: bool, window: int, max_q: int, max_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if q.dtype == torch.float32:
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        for b, rows, keys in sequences(q, k, cu_q, cu_k):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (q[b, rows], k[b, keys], v[b, keys])]
                result = _sdpa(leaves[0], leaves[1], leaves[2], scale, causal)
            parts = torch.autograd.grad(result, leaves, grad[b, rows])
            for whole, where, part in zip(grads, (rows, keys, keys), parts):
                whole[b, where] = part
        return grads[0], grads[1], grads[2], lse.new_empty(0)
    offsets = _offsets(q, k, cu_q, cu_k, max_q, max_k)
    upstream, result = _rows(grad), _rows(out)
    found = flash_backward(upstream, _rows(q), _rows(k), _rows(v), result, lse, offsets, scale, causal, window)
    dq, dk, dv = (x.reshape(like.shape).contiguous() for x, like in zip(found, (q, k, v)))
    if sinks is None:
        return dq, dk, dv, lse.new_empty(0)
    delta = (upstream.float() * result.float()).sum(-1)  # [N, heads]
    share = torch.exp(sinks.float()[:, None] - lse)  # [heads, N]
    return dq, dk, dv, -(share * delta.T).sum(1)
