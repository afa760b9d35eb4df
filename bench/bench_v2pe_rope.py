"""Rotary of q and k (with and without q/k RMSNorm), forward, backward and decode, and V2PE positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from bench.runner import Case, Work, backward, compiled, device
from ivl_kernels.ops import rope_frequencies, v2pe_position_ids, v2pe_rope, v2pe_rope_

Q_HEADS, KV_HEADS, WIDTH = 32, 8, 128
TOKEN, TEXT = 9, 1


def rotate(q: Any, k: Any, cos: Any, sin: Any, norms: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if norms:
        q, k = norms[0](q), norms[1](k)
    return apply_rotary_pos_emb(q, k, cos, sin)


def make(tokens: int, dtype: torch.dtype, norm: bool, mode: str) -> Work:
    """`mode`: "in place", "new" or "backward". q and k lie as their projections leave them."""
    shapes = [(1, tokens, heads, WIDTH) for heads in (Q_HEADS, KV_HEADS)]
    inputs = [torch.randn(s, device=device(), dtype=dtype) for s in shapes]
    grads = [torch.randn(s, device=device(), dtype=dtype).transpose(1, 2) for s in shapes]
    inv_freq, _ = rope_frequencies(WIDTH, 1e6, device=device())
    freqs = torch.arange(tokens, device=device()).float()[None, :, None] * inv_freq
    cos, sin = (torch.cat((t, t), -1).to(dtype) for t in (freqs.cos(), freqs.sin()))
    norms = [Qwen3RMSNorm(WIDTH).to(device(), dtype).requires_grad_(mode == "backward") for _ in shapes] if norm else []
    weights = dict(q_weight=norms[0].weight, k_weight=norms[1].weight) if norms else {}
    work = [x.clone() for x in inputs]
    q, k = (x.transpose(1, 2).requires_grad_(mode == "backward") for x in (work if mode == "in place" else inputs))
    leaves = [q, k, *(n.weight for n in norms)]

    def restore() -> None:
        for target, source in zip(work, inputs):
            target.copy_(source)

    def ours() -> Any:
        function = v2pe_rope_ if mode == "in place" else v2pe_rope
        out = function(q, k, cos=cos, sin=sin, **weights)
        return backward(out, leaves, grads) if mode == "backward" else out

    def eager() -> Any:
        out = rotate(q, k, cos, sin, norms)
        return backward(out, leaves, grads) if mode == "backward" else out

    def truth() -> Any:
        qd, kd = (x.detach().double().requires_grad_(mode == "backward") for x in (q, k))
        wide = [w.detach().double().requires_grad_(mode == "backward") for w in weights.values()]
        out = v2pe_rope(
            qd, kd, cos=cos.double(), sin=sin.double(), backend="reference", **dict(zip(weights, wide))
        )  # fmt: skip
        return backward(out, [qd, kd, *wide], [g.double() for g in grads]) if mode == "backward" else out

    fast = torch.compile(rotate, dynamic=False)

    def compile_backward() -> Any:
        return backward(fast(q, k, cos, sin, norms), leaves, grads)

    variants = {
        "ours": ours,
        "eager": eager,
        "compile": compile_backward if mode == "backward" else compiled(rotate, q, k, cos, sin, norms),
    }
    return Work(variants, truth=truth, reset=restore if mode == "in place" else None)


def published(ids: torch.Tensor, mask: torch.Tensor, step: float, start: int, end: int) -> torch.Tensor:
    """One row as OpenGVLab/V2PE does it: pieces between the marks of each image, then a list of numbers.

    A rendition with the same tensor operations; `start` and `end` are the ids of <img> and </img>.
    """
    opens, closes = torch.where(ids == start)[0], torch.where(ids == end)[0]
    pieces, last, begin = [], -1, 0
    for i in range(len(opens)):
        here = mask[begin : opens[i] + 1]
        text = here.long().cumsum(-1) - 1 + (last + 1)
        pieces.append(text.masked_fill_(here == 0, 1))
        last = text[-1].long()
        count = int(closes[i] - opens[i] - 1)
        visual = torch.linspace(float(last), float(last) + step * count, count + 1)[1:]
        pieces.append(visual)
        last = torch.ceil(visual[-1]).long()
        begin = closes[i]
    here = mask[begin:]
    pieces.append((here.long().cumsum(-1) - 1 + (last + 1)).masked_fill_(here == 0, 1))
    return torch.tensor(list(torch.cat([p.to("cpu") for p in pieces]).to(torch.float32).numpy()))


def make_positions(rows: int, tokens: int) -> Work:
    """Rows of documents: an image of 13 tiles after every 150 tokens of text."""
    ids = torch.full((rows, tokens), TEXT, device=device())
    period = 150 + 2 + 13 * 256
    for begin in range(150, tokens - period, period):
        ids[:, begin] = 2
        ids[:, begin + 1 : begin + 1 + 13 * 256] = TOKEN
        ids[:, begin + 1 + 13 * 256] = 3
    mask = torch.ones_like(ids)
    lists = ids.cpu(), mask.cpu()

    def loop() -> torch.Tensor:
        return torch.stack([published(*row, 1 / 16, 2, 3) for row in zip(*lists)]).to(device())

    return Work({"ours": lambda: v2pe_position_ids(ids, TOKEN, 1 / 16, attention_mask=mask), "eager": loop})


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        size = torch.finfo(dtype).bits // 8 * WIDTH * (Q_HEADS + KV_HEADS)
        kind = str(dtype).removeprefix("torch.")
        for tokens in (1344,) if quick else (1, 1344, 3400):
            for norm in (False, True):
                for mode in ("in place", "new", "backward") if tokens > 1 else ("in place", "new"):
                    passes = {"in place": 2, "new": 2, "backward": 6 if norm else 4}[mode]
                    name = f"{'q/k norm + ' if norm else ''}rotary, {mode}, {tokens} tokens, {kind}"
                    params = dict(tokens=tokens, dtype=kind, norm=norm, mode=mode)
                    yield Case(
                        "v2pe_rope", name, params, lambda t=tokens, d=dtype, n=norm, m=mode: make(t, d, n, m),  # type: ignore[misc]
                        bytes=passes * size * tokens, dtype=dtype, seconds=2.0,
                    )  # fmt: skip
    yield Case(
        "v2pe_rope", "positions, 32k tokens x 8 rows", dict(rows=8, tokens=32768), lambda: make_positions(8, 32768),
        bytes=8 * 32768 * (8 + 8 + 4), seconds=2.0,
    )  # fmt: skip
