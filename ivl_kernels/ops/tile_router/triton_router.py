"""The whole router in few launches: what lies between two poolings is one cooperative launch, with barriers inside.

A stage's work is dealt out to programs that all run at once, at most one to a multiprocessor; the next stage starts
when all have arrived. Sums and intermediates are float32 in memory that the L2 cache holds.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gpu import capability
from ..._triton import Kernel, cdiv, next_power_of_2
from .op import Route, Routed
from .triton import combine, fused, pool_parts, pool_unfused
from .triton_linear import linear_tile, precision, rows_last, transposed_tile

PARTS = 4  # along the width, of products with few outputs


@triton.jit
def _barrier(counter, arrivals):
    """All programs have come here, and what they wrote is seen; `arrivals` programs of this and earlier barriers."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _linear(
    x, w, bias, out, rows, each, width, stride, outputs, scale, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    GELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [SPLITS, rows, outputs] as by `tile_router_linear_kernel`."""
    blocks, columns = tl.cdiv(rows, BM), tl.cdiv(each, BN)
    split_width = tl.cdiv(tl.cdiv(width, SPLITS), BK) * BK
    for item in range(tl.program_id(0), outputs // each * columns * SPLITS * blocks, tl.num_programs(0)):
        rest = item // blocks
        split, column = rest % SPLITS, rest // SPLITS
        linear_tile(
            x, w, bias, out, column // columns, column % columns, split, item % blocks * BM, rows, each, width,
            stride, outputs, split_width, scale, BM, BN, BK, PRECISION, PARTS, GELU,
        )  # fmt: skip


@triton.jit
def _normalised(s, c, inside, weight, bias, width, eps):
    s = tl.where(inside, s - tl.sum(s, 0) / width, 0.0)
    n = s * (1.0 / tl.sqrt_rn(tl.sum(s * s, 0) / width + eps))
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    return n * w + tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm(
    x, residual, weight, bias, y, rows, width, eps, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y [rows, width] = LayerNorm of x [SPLITS, rows, width] summed, plus the residual; a program has whole rows."""
    c = tl.arange(0, BLOCK)
    inside = c < width
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        place = row * width + c
        s = tl.load(x + place, mask=inside, other=0.0)
        for i in tl.static_range(1, SPLITS):
            s += tl.load(x + i * rows * width + place, mask=inside, other=0.0)
        n = _normalised(s, c, inside, weight, bias, width, eps)
        if residual is not None:
            n += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + place, n, mask=inside)


