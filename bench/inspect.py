"""What the compiled GPU kernels cost, without a GPU: `python -m bench.inspect` (or `make inspect`).

Two views of every kernel that an op launches, forward and backward:

* counters of the PTX simulator at scaled-down shapes (widths of a model, few tokens): bytes requested, sectors,
  distinct bytes against the least possible, instructions an element, tensor-core FLOPs, bank conflicts. The same for
  Liger-Kernel's kernels, and for transformers' eager chain the PyTorch kernels with the bytes of their shapes.
* machine code for each target at the catalogue's shapes: registers, spills, shared memory, occupancy, access widths.

And the roofline time of the op at those shapes on known GPUs. Results merge into the JSON of earlier runs, so it can be
run op by op. `--check` compares with the committed baseline.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ivl_kernels._targets import NVIDIA
from ivl_kernels._targets import TARGETS as TABLE
from ivl_kernels.testing.catalogue import MODELS, ModelShape

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "bench" / "results" / "inspect.json"

# GB/s, dense bf16 tensor-core TFLOP/s; NVIDIA's data sheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024),
# HGX B200 (2024; the sparse figure halved).
GPUS = {"A100": (2039, 312), "H100": (3350, 989), "H200": (4800, 989), "B200": (8000, 2250)}
TARGETS = (*NVIDIA, "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What a memory-bound op may move, over the least possible: distinct bytes, and sectors requested.
UNIQUE_LIMIT, SECTOR_LIMIT = 1.05, 1.15


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


def _any(model: ModelShape) -> bool:
    return True


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


def counters(job: Job, backend: str, direction: str, call: Callable[[], Any] | None = None) -> list[dict[str, Any]]:
    """One row a launch, from the simulator."""
    from tests.simulator.gpu import simulated_gpu

    with simulated_gpu(preferred=True) as log, forced(backend):
        return [_counted(report) for report in run(job, call or job.call, direction, log)]


def _counted(report: Any) -> dict[str, Any]:
    return {
        "kernel": report.kernel,
        "requested_bytes": report.global_load_bytes + report.global_store_bytes,
        "sector_bytes": 32 * (report.global_load_sectors + report.global_store_sectors),
        "unique_bytes": report.unique_load_bytes + report.unique_store_bytes,
        "instructions": report.warp_instructions,
        "thread_instructions": sum(report.thread_instructions.values()),
        "mma_flops": report.mma_flops,
        "bank_conflicts": report.bank_conflicts,
        "shared_races": report.shared_races,
    }


def totals(launches: list[dict[str, Any]], job: Job, direction: str) -> dict[str, Any]:
    """Sums over an op's launches; for each kernel launches, sectors over distinct bytes, and bank conflicts."""
    total = {key: sum(row[key] for row in launches) for key in _counted_keys}
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in launches:
        kernels.setdefault(row["kernel"], []).append(row)
    return {
        "launches": len(launches),
        **total,
        "least": job.least if direction == "forward" else job.least_backward,
        "elements": job.elements,
        "kernels": {
            name: {
                "launches": len(rows),
                "sector_bytes": sum(row["sector_bytes"] for row in rows),
                "unique_bytes": sum(row["unique_bytes"] for row in rows),
                "mma": any(row["mma_flops"] for row in rows),
            }
            for name, rows in kernels.items()
        },
    }


_counted_keys = (
    "requested_bytes", "sector_bytes", "unique_bytes", "instructions", "thread_instructions", "mma_flops",
    "bank_conflicts", "shared_races",
)  # fmt: skip


