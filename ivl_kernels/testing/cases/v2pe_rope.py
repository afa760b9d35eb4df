"""Rotary of q and k (with and without q/k RMSNorm), forward, backward and decode, and V2PE positions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from ... import ops
from . import Case, Cost, Numbers, Shape, Subject, Timed, scaled
from ._case import Inputs, dtype_name

TOKEN = 7


@functools.cache
def _tables(tokens: int, dim: int, fractional: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [N] and frequencies [d / 2]: float32 by contract, whatever the dtype of q and k."""
    steps = torch.where(torch.arange(tokens) % 3 == 0, 1.0, 1 / 16) if fractional else torch.ones(tokens)
    frequencies = 1e6 ** (-torch.arange(0, dim, 2).float() / dim)
    return (torch.cumsum(steps, 0) - (0.0 if fractional else 1.0)).to(device), frequencies.to(device)


def _angles(tokens: int, dim: int, n: Numbers) -> Inputs:
    """cos and sin [1, N, d] at whole positions, as a model's rotary embedding gives them."""
    positions, frequencies = _tables(tokens, dim, False, torch.device(n.device))
    angles = torch.outer(positions, frequencies).repeat(1, 2)[None]
    return {"cos": angles.cos().to(n.dtype), "sin": angles.sin().to(n.dtype)}


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x.float() if x.itemsize < 4 else x
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]


def eager(v: Inputs) -> Any:
    """The q and k norms where there are weights, then the rotation, as transformers does both; q, k [B, h, N, d]."""
    q, k = v["q"], v["k"]
    if "q_weight" in v:
        q, k = _rms(q, v["q_weight"]), _rms(k, v["k_weight"])
    return _rotate(q, v["cos"], v["sin"]), _rotate(k, v["cos"], v["sin"])


def liger(v: Inputs) -> Any:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = v["q"], v["k"]
    if "q_weight" in v:
        q, k = (LigerRMSNormFunction.apply(v[n], v[f"{n}_weight"], 1e-6, 0.0, "llama", False) for n in "qk")
    return LigerRopeFunction.apply(q.clone(), k.clone(), v["cos"], v["sin"])


def inputs(n: Numbers, batch: int, q_heads: int, kv_heads: int, tokens: int, dim: int, normed: bool) -> Inputs:
    values = {"q": n.normal(batch, q_heads, tokens, dim), "k": n.normal(batch, kv_heads, tokens, dim)}
    if normed:
        values |= {f"{name}_weight": n.normal(dim, scale=0.1, shift=1.0) for name in "qk"}
    return values


