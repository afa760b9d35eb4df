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

from .op import Attended, Attention, AttentionBackward, Gradients
from .reference import sequences, visible

Offsets = tuple[Tensor, Tensor, int, int]


@functools.cache
def _flash_attn() -> Any:
    """The module of flash-attn 2 with its kernels for packed sequences, or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    module = importlib.import_module("flash_attn.flash_attn_interface")
    return module if hasattr(module, "_flash_attn_varlen_forward") else None


def _offsets(a: Attention) -> Offsets:
    """Offsets of queries and keys as int32, and the longest sequences, read from the device where not given."""
    cu_q, cu_k, max_q, max_k = a.cu_q, a.cu_k, a.max_q, a.max_k
    if cu_q is None or cu_k is None:
        batch = torch.arange(a.q.shape[0] + 1, dtype=torch.int32, device=a.q.device)
        return batch * a.q.shape[1], batch * a.k.shape[1], a.q.shape[1], a.k.shape[1]
    if not (max_q and max_k):
        longest = torch.stack([cu_q.diff().max(), cu_k.diff().max()]).tolist() if len(cu_q) > 1 else [0, 0]
        max_q, max_k = max_q or longest[0], max_k or longest[1]
    return cu_q.to(torch.int32), cu_k.to(torch.int32), max_q, max_k


def _rows(x: Tensor) -> Tensor:
    """[B * N, heads, d] with adjacent elements."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.flatten(0, 1)


def _sides(a: Attention) -> dict[str, int]:
    """Keys before and after a query's own that it sees; -1: all."""
    return dict(window_size_left=a.window - 1 if a.window else -1, window_size_right=0 if a.causal else -1)


def _flash(a: Attention, offsets: Offsets) -> Any:
    """Result [N, heads, d] and lse [heads, N], of packed tensors."""
    inputs = (_rows(a.q), _rows(a.k), _rows(a.v), *offsets)
    module = _flash_attn()
    if module is not None:
        return module._flash_attn_varlen_forward(
            *inputs, dropout_p=0.0, softmax_scale=a.scale, causal=a.causal, **_sides(a)
        )[:2]
    return torch.ops.aten._flash_attention_forward(*inputs, 0.0, a.causal, False, scale=a.scale, **_sides(a))[:2]


def _flash_backward(grad: Tensor, a: Attention, out: Tensor, lse: Tensor, offsets: Offsets) -> Any:
    inputs = (grad, _rows(a.q), _rows(a.k), _rows(a.v), out, lse)
    module = _flash_attn()
    if module is not None:
        grads = [torch.empty_like(x) for x in inputs[1:4]]
        module._flash_attn_varlen_backward(
            *inputs, *grads, *offsets, dropout_p=0.0, softmax_scale=a.scale, causal=a.causal, softcap=0.0,
            alibi_slopes=None, deterministic=True, **_sides(a),
        )  # fmt: skip
        return grads
    state = torch.zeros(2, dtype=torch.uint64, device=grad.device)  # of the random numbers that no dropout draws
    return torch.ops.aten._flash_attention_backward(
        *inputs, *offsets, 0.0, a.causal, state, grad.new_empty(0), scale=a.scale, **_sides(a)
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """One sequence, [n, heads, d]."""
    mask = visible(len(q), len(k), True, 0, q.device) if causal and len(q) != len(k) else None
    out = functional.scaled_dot_product_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), mask, is_causal=causal and mask is None, scale=scale,
        enable_gqa=True,
    )  # fmt: skip
    out = out.squeeze(0).transpose(0, 1)
    return out if mask is None else out.masked_fill(~mask.any(1)[:, None, None], 0.0)


def attention(a: Attention) -> Attended:
    q = a.q
    if q.dtype == torch.float32:
        out = q.new_empty(q.shape)
        for b, rows, keys in sequences(a):
            out[b, rows] = _sdpa(q[b, rows], a.k[b, keys], a.v[b, keys], a.scale, a.causal)
        return Attended(out, out.new_zeros(q.shape[2], q.shape[0] * q.shape[1]))  # which its backward does not need
    out, lse = _flash(a, _offsets(a))
    if a.sinks is not None:
        sink = a.sinks.float()[:, None]
        out = (out * torch.sigmoid(lse - sink).T.unsqueeze(-1)).to(q.dtype)
        lse = torch.logaddexp(lse, sink)
    return Attended(out.reshape(q.shape).contiguous(), lse.contiguous())


def attention_backward(call: AttentionBackward) -> Gradients:
    a, none = call.forward, call.lse.new_empty(0)
    if a.q.dtype == torch.float32:
        grads = [x.new_empty(x.shape) for x in (a.q, a.k, a.v)]
        for b, rows, keys in sequences(a):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (a.q[b, rows], a.k[b, keys], a.v[b, keys])]
                result = _sdpa(leaves[0], leaves[1], leaves[2], a.scale, a.causal)
            parts = torch.autograd.grad(result, leaves, call.grad[b, rows])
            for whole, where, part in zip(grads, (rows, keys, keys), parts):
                whole[b, where] = part
        return Gradients(grads[0], grads[1], grads[2], none)
    upstream, result = _rows(call.grad), _rows(call.out)
    found = _flash_backward(upstream, a, result, call.lse, _offsets(a))
    dq, dk, dv = (x.reshape(like.shape).contiguous() for x, like in zip(found, (a.q, a.k, a.v)))
    if a.sinks is None:
        return Gradients(dq, dk, dv, none)
    delta = (upstream.float() * result.float()).sum(-1)  # [N, heads]
    share = torch.exp(a.sinks.float()[:, None] - call.lse)  # [heads, N]
    return Gradients(dq, dk, dv, -(share * delta.T).sum(1))