def eager_chain(job: Job, direction: str) -> list[dict[str, Any]]:
    """The kernels that PyTorch launches, each with the bytes of its distinct inputs and outputs; views are free."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from bench.runner import tensors

    rows: list[dict[str, Any]] = []
    free = ("empty", "detach", "alias", "new_empty", "_reshape_alias", "lift_fresh")

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.removeprefix("aten::")
            if not func.is_view and not name.startswith(free):
                touched = {id(t): t.numel() * t.element_size() for t in tensors([args, kwargs or {}, out])}
                rows.append({"kernel": name, "bytes": sum(touched.values())})
            return out

    assert job.eager is not None
    with Recorder():
        return run(job, job.eager, direction, rows)


def counted_rows(name: str, shape: Shape) -> list[dict[str, Any]]:
    """One row for each direction and each of ours, Liger-Kernel's and eager's ways to do it."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    job = subject.make(shape)
    whos: list[tuple[str, Callable[[], Any]]] = [(backend, job.call) for backend in subject.backends]
    whos += (job.peers or {}).items()
    rows = []
    for direction in directions(job):
        key = {"op": name, "shape": shape.name, "dtype": _dtype_name(shape.dtype), "direction": direction}
        for who, call in whos:
            rows.append({**key, "who": who, **totals(counters(job, who, direction, call), job, direction)})
        if job.eager:
            chain = eager_chain(job, direction)
            least = job.least if direction == "forward" else job.least_backward
            counts = dict(Counter(row["kernel"] for row in chain))
            requested = sum(row["bytes"] for row in chain)
            rows.append(
                {**key, "who": "eager", "launches": len(chain), "requested_bytes": requested, "least": least,
                 "kernels": counts}
            )  # fmt: skip
    return rows


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


ACCESS = re.compile(r"\b(ld|st)\.global((?:\.[A-Za-z_]\w*(?:::\w+)*)*?)(?:\.v(\d+))?\.[bfus](\d+)\b")


def access_widths(ptx: str) -> dict[str, int]:
    """How many global loads and stores of each width, in bytes, the PTX holds; cp.async counts as a load."""
    found: Counter[str] = Counter()
    for kind, _, vector, bits in ACCESS.findall(ptx):
        found[f"{kind}{int(vector or 1) * int(bits) // 8}"] += 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|[0-9]+)", ptx):
        found[f"ld{int(size, 0)}"] += 1
    return dict(sorted(found.items()))


TENSOR_CORES = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)"


def occupancy(target: int, threads: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's threads that can be resident."""
    gpu = TABLE[target]
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps) if registers else gpu.blocks
    by_shared = gpu.shared // (shared + 1024) if shared else gpu.blocks
    return min(gpu.threads // threads, by_registers, by_shared, gpu.blocks) * threads / gpu.threads


@contextlib.contextmanager
def unchecked_counts() -> Iterator[None]:
    """Nothing checks counts that kernels wrote, as none ran."""
    names = [f"ivl_kernels.ops.token_packing.{backend}.check_counts" for backend in ("cuda", "triton")]
    with mock.patch(names[0], lambda *_: None), mock.patch(names[1], lambda *_: None):
        yield


@contextlib.contextmanager
def no_products() -> Iterator[None]:
    """The vendor's products give memory that nothing wrote: only shapes matter where nothing runs."""

    def into(out: torch.Tensor) -> torch.Tensor:
        return out

    products: dict[str, Callable[..., torch.Tensor]] = {
        "mm": lambda a, b: a.new_empty(a.shape[0], b.shape[1]),
        "mm.out": lambda a, b, *, out: into(out),
        "addmm": lambda c, a, b, **_: a.new_empty(a.shape[0], b.shape[1]),
        "addmm.out": lambda c, a, b, *, out, **_: into(out),
        "bmm": lambda a, b: a.new_empty(a.shape[0], a.shape[1], b.shape[2]),
        "baddbmm": lambda c, a, b, **_: a.new_empty(a.shape[0], a.shape[1], b.shape[2]),
    }
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in products.items():
            library.impl(name, function, "CPU")
    try:
        yield
    finally:
        library._destroy()


def gpu_launches(job: Job, backend: str, target: Any, direction: str) -> list[Any]:
    """What would be launched: rows of kernels in CUDA C++, `aot.Launch` for those in Triton."""
    from ivl_kernels import _gpu
    from tests.simulator import aot

    log: list[Any] = []

    def launch(source: str, kernel: str, grid: Any, block: int, args: Any, shared: int) -> None:
        row = dict(cuda_resources(source, target)[kernel])
        row["shared"] += shared
        log.append({"kernel": kernel, "target": target, "threads": block, **row})

    amd = isinstance(target, str)
    with (
        unchecked_counts(),
        aot.compiling(target, log, make=lambda launch: launch),
        no_products(),
        _gpu.stand_in("simulator", None if amd else launch, preferred=True, capability=0 if amd else target),
        forced(backend),
    ):
        return run(job, job.call, direction, log)


_pending: list[Any] = []  # launches do not pickle: forked processes find them here


def _compile(index: int) -> dict[str, Any]:
    return _described(_pending[index].compile(), _pending[index].target)


def compile_all(launches: Sequence[Any], jobs: int) -> dict[str, dict[str, Any]]:
    """What the compiler made of each distinct launch, by its key."""
    distinct = {launch.key: launch for launch in launches}
    _pending[:] = distinct.values()
    if jobs == 1:
        return dict(zip(distinct, map(_compile, range(len(distinct)))))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        return dict(zip(distinct, pool.map(_compile, range(len(distinct)))))


def _described(entry: Any, target: Any) -> dict[str, Any]:
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry.asm)
    return {
        "kernel": entry.kernel,
        "target": target,
        "threads": int(threads.group(1)) if threads else 0,
        "registers": entry.registers,
        "spills": entry.spills,
        "shared": entry.shared,
        "tensor_core_instructions": entry.count(TENSOR_CORES),
        "widths": access_widths(entry.asm),
    }