def cost(v: Inputs) -> tuple[Cost, Cost]:
    q = v["q"]
    count = q.numel() + v["k"].numel()
    angles = 4 * (q.shape[2] + q.shape[3] // 2)
    # Backward: the gradients in and out, and q and k again under norms.
    return (
        Cost(2 * count * q.itemsize + angles, 0, count),
        Cost((3 if "q_weight" in v else 2) * count * q.itemsize + angles, 0, count),
    )


def _names(normed: bool) -> tuple[str, ...]:
    return ("q", "k", "q_weight", "k_weight") if normed else ("q", "k")


def cases(large: bool) -> Iterator[Case]:
    sizes = (2, 32, 8, 1344, 128) if large else (2, 4, 2, 11, 64)
    tokens, dim = sizes[3:]

    def call(v: Inputs, backend: str) -> Any:
        tables = _tables(tokens, dim, True, v["q"].device)
        norms = {name: v[name] for name in ("q_weight", "k_weight") if name in v}
        return ops.v2pe_rope(v["q"], v["k"], *tables, **norms, rounding="float32", backend=backend)

    for normed in (False, True):
        yield Case(
            "v2pe_rope",
            f"fractional positions{', q/k RMSNorm' if normed else ''}, {tokens} tokens",
            lambda n, normed=normed: inputs(n, *sizes, normed),  # type: ignore[misc]
            call,
            _names(normed),
            cost=cost,
            graph=True,
        )

    def in_place(v: Inputs, backend: str) -> Any:
        q, k = v["q"].clone(), v["k"].clone()
        tables = _tables(tokens, dim, True, q.device)
        return ops.v2pe_rope_(q, k, *tables, rounding="float32", backend=backend)

    name = f"in place, {tokens} tokens"
    yield Case("v2pe_rope_", name, lambda n: inputs(n, *sizes, False), in_place, cost=cost, graph=True)

    def ids(n: Numbers) -> Inputs:
        return {"input_ids": torch.where(n.uniform(3, 50 * tokens, dtype=torch.float64) < 0.7, TOKEN, 1)}

    yield Case(
        "v2pe_position_ids",
        "delta 1/16",
        ids,
        lambda v, backend: ops.v2pe_position_ids(v["input_ids"], TOKEN, 1 / 16, check=False, backend=backend),
        cost=_positions_cost,
        graph=True,
    )


def _positions_cost(v: Inputs) -> tuple[Cost, Cost]:
    """Ids and mask, where there is one, in; positions out."""
    tokens = v["input_ids"].numel()
    return Cost(tokens * (8 + (8 if "attention_mask" in v else 0) + 4), 0, tokens), Cost(0)


def _layer(tokens: int, normed: bool, mode: str) -> Case:
    """`mode`: "in place", "new" or "backward". q and k lie as their projections leave them."""
    q_heads, kv_heads, dim = 32, 8, 128

    def make(n: Numbers) -> Inputs:
        values = {
            name: n.normal(1, tokens, heads, dim).transpose(1, 2) for name, heads in (("q", q_heads), ("k", kv_heads))
        }
        if normed:
            values |= {f"{name}_weight": n.normal(dim, scale=0.1, shift=1.0) for name in "qk"}
        return values | _angles(tokens, dim, n)

    def call(v: Inputs, backend: str) -> Any:
        function = ops.v2pe_rope_ if mode == "in place" else ops.v2pe_rope
        return function(**v, backend=backend)

    return Case("v2pe_rope", mode, make, call, _names(normed), eager, cost)


def published(ids: torch.Tensor, mask: torch.Tensor, step: float, start: int, end: int) -> torch.Tensor:
    """One row as OpenGVLab/V2PE does it: pieces between the marks of each image, then a list of numbers.

    A rendition with the same tensor operations; `start` and `end` are the ids of <img> and </img>.
    """
    opens, closes = torch.where(ids == start)[0], torch.where(ids == end)[0]
    pieces, last, begin = [], torch.tensor(-1), 0
    for i in range(len(opens)):
        here = mask[begin : opens[i] + 1]
        text = here.long().cumsum(-1) - 1 + (last + 1)
        pieces.append(text.masked_fill_(here == 0, 1))
        last = text[-1].long()
        count = int(closes[i] - opens[i] - 1)
        visual = torch.linspace(float(last), float(last) + step * count, count + 1)[1:]
        pieces.append(visual)
        last = torch.ceil(visual[-1]).long()
        begin = int(closes[i])
    here = mask[begin:]
    pieces.append((here.long().cumsum(-1) - 1 + (last + 1)).masked_fill_(here == 0, 1))
    return torch.tensor(list(torch.cat([p.to("cpu") for p in pieces]).to(torch.float32).numpy()))


def positions(rows: int, tokens: int) -> Case:
    """Rows of documents: an image of 13 tiles after every 150 tokens of text. Eager: the published loop, on the CPU."""

    def make(n: Numbers) -> Inputs:
        ids = torch.full((rows, tokens), 1, device=n.device)
        period = 150 + 2 + 13 * 256
        for begin in range(150, tokens - period, period):
            ids[:, begin] = 2
            ids[:, begin + 1 : begin + 1 + 13 * 256] = TOKEN
            ids[:, begin + 1 + 13 * 256] = 3
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "_ids": ids.cpu()}

    def call(v: Inputs, backend: str) -> torch.Tensor:
        return ops.v2pe_position_ids(v["input_ids"], TOKEN, 1 / 16, attention_mask=v["attention_mask"], backend=backend)

    def loop(v: Inputs) -> torch.Tensor:
        rows = [published(row, torch.ones_like(row), 1 / 16, 2, 3) for row in v["_ids"]]
        return torch.stack(rows).to(v["input_ids"].device)

    return Case("v2pe_position_ids", f"{tokens} x {rows}", make, call, plain=loop, cost=_positions_cost)