@Kernel
@triton.jit(do_not_specialize=["slot", "tiles", "splits"])
def tile_router_attend_kernel(
    sums, largest, denominator, pooled, value, attended, y, query, u,
    in_weight, in_bias, out_weight, out_bias, norm_weight, norm_bias, next_weight, next_bias,
    counters, slot, tiles, splits, width, each, eps, scale,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From a pooling to the queries of the next: y = LayerNorm(W_o W_v pooled), u = W_k^T W_q y.

    largest None: the sums are the pooled rows. sums None: y is given. next_weight None: no further attention.
    """
    programs = tl.num_programs(0)
    counter = counters + slot
    arrivals = programs
    if sums is not None:
        rows = pooled
        if largest is None:
            rows = sums
        else:
            for item in range(tl.program_id(0), tiles * HEADS, programs):
                t = (item // HEADS).to(tl.int64)
                combine(sums, largest, denominator, pooled, None, t, item % HEADS, splits, width, HEADS, SPLITS, 256)
            _barrier(counter, arrivals)
            arrivals += programs
        w_v = in_weight + 2 * width * width
        _linear(
            rows, w_v, in_bias + 2 * width, value, tiles, each, width, width, width, None, PARTS, 1, False,
            BM, BN, BK, PRECISION,
        )  # fmt: skip
        _barrier(counter, arrivals)
        arrivals += programs
        _linear(
            value, out_weight, out_bias, attended, tiles, width, width, width, width, None, PARTS, PARTS, False,
            BM, BN, BK, PRECISION,
        )  # fmt: skip
        _barrier(counter, arrivals)
        arrivals += programs
        _norm(attended, None, norm_weight, norm_bias, y, tiles, width, eps, PARTS, BLOCK)
        if next_weight is not None:
            _barrier(counter, arrivals)
            arrivals += programs
    if next_weight is not None:
        _linear(
            y, next_weight, next_bias, query, tiles, width, width, width, width, scale, PARTS, 1, False,
            BM, BN, BK, PRECISION,
        )  # fmt: skip
        _barrier(counter, arrivals)
        blocks, columns = tl.cdiv(tiles, BM), tl.cdiv(width, 64)
        w_k = next_weight + width * width
        for item in range(tl.program_id(0), HEADS * columns * blocks, programs):
            rest = item // blocks
            transposed_tile(
                query, w_k, u, rest // columns, rest % columns, item % blocks * BM, tiles, each, width,
                width, HEADS, BM, 64, BD, PRECISION, PARTS,
            )  # fmt: skip


@triton.jit
def _block(
    y, inner, outer, weight_in, bias_in, weight_out, bias_out, norm_weight, norm_bias, counter, arrivals,
    tiles, width, inner_width, eps, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y += LayerNorm(W_out GELU(W_in y)), with contiguous weights; y is complete when all programs are done."""
    programs = tl.num_programs(0)
    _linear(
        y, weight_in, bias_in, inner, tiles, inner_width, width, width, inner_width, None, 1, 1, True,
        BM, BN, BK, PRECISION,
    )  # fmt: skip
    _barrier(counter, arrivals)
    _linear(
        inner, weight_out, bias_out, outer, tiles, width, inner_width, inner_width, width, None, PARTS, 1, False,
        BM, BN, BK, PRECISION,
    )  # fmt: skip
    _barrier(counter, arrivals + programs)
    _norm(outer, y, norm_weight, norm_bias, y, tiles, width, eps, PARTS, BLOCK)


@Kernel
@triton.jit(do_not_specialize=["slot", "tiles"])
def tile_router_gate_kernel(
    y, inner, outer, logits, probabilities,
    weight_in0, bias_in0, weight_out0, bias_out0, norm_weight0, norm_bias0,
    weight_in1, bias_in1, weight_out1, bias_out1, norm_weight1, norm_bias1,
    weight_in2, bias_in2, weight_out2, bias_out2, norm_weight2, norm_bias2,
    weight_in3, bias_in3, weight_out3, bias_out3, norm_weight3, norm_bias3,
    norm_weight, norm_bias, weight, bias,
    counters, slot, tiles, width, inner_width0, inner_width1, inner_width2, inner_width3, eps,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to four blocks on y [tiles, width], and the gate when weight is not None; programs weights are contiguous."""
    programs = tl.num_programs(0)
    counter = counters + slot
    arrivals = programs
    if weight_in0 is not None:
        _block(
            y, inner, outer, weight_in0, bias_in0, weight_out0, bias_out0, norm_weight0, norm_bias0, counter, arrivals,
            tiles, width, inner_width0, eps, BLOCK, BM, BN, BK, PARTS, PRECISION,
        )  # fmt: skip
    if weight_in1 is not None:
        _barrier(counter, arrivals + 2 * programs)
        arrivals += 3 * programs
        _block(
            y, inner, outer, weight_in1, bias_in1, weight_out1, bias_out1, norm_weight1, norm_bias1, counter, arrivals,
            tiles, width, inner_width1, eps, BLOCK, BM, BN, BK, PARTS, PRECISION,
        )  # fmt: skip
    if weight_in2 is not None:
        _barrier(counter, arrivals + 2 * programs)
        arrivals += 3 * programs
        _block(
            y, inner, outer, weight_in2, bias_in2, weight_out2, bias_out2, norm_weight2, norm_bias2, counter, arrivals,
            tiles, width, inner_width2, eps, BLOCK, BM, BN, BK, PARTS, PRECISION,
        )  # fmt: skip
    if weight_in3 is not None:
        _barrier(counter, arrivals + 2 * programs)
        arrivals += 3 * programs
        _block(
            y, inner, outer, weight_in3, bias_in3, weight_out3, bias_out3, norm_weight3, norm_bias3, counter, arrivals,
            tiles, width, inner_width3, eps, BLOCK, BM, BN, BK, PARTS, PRECISION,
        )  # fmt: skip
    if weight is not None:
        tl.debug_barrier()  # a row of y is read by the program that wrote it
        c = tl.arange(0, BLOCK)
        inside = c < width
        w0 = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        w1 = tl.load(weight + width + c, mask=inside, other=0.0).to(tl.float32)
        for row in range(tl.program_id(0).to(tl.int64), tiles, programs):
            s = tl.load(y + row * width + c, mask=inside, other=0.0)
            n = _normalised(s, c, inside, norm_weight, norm_bias, width, eps)
            first = tl.sum(n * w0, 0) + tl.load(bias).to(tl.float32)
            second = tl.sum(n * w1, 0) + tl.load(bias + 1).to(tl.float32)
            tl.store(logits + 2 * row, first)
            tl.store(logits + 2 * row + 1, second)
            most = tl.maximum(first, second)
            first, second = tl.exp(first - most), tl.exp(second - most)
            tl.store(probabilities + 2 * row, first / (first + second))
            tl.store(probabilities + 2 * row + 1, second / (first + second))


@functools.cache
def _programs(device: torch.device) -> int:
    """As many programs as surely run at once."""
    if device.type != "cuda":
        return 8
    return min(128, torch.cuda.get_device_properties(device).multi_processor_count)


def config(width: int, each: int) -> dict[str, Any]:
    return {
        "BLOCK": max(1024, next_power_of_2(width)),  # so that no warp has what another has
        "BM": 16,
        "BN": 32 if each >= 32 else 16,
        "BK": min(64, max(16, next_power_of_2(width))),
        "PARTS": PARTS if width >= 64 * PARTS else 1,
        "num_warps": 8,
        "num_stages": 3,
    }


def tile_router(a: Route) -> Routed:
    z, heads, eps = rows_last(a.z), a.heads, a.eps
    tiles, _, width = z.shape
    probabilities, logits = z.new_empty(tiles, 2), z.new_empty(tiles, 2, dtype=torch.float32)
    if tiles == 0:
        return Routed(probabilities, logits)
    each = width // heads
    first, second, *blocks = (_contiguous(a.parameters[i : i + 6]) for i in range(0, len(a.parameters) - 4, 6))
    gate = _contiguous(a.parameters[-4:])
    inner_widths = [block[0].shape[0] for block in blocks]
    options = config(width, each)
    options.update(PRECISION=precision(z.dtype), enable_fp_fusion=True, launch_cooperative_grid=True)
    grid = (_programs(z.device),)
    parts = options["PARTS"]
    query = a.query.contiguous()
    attends = dict(HEADS=heads, BD=min(128 // z.element_size(), max(16, next_power_of_2(each))))
    launches = 5 + max(1, cdiv(len(blocks), 4))
    counters = torch.zeros(launches, dtype=torch.int32, device=z.device)
    empty = logits.new_empty
    y, value, attended, q = empty(tiles, width), *(empty(parts, tiles, width) for _ in range(3))
    u, pooled = empty(tiles, heads, width), empty(tiles, heads, width)

    def attend(
        slot: int, pooling: Any, rows: int, y: Tensor, u: Tensor, attention: list[Tensor], following: list[Tensor]
    ) -> None:
        sums, largest, denominator = pooling
        splits = 1 if largest is None else largest.shape[1]
        tile_router_attend_kernel[grid](
            sums, largest, denominator, pooled, value, attended, y, q, u, *(attention or (None,) * 6),
            *(following[:2] or (None, None)), counters, slot, rows, splits, width, each, eps, 1 / math.sqrt(each),
            SPLITS=next_power_of_2(splits), **attends, **options,
        )  # fmt: skip

    shared = empty(1, heads, width)
    attend(0, (None, None, None), 1, query, shared, [], first)
    queries = shared.expand(tiles, -1, -1)
    lse = empty(tiles, heads)
    together = fused(width, heads, z.element_size(), capability(z))
    for slot, (attention, following) in enumerate(((first, second), (second, second), (second, second), (second, []))):
        pooling = pool_parts(z, queries) if together else (pool_unfused(z, queries, lse), None, None)
        attend(1 + slot, pooling, tiles, y, u, attention, following)
        queries = u
    inner, outer = empty(tiles, max(inner_widths, default=1)), attended
    for slot in range(5, launches):
        here = slice(4 * (slot - 5), 4 * (slot - 4))
        some, widths = blocks[here], inner_widths[here]
        missing = 4 - len(some)
        tile_router_gate_kernel[grid](
            y, inner, outer, logits, probabilities, *(t for block in some for t in block), *(None,) * (6 * missing),
            *(gate if slot == launches - 1 else (None,) * 4), counters, slot, tiles, width, *widths, *(0,) * missing,
            eps, **options,
        )  # fmt: skip
    return Routed(probabilities, logits)


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]