@functools.cache
def cuda_resources(source: str, target: int) -> dict[str, dict[str, Any]]:
    """kernel -> registers, spills, static shared bytes and access widths of csrc/cuda/<source>.cu."""
    from tests.simulator.gpu import cuda_ptx
    from tests.simulator.ptxsim.frontend import resources

    ptx = cuda_ptx(source, f"sm_{target}")
    entries = {re.match(r"\w+", part)[0]: part for part in ptx.split(".entry ")[1:]}  # type: ignore[index]
    return {
        kernel: {
            "registers": used["registers"],
            "spills": used["spill_stores"] + used["spill_loads"],
            "shared": used["static_shared"],
            "tensor_core_instructions": 0,
            "widths": access_widths(entries[kernel]),
        }
        for kernel, used in resources(ptx).items()
    }


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


def machine_rows(
    name: str, shapes: Sequence[tuple[Shape, list[str]]], targets: Sequence[Any], jobs: int
) -> list[dict[str, Any]]:
    """A row for each kernel, shape, direction, backend and target; alike launches count in one."""
    subject = SUBJECTS[name]
    made: list[tuple[dict[str, Any], list[Any]]] = []
    for shape, models in shapes:
        job = subject.make(shape)
        key = {"op": name, "models": models, "tokens": shape.tokens, "dtype": _dtype_name(shape.dtype)}
        made += [
            ({**key, "direction": direction, "backend": backend}, gpu_launches(job, backend, target, direction))
            for target in targets
            for backend in subject.backends
            for direction in directions(job)
            if not (isinstance(target, str) and backend == "cuda")
        ]
    code = compile_all([one for _, launches in made for one in launches if not isinstance(one, dict)], jobs)
    rows = []
    for key, launches in made:
        found = [json.dumps(one if isinstance(one, dict) else code[one.key]) for one in launches]
        rows += [{**key, **json.loads(row), "launches": count} for row, count in Counter(found).items()]
    for row in rows:
        if row["target"] in NVIDIA and row["threads"]:
            share = occupancy(row["target"], row["threads"], row["registers"], row["shared"])
            row["occupancy"] = round(share, 3)
    return rows


