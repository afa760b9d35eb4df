"""Schemas, fakes, backends, gradients and argument checks of attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._checks import FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape, check_tensor, describe
from ..._positional import Implementation, Op

MAX_HEAD_DIM = 256


def _unfused(*args: Any) -> str | None:
    """Why torch's fused kernels do not serve a call: its arguments are the tensors, then what `_OPTIONS` names."""
    q, (_, _, sinks, _, _, window, _, _) = args[0], args[-8:]
    if not q.is_cuda:
        return "its kernels need a GPU"
    if q.dtype == torch.float32 and (sinks is not None or window):
        return "no fused kernel has sinks or a window in float32"
    return None


_OPTIONS = (
    "Tensor? cu_q, Tensor? cu_k, Tensor? sinks, float scale, bool causal, int window, int max_q, int max_k, str backend"
)


def _implementations(function: str) -> tuple[Implementation, ...]:
    return (
        Implementation("native", f"native:{function}", ("cpu",), KERNEL_DTYPES),
        Implementation("torch", f"gpu:{function}", ("cuda", "hip"), KERNEL_DTYPES, _unfused),
        Implementation("reference", f"reference:{function}"),
    )


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


_attention = Op(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    package=__package__,
    key="q",
    implementations=_implementations("attention"),
    fake=lambda q, *_: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[2], q.shape[0] * q.shape[1]), dtype=_wide(q)),
    ),
)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Any, cu_k: Any, sinks: Any, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0 if sinks is None else q.shape[2], dtype=_wide(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


_backward = Op(
    f"attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    package=__package__,
    key="q",
    implementations=_implementations("attention_backward"),
    fake=_fake_backward,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        options: tuple[Any, ...],
    ) -> Tensor:
        out, lse = _attention(q, k, v, cu_q, cu_k, sinks, *options)
        ctx.save_for_backward(q, k, v, out, lse, sinks, cu_q, cu_k)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks, cu_q, cu_k = ctx.saved_tensors
        dq, dk, dv, dsinks = _backward(grad, q, k, v, out, lse, cu_q, cu_k, sinks, *ctx.options)
        return dq, dk, dv, None if sinks is None else dsinks.to(sinks.dtype), None, None, None


def check_offsets(name: str, offsets: Tensor, tokens: int) -> None:
    """The values of cu_seqlens, of a tensor that is on the CPU."""
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != tokens or any(a > b for a, b in zip(values, values[1:])):
        raise ValueError(f"{name}: got {values}, expected numbers from 0 to {tokens} that never decrease")


def _check_offsets(name: str, offsets: Tensor, q: Tensor) -> None:
    check_shape(name, offsets, ("S + 1",))
    check_dtype(name, offsets, (torch.int32, torch.int64))
    check_same(name, offsets, "q", q, dtype=False)
    if offsets.shape[0] == 0:
        raise ValueError(f"{name}: got {describe(offsets)}, expected [S + 1]")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_dtype("q", q, FLOATS)
    if q.dim() not in (3, 4):
        raise ValueError(f"q: got {describe(q)}, expected [N, heads, d] or [B, N, heads, d]")
    if q.shape[-1] % 8 or not 0 < q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"q: got head_dim {q.shape[-1]}, expected a multiple of 8 up to {MAX_HEAD_DIM}")
    check_tensor("k", k)
    check_shape("k", k, (*q.shape[:-3], "M", "key heads", q.shape[-1]))
    check_same("k", k, "q", q)
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"k: got {k.shape[-2]} heads, expected a divisor of the {q.shape[-2]} heads of q")
    check_shape("v", v, k.shape)
    check_same("v", v, "q", q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
    sinks: Tensor | None,
    scale: float | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    backend: str,
) -> Tensor:
    _check_tensors(q, k, v)
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_q: got None, expected it with cu_seqlens_k")
    if cu_seqlens_q is not None:
        if q.dim() != 3:
            raise ValueError(f"cu_seqlens_q: got one with q of {describe(q)}, expected packed [N, heads, d]")
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_offsets("cu_seqlens_q", cu_seqlens_q, q)
        _check_offsets("cu_seqlens_k", cu_seqlens_k, q)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(f"cu_seqlens_k: got {describe(cu_seqlens_k)}, expected shape {list(cu_seqlens_q.shape)}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window: got {window} with causal={causal}, expected at least 1, with causal=True")
    if sinks is not None:
        check_shape("sinks", sinks, (q.shape[-2],))
        check_same("sinks", sinks, "q", q, dtype=False)
        check_dtype("sinks", sinks, (torch.float32, q.dtype))
    packed = q.dim() == 3
    if packed:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    options = (scale, causal, window or 0, max_seqlen_q or 0, max_seqlen_k or 0, backend)
    tensors = (q, k, v) if sinks is None else (q, k, v, sinks)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out = _Attention.apply(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, options)
    else:
        out, _ = _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, *options)
    return out.squeeze(0) if packed else out
