"""Attention alone: the vision transformer's tiles, prefill and decode, against SDPA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.runner import Case, Work, backward, device
from ivl_kernels.ops import attention


def make(kind: str, batch: int, queries: int, keys: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Work:
    """`kind`: "vision", "causal", "window" (128, with sinks), "decode", or "... backward"."""
    heads, kv_heads, width = shape
    training, causal = "backward" in kind, "vision" not in kind
    window = 128 if "window" in kind else None

    def rand(tokens: int, count: int) -> torch.Tensor:
        """[B, heads, N, d]: a view of what a projection leaves, or of a cache."""
        first = torch.randn(batch, tokens, count, width, device=device()).transpose(1, 2)
        return (first.contiguous() if kind == "decode" else first).to(dtype).requires_grad_(training)

    q, k, v = rand(queries, heads), rand(keys, kv_heads), rand(keys, kv_heads)
    sinks = torch.randn(heads, device=device()) if window else None
    grad = torch.randn(batch, queries, heads, width, device=device()).to(dtype)
    mask = None
    if window or (causal and queries != keys and queries > 1):
        distance = (
            torch.arange(queries, device=device())[:, None] + keys - queries - torch.arange(keys, device=device())
        )
        mask = (distance >= 0) & (distance < (window or keys))

    def ours(q: Any, k: Any, v: Any, **options: Any) -> torch.Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return attention(*turned, causal=causal, window=window, sinks=sinks, **options)

    def sdpa(q: Any, k: Any, v: Any) -> torch.Tensor:
        """As transformers calls it; with sinks, by a column of zeros, as eager attention does."""
        if sinks is None:
            plain = causal and queries == keys
            out = scaled_dot_product_attention(q, k, v, mask, is_causal=plain, enable_gqa=True)
            return out.transpose(1, 2)
        group = heads // kv_heads
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) / math.sqrt(width)
        scores = scores.masked_fill(~mask, -torch.inf)
        scores = torch.cat((scores, sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:3], 1)), -1)
        return (scores.softmax(-1)[..., :keys] @ v.repeat_interleave(group, 1)).transpose(1, 2)

    def run(function: Any, tensors: Any = (q, k, v), upstream: Any = grad) -> Any:
        out = function(*tensors)
        return backward(out, tensors, upstream) if training else out

    def truth() -> Any:
        wide = tuple(x.detach().double().requires_grad_(training) for x in (q, k, v))
        return run(lambda *x: ours(*x, backend="reference"), wide, grad.double())

    return Work({"ours": lambda: run(ours), "eager": lambda: run(sdpa)}, truth=truth)


def cases(quick: bool) -> Iterator[Case]:
    vit, language, oss = (16, 16, 64), (16, 8, 128), (64, 8, 64)
    runs = [("vision", 5, 1025, 1025, vit), ("causal", 1, 1344, 1344, language), ("decode", 1, 1, 1344, language)]
    if not quick:
        runs += [("vision", 1, 1025, 1025, vit), ("vision", 13, 1025, 1025, vit)]
        runs += [("causal", 1, 3392, 3392, language), ("decode", 1, 1, 3392, language)]
        runs += [("window", 1, 1344, 1344, oss), ("causal", 1, 1344, 1344, oss)]
        runs += [("vision backward", 2, 1025, 1025, vit), ("causal backward", 1, 1344, 1344, language)]
    for dtype in (torch.float32, torch.bfloat16):
        for kind, batch, queries, keys, shape in runs:
            heads, kv_heads, width = shape
            pairs = queries * keys if "vision" in kind or kind == "decode" else queries * (queries + 1) // 2
            if kind == "window":
                pairs = 128 * queries - 128 * 127 // 2
            name = f"{kind} {batch} x {queries} of {keys}, {heads}/{kv_heads} x {width}, {str(dtype)[6:]}"
            # Products forward, and forward again with four more in the backward.
            flops = batch * heads * width * pairs * (4 if "backward" not in kind else 14)
            yield Case(
                "attention", name, dict(kind=kind, batch=batch, queries=queries, keys=keys, heads=list(shape)),
                lambda v=(kind, batch, queries, keys, shape, dtype): make(*v),
                bytes=dtype.itemsize * width * batch * (2 * queries * heads + 2 * keys * kv_heads), flops=flops,
                dtype=dtype, seconds=5.0,
            )  # fmt: skip
