"""Attention of packed sequences, and of tiles, prefill and decode against SDPA."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ... import ops
from . import Case, Cost, Numbers, Timed
from ._case import Inputs, dtype_name


@functools.cache
def _offsets(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor((0, *itertools.accumulate(lengths)), device=device)


def packed(
    lengths: tuple[int, ...], heads: int, kv_heads: int, width: int, name: str, *, sinks: bool = False, **options: Any
) -> Case:
    """Sequences of these lengths end to end. `options`: `causal` and `window`."""

    def make(n: Numbers) -> Inputs:
        tokens = sum(lengths)
        values = {"q": n.normal(tokens, heads, width), "sinks": n.normal(heads)}
        return values | {name: n.normal(tokens, kv_heads, width) for name in "kv"}

    def call(v: Inputs, backend: str) -> torch.Tensor:
        last = {"sinks": v["sinks"]} if sinks else {}
        longest: Any = dict(max_seqlen_q=max(lengths), max_seqlen_k=max(lengths))
        cu = _offsets(lengths, v["q"].device)
        return ops.attention(v["q"], v["k"], v["v"], cu, **options, **last, **longest, backend=backend)

    return Case(
        "attention",
        f"{name}, sequences of {', '.join(map(str, lengths))}",
        make,
        call,
        ("q", "k", "v", "sinks") if sinks else ("q", "k", "v"),
        functools.partial(_plain, lengths=lengths, sinks=sinks, **options),
        functools.partial(_cost, pairs=sum(_pairs(n, n, **options) for n in lengths)),
    )


def _plain(
    v: Inputs, lengths: tuple[int, ...], causal: bool = False, window: int = 0, sinks: bool = False
) -> torch.Tensor:
    """A sequence at a time, every product and the softmax rounded to the dtype of the inputs."""
    results = []
    group = v["q"].shape[1] // v["k"].shape[1]
    for q, k, value in zip(*(v[name].split(lengths) for name in "qkv")):
        q, k, value = (x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), value.repeat_interleave(group, 1)))
        distance = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(q.shape[1], device=q.device)
        hidden = (causal & (distance < 0)) | (distance >= (window or q.shape[1]))
        scores = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill(hidden, -torch.inf)
        if sinks:
            scores = torch.cat((scores, v["sinks"][:, None, None].expand(*scores.shape[:2], 1)), -1)
        results.append((scores.softmax(-1)[..., : q.shape[1]] @ value).transpose(0, 1))
    return torch.cat(results)


def _pairs(queries: int, keys: int, causal: bool = False, window: int = 0) -> int:
    """Pairs of a query and a key that it sees; the last query is at the last key."""
    seen = (min(keys - queries + i + 1, window or keys) if causal else keys for i in range(queries))
    return sum(seen)


def _cost(v: Inputs, pairs: int) -> tuple[Cost, Cost]:
    q, size = v["q"], v["q"].itemsize
    flops = 4 * q.shape[1] * q.shape[-1] * pairs  # heads, whether packed or not
    kv = 2 * v["k"].numel()
    # Backward: q, k, v, out and its gradient in, three gradients out; the scores again and four products more.
    return (
        Cost(size * (2 * q.numel() + kv), flops, q.numel()),
        Cost(size * (4 * q.numel() + 2 * kv), 5 * flops // 2, q.numel()),
    )


def of_layer(kind: str, batch: int, queries: int, keys: int, heads: int, kv_heads: int, width: int) -> Case:
    """Of q, k and v [B, heads, N, d]. `kind`: "vision", "causal", "window" (128, with sinks) or "decode"."""
    causal, window = kind != "vision", 128 if kind == "window" else None

    def make(n: Numbers) -> Inputs:
        """Views of what projections leave, or of a cache."""

        def rand(tokens: int, count: int) -> torch.Tensor:
            first = n.normal(batch, tokens, count, width).transpose(1, 2)
            return first.contiguous() if kind == "decode" else first

        values = {"q": rand(queries, heads), "k": rand(keys, kv_heads), "v": rand(keys, kv_heads)}
        return values | ({"sinks": n.normal(heads)} if window else {})

    def call(v: Inputs, backend: str) -> torch.Tensor:
        turned = (v[name].transpose(1, 2) for name in "qkv")
        return ops.attention(*turned, causal=causal, window=window, sinks=v.get("sinks"), backend=backend)

    def plain(v: Inputs) -> torch.Tensor:
        """As transformers calls SDPA; with sinks, by a column of them, as its eager attention does."""
        q, k, value = (v[name] for name in "qkv")
        mask = None
        if window or (causal and queries != keys and queries > 1):
            steps = torch.arange(queries, device=q.device)[:, None] + keys - queries
            distance = steps - torch.arange(keys, device=q.device)
            mask = (distance >= 0) & (distance < (window or keys))
        if mask is None or not window:
            alike = causal and queries == keys
            out = scaled_dot_product_attention(q, k, value, mask, is_causal=alike, enable_gqa=True)
            return out.transpose(1, 2)
        group = heads // kv_heads
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) / math.sqrt(width)
        scores = scores.masked_fill(~mask, -torch.inf)
        scores = torch.cat((scores, v["sinks"].to(q.dtype)[:, None, None].expand(*scores.shape[:3], 1)), -1)
        return (scores.softmax(-1)[..., :keys] @ value.repeat_interleave(group, 1)).transpose(1, 2)

    pairs = batch * _pairs(queries, keys, causal, window or 0)
    name = f"{kind} {batch} x {queries} of {keys}, {heads}/{kv_heads} x {width}"
    return Case("attention", name, make, call, ("q", "k", "v"), plain, functools.partial(_cost, pairs=pairs))


def cases(large: bool) -> Iterator[Case]:
    sizes = ((1025, 300, 1), 16, 8, 128) if large else ((45, 70, 1), 4, 2, 24)
    yield packed(*sizes, "full")
    yield packed(*sizes, "causal", causal=True)
    yield packed(*sizes, "window and sinks", sinks=True, causal=True, window=128 if large else 7)


def timed(quick: bool) -> Iterator[Timed]:
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
            yield Timed(
                "attention",
                f"{kind} {batch} x {queries} of {keys}, {heads}/{kv_heads} x {width}, {dtype_name(dtype)}",
                of_layer(kind.removesuffix(" backward"), batch, queries, keys, *shape),
                dtype,
                dict(kind=kind, batch=batch, queries=queries, keys=keys, heads=list(shape)),
                "backward" in kind,
                compile=False,
                seconds=5.0,
            )
