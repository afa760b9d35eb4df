"""Attention on the CPU: thin calls into csrc/cpu/attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _cpu
from .op import (
    Attended,
    Attention,
    AttentionBackward,
    Gradients,
    check_offsets,
    empty_attended,
    empty_gradients,
)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _inputs(a: Attention) -> tuple[Any, ...]:
    """q, k and v, and what follows them."""
    cu_q, cu_k = a.cu_q, a.cu_k
    if cu_q is not None and cu_k is not None:
        check_offsets("cu_seqlens_q", cu_q, a.q.shape[1])
        check_offsets("cu_seqlens_k", cu_k, a.k.shape[1])
        cu_q, cu_k = cu_q.to(torch.int64).contiguous(), cu_k.to(torch.int64).contiguous()
    sinks = None if a.sinks is None else a.sinks.float().contiguous()
    return _rows(a.q), _rows(a.k), _rows(a.v), cu_q, cu_k, sinks, a.scale, a.causal, a.window


def attention(a: Attention) -> Attended:
    inputs, result = _inputs(a), empty_attended(a)
    _cpu.op("attention")(*inputs, *result)
    return result


def attention_backward(b: AttentionBackward) -> Gradients:
    inputs, result = _inputs(b.forward), empty_gradients(b)
    _cpu.op("attention_backward")(_rows(b.grad), b.out.contiguous(), b.lse.contiguous(), *inputs, *result)
    return result
