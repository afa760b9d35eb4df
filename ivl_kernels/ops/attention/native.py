"""Attention on the CPU: thin calls into csrc/cpu/attention.cpp."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .op import check_offsets


@functools.cache
def _kernel(name: str) -> Any:
    return _native.op(name)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sequences(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if cu_q is None or cu_k is None:
        return None, None
    check_offsets("cu_seqlens_q", cu_q, q.shape[1])
    check_offsets("cu_seqlens_k", cu_k, k.shape[1])
    return cu_q.to(torch.int64).contiguous(), cu_k.to(torch.int64).contiguous()


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, sinks: Tensor | None, scale: float,
    causal: bool, window: int, max_q: int, max_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cu_q, cu_k = _sequences(q, k, cu_q, cu_k)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[2], q.shape[0] * q.shape[1])
    sinks = None if sinks is None else sinks.float().contiguous()
    _kernel("attention")(_rows(q), _rows(k), _rows(v), cu_q, cu_k, sinks, scale, causal, window, out, lse)
    return out, lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    sinks: Tensor | None, scale: float, causal: bool, window: int, max_q: int, max_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    cu_q, cu_k = _sequences(q, k, cu_q, cu_k)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    dsinks = torch.empty(0 if sinks is None else q.shape[2])
    sinks = None if sinks is None else sinks.float().contiguous()
    _kernel("attention_backward")(
        _rows(grad), _rows(q), _rows(k), _rows(v), out.contiguous(), lse.contiguous(), cu_q, cu_k, sinks, scale,
        causal, window, dq, dk, dv, dsinks,
    )  # fmt: skip
    return dq, dk, dv, dsinks
