"""What is looked at: each op's call at scaled-down and real shapes, with the least bytes that it must move."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import torch

from ivl_kernels.testing.catalogue import MODELS, ModelShape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Widths of a model and how much goes through it; `real`: memory is reserved, nothing touches it."""

    name: str
    model: ModelShape
    tokens: int = 3392
    tiles: int = 13
    side: int = 32  # patches a side of a tile
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    real: bool = False

    def fill(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or self.dtype
        return torch.empty(*shape, dtype=dtype) if self.real else torch.randn(*shape).to(dtype)

    @property
    def size(self) -> int:
        return self.dtype.itemsize


@dataclass
class Job:
    """One call: the function, the least bytes that its launches must move, its FLOPs and elements, who else does it.

    leaves: inputs with gradients; empty: there is no backward of ours.
    """

    call: Callable[[], Any]
    least: int
    elements: int
    flops: int = 0
    leaves: Sequence[torch.Tensor] = ()
    least_backward: int = 0
    eager: Callable[[], Any] | None = None
    peers: dict[str, Callable[[], Any]] | None = None


def _place_rows(s: Shape) -> Job:
    from bench.bench_token_packing import TOKEN
    from ivl_kernels.ops import place_rows

    rows, width = s.tokens * 7 // 8, s.model.hidden
    ids = torch.full((1, s.tokens), TOKEN)
    ids[:, rows:] = 1
    embeds, values = s.fill(1, s.tokens, width), s.fill(rows, width)

    def eager() -> torch.Tensor:
        mask = (ids == TOKEN).unsqueeze(-1).expand_as(embeds)
        return embeds.masked_scatter(mask, values)

    least = 2 * rows * width * s.size + 8 * s.tokens
    return Job(
        lambda: place_rows(embeds.detach(), ids, values, TOKEN, inplace=True), least, rows * width, leaves=[values],
        least_backward=least, eager=eager,
    )  # fmt: skip


def _embed_text(s: Shape) -> Job:
    from bench.bench_token_packing import TOKEN
    from ivl_kernels.ops import embed_text

    ids = torch.full((1, s.tokens), TOKEN)
    text = s.tokens // 2
    ids[:, :text] = torch.arange(text)
    table = s.fill(s.tokens, s.model.hidden)
    least = 2 * text * s.model.hidden * s.size + 8 * s.tokens
    return Job(lambda: embed_text(ids, table, TOKEN), least, text * s.model.hidden)


def _pack_tokens(s: Shape) -> Job:
    from bench.bench_token_packing import TOKEN
    from ivl_kernels.ops import pack_tokens

    batch, tiles, text = s.batch, s.tiles, s.tokens - 256 * s.tiles
    ids = torch.full((batch, s.tokens), TOKEN)
    ids[:, :8] = ids[:, -(text - 8) :] = 1
    compress = torch.arange(batch * tiles) % 2 == 0
    kept = batch * text + int(torch.where(compress, 64, 256).sum())
    # Ids in, those that stay twice: where the first goes depends on the last id, and a batch does not fit on the chip.
    # Ids, mask, position ids and origin out, a byte a token for what stayed; a row for each tile.
    least = ids.numel() * (8 + 4 * 8 + 1) + 8 * kept + batch * tiles * (1 + 8)
    return Job(lambda: pack_tokens(ids, compress, TOKEN, capacity=True), least, ids.numel())


def _router(s: Shape) -> Job:
    from ivl_kernels.nn import TileRouter
    from ivl_kernels.ops.tile_router import triton as kernels

    tiles, tokens, width, heads = s.tiles, s.side**2, s.model.vision, 16
    router = TileRouter(width, heads, dtype=s.dtype).eval()
    z = s.fill(tiles, tokens + 1, width)
    # Four rounds of attention, each after the one before: z and the weights of an attention once a round, then the
    # blocks. In float32: the queries in, a partial sum from each program out and in, the pooled rows out and in.
    weights = (4 * 4 + 4 * 8) * width * width * s.size
    splits = -(-tokens // kernels.pool_config(tokens, width, tiles)["split_rows"])
    between = 4 * heads * width * 4 * tiles * (2 + 2 * splits + 2)
    least = 4 * tiles * tokens * width * s.size + weights + between

    def eager() -> Any:
        from ivl_kernels.testing.shipped import ShippedRouter

        with mock.patch("ivl_kernels.testing.shipped.checkpoint", lambda f, *rest, **_: f(*rest)):
            return ShippedRouter(width, heads).eval().to(s.dtype)(z)

    return Job(
        lambda: router(z, skip=1), least, tiles * tokens * width, 4 * 4 * tiles * tokens * width * heads,
        leaves=[z, *router.parameters()] if not s.real else [z], least_backward=least, eager=eager,
    )  # fmt: skip


def _pool(s: Shape) -> Job:
    """The pooling of one round: what the router's time goes into."""
    from ivl_kernels.ops.tile_router import triton as kernels
    from ivl_kernels.ops.tile_router.op import _Pool

    tiles, tokens, width, heads = s.tiles, s.side**2, s.model.vision, 16
    z, u = s.fill(tiles, tokens, width), s.fill(tiles, heads, width, dtype=torch.float32)
    splits = -(-tokens // kernels.pool_config(tokens, width, tiles)["split_rows"])
    parts = -(-width // kernels.scores_config(tokens, width, tiles, s.size, 80)["part_width"])
    pieces = -(-tokens // kernels.sum_config(tokens, width, tiles, s.size, 80)["split_rows"])
    # In float32 numbers for each head of a tile. Fused: z once, queries in, a program's partial sum, largest and total
    # out and in, pooled and lse out.
    least, passes = width + 2 * splits * (width + 2) + width + 1, 1
    if not kernels.fused(width, heads, s.size, 80):
        # z twice, queries in, partial scores out and in, weights out and in, lse and partial sums out.
        least, passes = width + 2 * (parts + 1) * tokens + 1 + pieces * width, 2
    # z twice, queries, gradients, lse and a mean in, both partial scores out and in, weights and slopes out, slopes in,
    # partial sums out.
    least_backward = 2 * width + 2 + (4 * parts + 3) * tokens + pieces * width
    least = passes * z.numel() * s.size + 4 * tiles * heads * least
    least_backward = 2 * z.numel() * s.size + 4 * tiles * heads * least_backward
    flops = 4 * heads * z.numel()
    return Job(lambda: _Pool.apply(z, u, ""), least, z.numel(), flops, leaves=[u, z], least_backward=least_backward)


def _moe_routing(s: Shape) -> Job:
    from ivl_kernels.ops import moe_routing

    tokens, experts, top_k = s.tokens, s.model.experts, s.model.top_k
    logits = s.fill(tokens, experts)
    gpt_oss = s.model.family == "gpt_oss"
    options: dict[str, Any] = {"scoring": "topk_then_softmax"} if gpt_oss else {"renormalize": True}

    def eager() -> Any:
        values, ids = logits.float().softmax(-1).topk(top_k, dim=-1)
        return (values / values.sum(-1, keepdim=True)).to(logits.dtype), ids

    chosen = tokens * top_k * (8 + s.size)
    return Job(
        lambda: moe_routing(logits, top_k, **options), tokens * experts * s.size + chosen, tokens * experts,
        leaves=[logits], least_backward=2 * tokens * experts * s.size + chosen, eager=eager,
    )  # fmt: skip


def _expert_ids(s: Shape) -> torch.Tensor:
    return torch.rand(s.tokens, s.model.experts).topk(s.model.top_k).indices


def _moe_dispatch(s: Shape) -> Job:
    from ivl_kernels.ops import moe_dispatch
    from ivl_kernels.ops.moe_experts.op import tile_rows
    from ivl_kernels.ops.moe_routing.cuda import SLOTS

    ids, experts = _expert_ids(s), s.model.experts
    slots = ids.numel()
    tile = tile_rows(slots, experts)
    # Above what one block holds, ids are read twice: the first row of an expert depends on all of them.
    reads = 1 if slots <= SLOTS else 2
    least = slots * (8 * reads + 2 * 4) + 4 * (2 * experts + 1) + 8 * (slots // tile + experts)
    return Job(lambda: moe_dispatch(ids, experts, tile=tile), least, slots)


def _moe_experts(s: Shape) -> Job:
    from ivl_kernels.ops import moe_experts

    tokens, width, inner = s.tokens, s.model.hidden, s.model.intermediate
    experts, top_k, gpt_oss = s.model.experts, s.model.top_k, s.model.family == "gpt_oss"
    ids = _expert_ids(s)
    hidden, weights = s.fill(tokens, width), s.fill(tokens, top_k)
    sizes = [(width, 2 * inner), (inner, width)] if gpt_oss else [(2 * inner, width), (width, inner)]
    gate_up, down = (s.fill(experts, *size) for size in sizes)
    biases = [s.fill(experts, 2 * inner), s.fill(experts, width)] if gpt_oss else []
    options: dict[str, Any] = {}
    if gpt_oss:
        options = dict(zip(("gate_up_bias", "down_bias"), biases), activation="gpt_oss", layout="interleaved")
    slots, used = tokens * top_k, ids.unique().numel()
    matrices = 3 * inner * width
    # `act` [slots, I] and a row [slots, H] for the gather-sum go out and in; ids, their dispatch and weights.
    small = slots * (8 + 4 * 4 + s.size)
    least = s.size * (used * matrices + 2 * slots * (inner + width) + 2 * tokens * width) + small
    # Gradient of pre out and in twice, its input and the weighted activation; both weight gradients; rows as before.
    least_backward = small + s.size * (
        (used + experts) * matrices + slots * (2 * inner * 4 + 2 * inner + 2 * width) + 4 * tokens * width
    )

    def eager() -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for e in range(experts):
            token, slot = torch.where(ids == e)
            gate, up = torch.nn.functional.linear(hidden[token], gate_up[e]).chunk(2, dim=-1)
            y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[e])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out

    def liger() -> torch.Tensor:
        os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"  # its own single configuration
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        return LigerFusedMoEFunction.apply(hidden, gate_up, down, ids.int(), weights)

    return Job(
        lambda: moe_experts(hidden, ids, weights, gate_up, down, **options), least, slots * width, 2 * slots * matrices,
        leaves=[hidden, weights, gate_up, down, *biases], least_backward=least_backward,
        eager=None if gpt_oss else eager, peers=None if gpt_oss else {"liger": liger},
    )  # fmt: skip


def _rope(norm: bool, s: Shape) -> Job:
    from ivl_kernels.ops import v2pe_rope

    q_heads, kv_heads, dim = s.model.q_heads, s.model.kv_heads, s.model.head_dim
    q, k = s.fill(1, q_heads, s.tokens, dim), s.fill(1, kv_heads, s.tokens, dim)
    w = s.fill(dim)
    inv_freq = 1e6 ** (-torch.arange(0, dim, 2) / dim)
    positions = torch.arange(s.tokens, dtype=torch.float32)[None]
    angles = torch.outer(positions[0], inv_freq).repeat(1, 2)[None]
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

    def rms(x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]

    def eager() -> Any:
        x, y = (rms(q), rms(k)) if norm else (q, k)
        return rotate(x), rotate(y)

    def liger() -> Any:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction

        x, y = q, k
        if norm:
            x, y = (LigerRMSNormFunction.apply(t, w, 1e-6, 0.0, "llama", False) for t in (q, k))
        return LigerRopeFunction.apply(x.clone(), y.clone(), cos, sin)

    weights = {"q_weight": w, "k_weight": w} if norm else {}
    count, angle_bytes = (q_heads + kv_heads) * s.tokens * dim, 4 * (s.tokens + dim // 2)
    return Job(
        lambda: v2pe_rope(q, k, positions, inv_freq, **weights), 2 * count * s.size + angle_bytes, count,
        leaves=[q, k, *([w] if norm else [])], least_backward=(3 if norm else 2) * count * s.size + angle_bytes,
        eager=eager, peers={"liger": liger},
    )  # fmt: skip


def _projector(merge: int, s: Shape) -> Job:
    from ivl_kernels.ops import pixel_shuffle_mlp
    from ivl_kernels.ops.pixel_shuffle_mlp import triton as kernels

    tiles, side, vision = s.tiles, s.side, s.model.vision
    widths = s.model.projector(merge)
    x = s.fill(tiles, side * side + 1, vision)
    norm, bias = s.fill(widths[0]), s.fill(widths[0])
    weights = [s.fill(o, i) for i, o in zip(widths, widths[1:])]
    biases = [s.fill(o) for o in widths[1:]]
    cells = (side // merge) ** 2
    rows = tiles * cells
    out, starts = s.fill(rows, widths[-1]), torch.arange(tiles) * cells
    products = sum(i * o for i, o in zip(widths, widths[1:]))
    hidden = sum(widths[1:-1])
    # The tokens twice: a row's statistics need all of it before its first product. Then weights once, hidden rows out
    # and in, rows out into the embeddings.
    least = s.size * (rows * (2 * widths[0] + 2 * hidden + widths[-1]) + products + 2 * widths[0] + sum(widths[1:]))
    # Our passes between the vendor's products. GELU: pre and gradient in, gradient and activation out. Rows again: x
    # in, rows out. LayerNorm: x and gradient in, gradient out, then both in again for its parameters, sums over rows.
    # The parameters in, and for sums over rows a partial one in float32 from each slab.
    slabs = -(-rows // kernels.slab_config(rows, 1)[0]["SLAB"])
    least_backward = s.size * (rows * (4 * hidden + 7 * widths[0]) + 3 * widths[0])
    least_backward += 4 * slabs * (2 * widths[0] + hidden) + 4 * 2 * 3 * rows

    def eager() -> torch.Tensor:
        y = x[:, 1:].reshape(tiles, side, side // merge, vision * merge).permute(0, 2, 1, 3).contiguous()
        y = y.view(tiles, side // merge, side // merge, -1).permute(0, 2, 1, 3).contiguous().flatten(0, 2)
        y = torch.nn.functional.layer_norm(y, y.shape[-1:], norm, bias)
        for i, (w, b) in enumerate(zip(weights, biases)):
            y = torch.nn.functional.linear(torch.nn.functional.gelu(y) if i else y, w, b)
        return y

    def call() -> torch.Tensor:
        into = {"out": out.detach(), "out_rows": starts}
        return pixel_shuffle_mlp(x, norm, bias, weights, biases, merge=merge, skip=1, **into)

    return Job(
        call, least, rows * widths[-1], 2 * rows * products, leaves=[x, norm, bias, *weights, *biases],
        least_backward=least_backward, eager=eager,
    )  # fmt: skip


def _liger_swiglu(s: Shape) -> Job:
    """Liger's SwiGLU alone, whose work our experts do in the epilogue of the first product."""
    gate, up = (s.fill(s.tokens * s.model.top_k, s.model.intermediate) for _ in range(2))

    def liger() -> Any:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)

    def eager() -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up

    size = gate.numel() * s.size
    return Job(liger, 3 * size, gate.numel(), leaves=[gate, up], least_backward=5 * size, eager=eager)


def _liger_rms_norm(s: Shape) -> Job:
    """Liger's RMSNorm alone over the heads of q, whose work our rotary does on the way."""
    x, w = s.fill(s.model.q_heads * s.tokens, s.model.head_dim), s.fill(s.model.head_dim)

    def liger() -> Any:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)

    size = x.numel() * s.size
    return Job(liger, 2 * size, x.numel(), leaves=[x, w], least_backward=3 * size)


def _scaled(model: str, tokens: int = 48, widths: dict[str, int] | None = None, **more: Any) -> Shape:
    """A few tokens through the model; `widths` replaces sizes of the model."""
    changes = widths or {}
    name = ", ".join([model, *(f"{k} {v}" for k, v in ({"tokens": tokens} | more | changes).items())])
    return Shape(name, replace(MODELS[model], **changes), tokens, **more)


A1, A8, A38 = "InternVL3-1B", "InternVL3.5-8B", "InternVL3.5-38B"
MOE, OSS = "InternVL3.5-30B-A3B", "InternVL3.5-GPT-OSS-20B-A4B"
_ROPE = (_scaled(A8, 96), _scaled(A1, 77), _scaled(OSS, 70), _scaled(A8, 3))
_ROWS = (_scaled(A8, 64), _scaled(A1, 61), _scaled(OSS, 40))
_NARROW = dict(hidden=256)
_PROJECTED = (
    _scaled(A8, widths=_NARROW, tiles=2, side=16), _scaled(A38, widths=_NARROW, tiles=3, side=4),
    _scaled(A1, widths=dict(hidden=200), tiles=3, side=8),
)  # fmt: skip
_SMALL_EXPERTS = dict(hidden=256, intermediate=128, experts=16, top_k=4)
_EXPERTS = (
    _scaled(MOE, 64, _SMALL_EXPERTS), _scaled(MOE, 512, _SMALL_EXPERTS),
    _scaled(OSS, 61, dict(hidden=200, intermediate=104, experts=6)),
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """An op, or a way to call it.

    small: the simulated shapes. varies: what of a model its machine code depends on; models that agree share a row, and
    those where one of them is 0 are left out. tokens: at the real shapes. memory_bound: the limits apply.
    """

    make: Callable[[Shape], Job]
    backends: tuple[str, ...]
    small: tuple[Shape, ...]
    varies: tuple[str, ...]
    tokens: tuple[int, ...] = (3392,)
    memory_bound: bool = True
    dtypes: tuple[str, ...] = ("bf16", "fp32")


# The name's first word is the op. Integer ops have no dtype: they are counted once, as bf16.
SUBJECTS: dict[str, Subject] = {
    "pixel_shuffle_mlp 1/4": Subject(
        functools.partial(_projector, 2), ("triton",), _PROJECTED, ("vision", "hidden"), memory_bound=False
    ),
    "pixel_shuffle_mlp 1/16": Subject(
        functools.partial(_projector, 4), ("triton",), _PROJECTED, ("vision", "hidden"), memory_bound=False
    ),
    "tile_router": Subject(
        _router, ("triton",),
        (_scaled(A8, widths=dict(vision=256), tiles=2, side=16), _scaled(A8, widths=dict(vision=272), tiles=1, side=8)),
        ("flash", "vision"), memory_bound=False,
    ),
    "tile_router pooling": Subject(
        _pool, ("triton",), (_scaled(A8, tiles=2, side=16), _scaled(A38, tiles=1, side=12)), ("flash", "vision")
    ),
    "pack_tokens": Subject(
        _pack_tokens, ("cuda",), (_scaled(A8, 1600, tiles=6), _scaled(A8, 572, tiles=2, batch=3)), (), (3392, 12800),
        dtypes=("bf16",),
    ),
    "place_rows": Subject(_place_rows, ("cuda", "triton"), _ROWS, ("hidden",)),
    "embed_text": Subject(_embed_text, ("cuda",), _ROWS, ("hidden",)),
    "v2pe_rope": Subject(
        functools.partial(_rope, False), ("triton",), _ROPE, ("q_heads", "kv_heads", "head_dim"), (1, 3392, 12800)
    ),
    "v2pe_rope with norm": Subject(
        functools.partial(_rope, True), ("triton",), _ROPE[:1], ("qk_norm", "q_heads", "kv_heads", "head_dim"),
        (1, 3392, 12800),
    ),
    "moe_routing": Subject(
        _moe_routing, ("cuda", "triton"), (_scaled(MOE, 64), _scaled(OSS, 37)), ("experts", "top_k")
    ),
    "moe_dispatch": Subject(
        _moe_dispatch, ("cuda", "triton"), (_scaled(MOE, 512), _scaled(OSS, 37), _scaled(MOE, 1030)),
        ("experts", "top_k"), (64, 3392), dtypes=("bf16",),
    ),
    "moe_experts": Subject(
        _moe_experts, ("ours",), _EXPERTS, ("experts", "hidden", "intermediate", "top_k"), (1, 64, 1024, 4096),
        memory_bound=False,
    ),
    "liger swiglu": Subject(_liger_swiglu, ("liger",), _EXPERTS[:2], ("experts",), ()),
    "liger rms_norm": Subject(_liger_rms_norm, ("liger",), _ROPE[:1], ("head_dim",), ()),
}  # fmt: skip


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """`backend` for the ops that have it, else the best GPU backend; "ours": the best for each."""
    from ivl_kernels import _dispatch

    choose = _dispatch.choose

    def prefer(op: str, implementations: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        ranked = sorted(implementations, key=lambda i: i.backend != backend)
        return choose(op, ranked, *args, **kwargs)

    with mock.patch.object(_dispatch, "choose", prefer):
        yield


def run(job: Job, call: Callable[[], Any], direction: str, log: list[Any]) -> list[Any]:
    """Calls forward, and backward when asked; the entries of `log` that the direction made."""
    from bench.runner import tensors

    if direction == "forward":
        with torch.no_grad():
            call()
        return log
    for leaf in job.leaves:
        leaf.requires_grad_()
    outs = [t for t in tensors([call()]) if t.requires_grad]
    begin = len(log)
    torch.autograd.grad(outs, list(job.leaves), [torch.ones_like(t) for t in outs], allow_unused=True)
    for leaf in job.leaves:
        leaf.requires_grad_(False)
    return log[begin:]


def directions(job: Job) -> tuple[str, ...]:
    return ("forward", "backward") if job.leaves else ("forward",)


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def real_shapes(name: str, asked: Sequence[str]) -> Iterator[tuple[Shape, list[str]]]:
    """Shapes at which the machine code can differ, each with the models that share it; sizes asked for as they are."""
    subject = SUBJECTS[name]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for text in asked or MODELS:
        shape = asked_shape(text)
        sizes = tuple(getattr(shape.model, field) for field in subject.varies)
        if not all(sizes):
            continue
        if "=" in text:
            yield replace(shape, real=True), [shape.name]
        else:
            groups.setdefault(sizes, []).append(text)
    for sharing in groups.values():
        for tokens in subject.tokens:
            batch = 8 if name == "pack_tokens" else 1
            yield Shape(sharing[0], MODELS[sharing[0]], tokens, batch=batch, real=True), sharing


def asked_shape(text: str) -> Shape:
    """A model's name, or `model,tokens=64,tiles=2,hidden=256,...`: sizes of `Shape` and `ModelShape` replaced."""
    model, *pairs = text.split(",")
    if model not in MODELS:
        raise SystemExit(f"--shape: got '{model}', expected one of {', '.join(MODELS)}")
    sizes = {key.strip(): int(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    own = {field.name for field in fields(Shape)}
    more = {key: value for key, value in sizes.items() if key in own and key != "tokens"}
    widths = {key: value for key, value in sizes.items() if key not in own}
    return _scaled(model, sizes.get("tokens", 48), widths, **more)