def timed(quick: bool) -> Iterator[Timed]:
    for dtype in (torch.float32, torch.bfloat16):
        kind = dtype_name(dtype)
        for tokens in (1344,) if quick else (1, 1344, 3400):
            for normed in (False, True):
                for mode in ("in place", "new", "backward") if tokens > 1 else ("in place", "new"):
                    yield Timed(
                        "v2pe_rope",
                        f"{'q/k norm + ' if normed else ''}rotary, {mode}, {tokens} tokens, {kind}",
                        _layer(tokens, normed, mode),
                        dtype,
                        dict(tokens=tokens, dtype=kind, norm=normed, mode=mode),
                        mode == "backward",
                        mutates=("q", "k") if mode == "in place" else (),
                        seconds=2.0,
                    )
    yield Timed(
        "v2pe_rope",
        "positions, 32k tokens x 8 rows",
        positions(8, 32768),
        torch.float32,
        dict(rows=8, tokens=32768),
        compile=False,
        exact=True,
        seconds=2.0,
    )


def _at(normed: bool, s: Shape) -> Case:
    sizes = s.model.q_heads, s.model.kv_heads, s.tokens, s.model.head_dim

    def make(n: Numbers) -> Inputs:
        values = inputs(n, 1, *sizes, False)
        if normed:  # one weight for both, as one norm
            weight = n.normal(s.model.head_dim)
            values |= {"q_weight": weight, "k_weight": weight}
        return values | _angles(s.tokens, s.model.head_dim, n)

    def call(v: Inputs, backend: str) -> Any:
        positions, frequencies = _tables(s.tokens, s.model.head_dim, False, v["q"].device)
        norms = {name: v[name] for name in ("q_weight", "k_weight") if name in v}
        return ops.v2pe_rope(v["q"], v["k"], positions[None], frequencies, **norms, backend=backend)

    gradients = ("q", "k", "q_weight") if normed else ("q", "k")
    return Case("v2pe_rope", s.name, make, call, gradients, eager, cost, peers={"liger": liger})


def _liger_rms_norm(s: Shape) -> Case:
    """Liger's RMSNorm alone over the heads of q, whose work our rotary does on the way."""

    def call(v: Inputs, backend: str) -> Any:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(v["x"], v["weight"], 1e-6, 0.0, "llama", False)

    def make(n: Numbers) -> Inputs:
        return {"x": n.normal(s.model.q_heads * s.tokens, s.model.head_dim), "weight": n.normal(s.model.head_dim)}

    def size(v: Inputs) -> tuple[Cost, Cost]:
        count, size = v["x"].numel(), v["x"].nbytes
        return Cost(2 * size, 0, count), Cost(3 * size, 0, count)

    return Case("v2pe_rope", s.name, make, call, ("x", "weight"), cost=size)


_SMALL = (
    scaled("InternVL3.5-8B", 96),
    scaled("InternVL3-1B", 77),
    scaled("InternVL3.5-GPT-OSS-20B-A4B", 70),
    scaled("InternVL3.5-8B", 3),
)
_HEADS = ("q_heads", "kv_heads", "head_dim")
SUBJECTS = {
    "v2pe_rope": Subject(functools.partial(_at, False), ("triton",), _SMALL, _HEADS, (1, 3392, 12800)),
    "v2pe_rope with norm": Subject(
        functools.partial(_at, True), ("triton",), _SMALL[:1], ("qk_norm", *_HEADS), (1, 3392, 12800)
    ),
    "liger rms_norm": Subject(_liger_rms_norm, ("liger",), _SMALL[:1], ("head_dim",), ()),
}