def roofline_row(name: str, shape: Shape) -> dict[str, Any]:
    """Least microseconds on each GPU: bytes over bandwidth or FLOPs over the tensor cores' peak."""
    job = SUBJECTS[name].make(shape)
    times = {gpu: max(job.least / rate / 1e3, job.flops / peak / 1e6) for gpu, (rate, peak) in GPUS.items()}
    return {
        "op": name, "shape": shape.name if "tokens" in shape.name else f"{shape.name}, tokens {shape.tokens}",
        "bytes": job.least, "flops": job.flops, "microseconds": times,
    }  # fmt: skip


# What names a row of each table: rows of an earlier run with the same name are replaced.
KEYS = {
    "counters": ("op", "shape", "dtype", "direction", "who"),
    "machine": ("op", "models", "tokens", "dtype", "direction", "backend", "target"),
    "roofline": ("op", "shape"),
}
Tables = dict[str, list[dict[str, Any]]]


def merge(old: Tables, new: Tables) -> Tables:
    """The rows of both; where a name is in both, the new ones."""
    result: Tables = {}
    for table, key in KEYS.items():
        names = [str([row[k] for k in key]) for row in new.get(table, [])]
        kept = [row for row in old.get(table, []) if str([row[k] for k in key]) not in names]
        order = list(SUBJECTS)
        result[table] = sorted(
            (row for row in [*kept, *new.get(table, [])] if row["op"] in order), key=lambda row: order.index(row["op"])
        )
    return result


# Counters that must not grow by more than the margin; spills and lost tensor-core instructions never.
GUARDED = ("requested_bytes", "sector_bytes", "unique_bytes", "instructions", "bank_conflicts", "launches")


