"""Records, fakes, backends, gradients and argument checks of attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape, check_tensor, describe
from ..._dispatch import Implementation
from ..._library import Op, differentiable

MAX_HEAD_DIM = 256


class Attention(NamedTuple):
    q: Tensor  # [B, N, query heads, d]
    k: Tensor
    v: Tensor
    cu_q: Tensor | None
    cu_k: Tensor | None
    sinks: Tensor | None
    scale: float
    causal: bool
    window: int  # 0: none
    max_q: int  # 0: not known
    max_k: int


class Attended(NamedTuple):
    out: Tensor
    lse: Tensor  # [query heads, B * N], the logarithm of each softmax's denominator, in the arithmetic type


class AttentionBackward(NamedTuple):
    grad: Tensor
    forward: Attention
    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor  # in the arithmetic type; empty without sinks


def _unfused(call: Attention | AttentionBackward) -> str | None:
    """Why torch's fused kernels do not serve a call."""
    a = call if isinstance(call, Attention) else call.forward
    if not a.q.is_cuda:
        return "its kernels need a GPU"
    if a.q.dtype == torch.float32 and (a.sinks is not None or a.window):
        return "no fused kernel has sinks or a window in float32"
    return None


_BACKENDS = (
    Implementation("cpu", KERNEL_DTYPES),
    Implementation("torch", KERNEL_DTYPES, _unfused),
    Implementation("reference"),
)


def arithmetic(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def empty_attended(a: Attention) -> Attended:
    """The results of the forward, to be written."""
    batch, tokens, heads = a.q.shape[:3]
    return Attended(a.q.new_empty(a.q.shape), a.q.new_empty(heads, batch * tokens, dtype=arithmetic(a.q)))


def empty_gradients(b: AttentionBackward) -> Gradients:
    """The results of the backward, to be written."""
    a = b.forward
    sinks = a.q.new_empty(0 if a.sinks is None else a.q.shape[2], dtype=arithmetic(a.q))
    return Gradients(a.q.new_empty(a.q.shape), a.k.new_empty(a.k.shape), a.v.new_empty(a.v.shape), sinks)


# The longest sequence is read where it is not given, and in float32 every offset.
_attention = Op(
    "attention", Attention, Attended, key="q", reads_host=True, implementations=_BACKENDS, fake=empty_attended
)
_backward = Op(
    "attention_backward",
    AttentionBackward,
    Gradients,
    key="q",
    reads_host=True,
    implementations=_BACKENDS,
    fake=empty_gradients,
)


def _gradients(saved: tuple[Attention, Tensor, Tensor], needs: Any, backend: str, grad: Tensor, _: None) -> Any:
    return _backward(AttentionBackward(grad, *saved), backend)._asdict()


_differentiable = differentiable(_attention, lambda a, attended: (a, *attended), _gradients)


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
    longest = (max_seqlen_q or 0, max_seqlen_k or 0)
    a = Attention(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, scale, causal, window or 0, *longest)
    out = _differentiable(a, backend).out
    return out.squeeze(0) if packed else out