def check(new: Tables, old: Tables, margin: float) -> list[str]:
    """What got worse by more than `margin` (a share), or spills now and did not."""
    worse = []

    def pairs(table: str, extra: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        key = (*KEYS[table], *extra)
        before = {str([row[k] for k in key]): row for row in old[table]}
        for row in new.get(table, []):
            name = str([row[k] for k in key])
            if name in before:
                yield ", ".join(str(row[k]) for k in key), row, before[name]

    for name, row, was in pairs("counters"):
        if row["who"] not in ("liger", "eager"):
            for key in GUARDED:
                if row[key] > was[key] * (1 + margin) + 0.5:
                    worse.append(f"{name}: {key} {was[key]} -> {row[key]}")
    for name, row, was in pairs("machine", ("kernel",)):
        if row["spills"] > was["spills"]:
            worse.append(f"{name}: spills {was['spills']} -> {row['spills']} bytes")
        if bool(row["tensor_core_instructions"]) < bool(was["tensor_core_instructions"]):
            worse.append(f"{name}: no tensor-core instructions")
    return worse


def over_the_limits(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(op, who, limit, where) of memory-bound ops of ours that move more than they may; a least that is none."""
    found = []
    for row in rows:
        if row["who"] in ("liger", "eager"):
            continue
        unique, sectors = row["unique_bytes"] / row["least"], row["sector_bytes"] / row["least"]
        limits = [("least", 0.995 / unique, 1.0)]
        if SUBJECTS[row["op"]].memory_bound:
            limits += [("distinct", unique, UNIQUE_LIMIT), ("sectors", sectors, SECTOR_LIMIT)]
        where = f"{row['shape']}, {row['dtype']}, {row['direction']}"
        found += [(row["op"], row["who"], name, f"{where}: {got:.3f}") for name, got, limit in limits if got > limit]
    return found


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def _target_name(target: Any) -> str:
    return f"sm_{target}" if isinstance(target, int) else target


def _span(values: Sequence[float], form: str = "{:g}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def markdown(tables: Tables) -> str:
    counted = []
    for row in tables["counters"]:
        name = [row["op"], row["shape"], row["dtype"], row["direction"], row["who"], row["launches"]]
        ratios = [f"{row[key] / row['least']:.2f}" for key in ("requested_bytes", "sector_bytes", "unique_bytes")
                  if key in row]  # fmt: skip
        if row["who"] == "eager":
            counted.append([*name, *ratios, "", "", "", "", ""])
        else:
            each = f"{row['thread_instructions'] / row['elements']:.1f}"
            counted.append([*name, *ratios, each, f"{row['mma_flops']:,}", f"{row['bank_conflicts']:,}"])
    rooflines = [
        [row["op"], row["shape"], f"{row['bytes']:,}", f"{row['flops']:,}",
         *(f"{row['microseconds'][gpu]:.1f}" for gpu in GPUS)]
        for row in tables["roofline"]
    ]  # fmt: skip
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in tables["machine"]:
        name = (row["op"], row["backend"], row["kernel"], row["dtype"], _target_name(row["target"]))
        groups.setdefault(name, []).append(row)
    machine = []
    for name, rows in groups.items():
        widths = sorted({width for row in rows for width in row["widths"]}, key=lambda w: (w[:2], int(w[2:])))
        shares = [100 * row["occupancy"] for row in rows if "occupancy" in row]
        machine.append(
            [f"{name[0]} ({name[1]})", *name[2:], len(rows), _span([row["registers"] for row in rows]),
             max(row["spills"] for row in rows), _span([row["shared"] for row in rows]),
             _span(shares, "{:.0f} %") if shares else "", _span([row["tensor_core_instructions"] for row in rows]),
             " ".join(widths)]
        )  # fmt: skip
    return "\n".join(
        [
            "# What the GPU kernels cost",
            "",
            "Counters of the PTX simulator at scaled-down shapes: widths of the model named (unless said), few tokens.",
            "`least` is the bytes that the launches must move (each formula is in `bench/inspect.py`); sectors",
            "are before any cache. Eager: the kernels that PyTorch launches, bytes from their shapes.",
            "",
            *_table(
                ("op", "shape", "dtype", "direction", "who", "launches", "requested / least", "sectors / least",
                 "distinct / least", "instructions an element", "tensor-core FLOPs", "bank conflicts"), counted
            ),
            "## Roofline at the real shape (microseconds, not measured)",
            "",
            *_table(("op", "shape", "bytes", "FLOPs", *GPUS), rooflines),
            "## Machine code at the catalogue's shapes",
            "",
            "A row: all shapes and launches of a kernel, forward or backward; spills are the most of any, in bytes.",
            "",
            *_table(
                ("op", "kernel", "dtype", "target", "variants", "registers", "spills", "shared", "occupancy",
                 "tensor-core instr.", "access widths"), machine
            ),
        ]
    )  # fmt: skip


def plot(tables: Tables, path: Path) -> None:
    """Rooflines of the GPUs with the ops at their least intensity, and traffic against the least, ours and others'."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = {name: subject.small[0].name for name, subject in SUBJECTS.items()}
    bars = [row for row in tables["counters"] if row["dtype"] == "bf16" and row["shape"] == first[row["op"]]]
    height = max(1, 0.2 * len(bars))
    figure, (roof, traffic) = plt.subplots(2, 1, figsize=(11, 7 + height), height_ratios=(6, height))
    for gpu, (rate, peak) in GPUS.items():
        xs = [0.1, 1e3 * peak / rate, 1e4]
        roof.loglog(xs, [min(peak, x * rate / 1e3) for x in xs], label=gpu)
    rate, peak = GPUS["H100"]
    points: dict[tuple[float, float], list[str]] = {}
    for row in tables["roofline"]:
        if row["flops"]:
            x = row["flops"] / row["bytes"]
            points.setdefault((x, min(peak, x * rate / 1e3)), []).append(f"{row['op']}, {row['shape']}")
    for number, ((x, y), names) in enumerate(sorted(points.items()), 1):
        roof.loglog(x, y, "o", color="black", markersize=4)
        below = (0, -12 - 9 * (number % 2))
        roof.annotate(str(number), (x, y), xytext=below, textcoords="offset points", fontsize=8, ha="center")
        roof.plot([], [], " ", label=f"{number}  {'; '.join(names)}")
    roof.set_xlabel("FLOP a byte, at the least traffic")
    roof.set_ylabel("TFLOP/s bf16 (dots: ceiling on H100)")
    roof.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.01, 1.02), handlelength=1.5)
    colors = {"liger": "C1", "eager": "C3"}
    names = [f"{row['op']}, {row['direction']}: {row['who']}" for row in bars]
    values = [row["requested_bytes"] / row["least"] for row in bars]
    traffic.barh(range(len(bars)), values, color=[colors.get(row["who"], "C0") for row in bars])
    traffic.axvline(1, color="black", linewidth=1)
    traffic.set_xscale("log")
    traffic.set_yticks(range(len(bars)), names, fontsize=7)
    traffic.set_ylim(max(1, len(bars)) - 0.5, -0.5)
    traffic.set_xlim(left=0.5)
    traffic.set_xlabel("bytes requested over the least possible (bf16, the first shape of each op)")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def write(tables: Tables, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = (f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for name, rows in tables.items())
    (folder / "inspect.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    (folder / "inspect.md").write_text(markdown(tables))
    plot(tables, folder / "inspect.png")


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.inspect", description="What the compiled GPU kernels cost, without a GPU.")
    parser.add_argument("--op", action="append", default=[], help=f"first word of: {', '.join(SUBJECTS)}")
    parser.add_argument("--arch", action="append", default=[], help=f"of {', '.join(map(str, TARGETS))}; default all")
    parser.add_argument("--shape", action="append", default=[], help=" ".join((asked_shape.__doc__ or "").split()))
    parser.add_argument("--dtype", action="append", default=[], choices=list(DTYPES), help="default both")
    parser.add_argument("--only", choices=("counters", "machine"), help="one of the two views")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at work at once")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "inspect", help="folder of the reports")
    parser.add_argument("--check", action="store_true", help="exit 1 if worse than the committed baseline")
    parser.add_argument("--margin", type=float, default=0.05, help="what --check tolerates, as a share")
    parser.add_argument("--update", action="store_true", help="merge into the committed baseline instead of --out")
    args = parser.parse_args(argv)
    targets = [int(a) if a.isdigit() else a for a in args.arch] or TARGETS
    asked = [asked_shape(text) for text in args.shape]
    tables: Tables = {table: [] for table in KEYS}
    for name, subject in SUBJECTS.items():
        if args.op and name.split()[0] not in args.op:
            continue
        for dtype in args.dtype or DTYPES:
            if dtype not in subject.dtypes:
                continue
            fitting = [shape for shape in asked if all(getattr(shape.model, field) for field in subject.varies)]
            for shape in () if args.only == "machine" else fitting if asked else subject.small:
                print(f"{name}, {shape.name}, {dtype}", flush=True)
                tables["counters"] += counted_rows(name, replace(shape, dtype=DTYPES[dtype]))
            if args.only == "counters":
                continue
            print(f"{name}, {dtype}: machine code", flush=True)
            real = [(replace(shape, dtype=DTYPES[dtype]), models) for shape, models in real_shapes(name, args.shape)]
            tables["machine"] += machine_rows(name, real, targets, args.jobs)
            if dtype == "bf16":
                tables["roofline"] += [roofline_row(name, shape) for shape, _ in real]
    worse = check(tables, json.loads(BASELINE.read_text()), args.margin) if args.check else []
    folder = BASELINE.parent if args.update else args.out
    if (folder / "inspect.json").exists():
        write(merge(json.loads((folder / "inspect.json").read_text()), tables), folder)
    else:
        write(merge({}, tables), folder)
    print(markdown(tables))
    for over in over_the_limits(tables["counters"]):
        print("OVER:", *over)
    for line in worse:
        print(f"WORSE: {line}")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
