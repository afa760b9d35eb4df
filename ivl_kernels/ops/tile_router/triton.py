"""The tile router in Triton: kernels and launches.

Every product is a `tl.dot` of float32 operands with the 16 heads (or at least 16 tiles) as one side. TF32 holds
bfloat16 and float16 exactly, so for these only the queries, softmax weights and activations are rounded, to 11 bits;
float32 inputs take three TF32 products, even where torch may take one: the choice of tiles must not depend on that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gpu import capability
from ..._targets import limits
from ..._triton import Kernel, cdiv, next_power_of_2
from .op import Pool, PoolBackward, Pooled, PoolGradients
from .triton_linear import few_rows_linear, few_rows_linear_transposed, precision, rows_last

__all__ = ["few_rows_linear", "few_rows_linear_transposed", "tile_pool", "tile_pool_backward"]

HEADS = 16  # least size of a side of tl.dot
CHUNK = 256  # channels a fused program holds in one register tensor


@triton.jit
def _load_rows(base, rows, n_mask, row_stride, first, width, CHUNK: tl.constexpr):
    c = first + tl.arange(0, CHUNK)
    offsets = rows[:, None].to(tl.int64) * row_stride + c[None, :]
    return tl.load(base + offsets, mask=n_mask[:, None] & (c[None, :] < width), other=0.0)


@triton.jit
def _load_queries(base, heads, first, width, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    h = tl.arange(0, HEADS)
    c = first + tl.arange(0, CHUNK)
    return tl.load(base + h[:, None] * width + c[None, :], mask=(h[:, None] < heads) & (c[None, :] < width), other=0.0)


@triton.jit
def _score(scores, u, z, PRECISION: tl.constexpr):
    return tl.dot(u, tl.trans(z.to(tl.float32)), scores, input_precision=PRECISION)


@triton.jit
def _hold_queries(base, heads, first, width, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """For a loop over rows, kept in shared memory: loaded in fours, in a layout that is not that of the rows."""
    h = tl.arange(0, HEADS)[:, None, None]
    c = first + 4 * tl.arange(0, CHUNK // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    return tl.reshape(tl.load(base + h * width + c, mask=(h < heads) & (c < width), other=0.0), HEADS, CHUNK)


@triton.jit
def _split_score(
    scores, u, z, SPLIT: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scores [SPLIT, HEADS, ROWS]: each warp has its own channels, so that none of the queries is read by two."""
    u = tl.permute(tl.reshape(u, HEADS, SPLIT, CHUNK // SPLIT), (1, 0, 2))
    z = tl.permute(tl.reshape(z.to(tl.float32), ROWS, SPLIT, CHUNK // SPLIT), (1, 2, 0))
    return tl.dot(u, z, scores, input_precision=PRECISION)


@triton.jit
def _store_sums(base, sums, heads, first, width, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    h = tl.arange(0, HEADS)
    c = first + tl.arange(0, CHUNK)
    tl.store(base + h[:, None] * width + c[None, :], sums, mask=(h[:, None] < heads) & (c[None, :] < width))


@Kernel
@triton.jit
def tile_router_pool_kernel(
    z, u, sums, largest, denominator, rows, width, tile_stride, row_stride, query_stride, heads, split_rows,
    BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows [split * split_rows, ...) of one tile: every element of z is loaded once and used for scores and sums."""
    split, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    z += t * tile_stride
    u += t * query_stride
    part = t * tl.num_programs(0) + split
    first = split * split_rows
    last = tl.minimum(first + split_rows, rows)
    top = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums0 = tl.zeros((HEADS, CHUNK), tl.float32)
    u0 = _hold_queries(u, heads, 0, width, HEADS, CHUNK)
    if CHUNKS > 1:
        sums1 = tl.zeros((HEADS, CHUNK), tl.float32)
        u1 = _hold_queries(u, heads, CHUNK, width, HEADS, CHUNK)
    if CHUNKS > 2:
        sums2 = tl.zeros((HEADS, CHUNK), tl.float32)
        u2 = _hold_queries(u, heads, 2 * CHUNK, width, HEADS, CHUNK)
    if CHUNKS > 3:
        sums3 = tl.zeros((HEADS, CHUNK), tl.float32)
        u3 = _hold_queries(u, heads, 3 * CHUNK, width, HEADS, CHUNK)
    for n0 in range(first, last, BN):
        n = n0 + tl.arange(0, BN)
        inside = n < last
        parts = tl.zeros((SPLIT, HEADS, BN), tl.float32)
        z0 = _load_rows(z, n, inside, row_stride, 0, width, CHUNK)
        if CHUNKS > 1:
            z1 = _load_rows(z, n, inside, row_stride, CHUNK, width, CHUNK)
        if CHUNKS > 2:
            z2 = _load_rows(z, n, inside, row_stride, 2 * CHUNK, width, CHUNK)
        if CHUNKS > 3:
            z3 = _load_rows(z, n, inside, row_stride, 3 * CHUNK, width, CHUNK)
        parts = _split_score(parts, u0, z0, SPLIT, HEADS, BN, CHUNK, PRECISION)
        if CHUNKS > 1:
            parts = _split_score(parts, u1, z1, SPLIT, HEADS, BN, CHUNK, PRECISION)
        if CHUNKS > 2:
            parts = _split_score(parts, u2, z2, SPLIT, HEADS, BN, CHUNK, PRECISION)
        if CHUNKS > 3:
            parts = _split_score(parts, u3, z3, SPLIT, HEADS, BN, CHUNK, PRECISION)
        scores = tl.where(inside[None, :], tl.sum(parts, 0), -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - new_top)
        weight = tl.exp(scores - new_top[:, None])
        top = new_top
        total = total * shrink + tl.sum(weight, 1)
        sums0 = tl.dot(weight, z0.to(tl.float32), sums0 * shrink[:, None], input_precision=PRECISION)
        if CHUNKS > 1:
            sums1 = tl.dot(weight, z1.to(tl.float32), sums1 * shrink[:, None], input_precision=PRECISION)
        if CHUNKS > 2:
            sums2 = tl.dot(weight, z2.to(tl.float32), sums2 * shrink[:, None], input_precision=PRECISION)
        if CHUNKS > 3:
            sums3 = tl.dot(weight, z3.to(tl.float32), sums3 * shrink[:, None], input_precision=PRECISION)
    sums += part * heads * width
    _store_sums(sums, sums0, heads, 0, width, HEADS, CHUNK)
    if CHUNKS > 1:
        _store_sums(sums, sums1, heads, CHUNK, width, HEADS, CHUNK)
    if CHUNKS > 2:
        _store_sums(sums, sums2, heads, 2 * CHUNK, width, HEADS, CHUNK)
    if CHUNKS > 3:
        _store_sums(sums, sums3, heads, 3 * CHUNK, width, HEADS, CHUNK)
    h = tl.arange(0, HEADS)
    tl.store(largest + part * heads + h, top, mask=h < heads)
    tl.store(denominator + part * heads + h, total, mask=h < heads)


@triton.jit
def combine(
    sums, largest, denominator, pooled, lse, t, h, splits, width, heads, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One head of one tile: the splits' sums, rescaled to their common maximum and divided."""
    s = tl.arange(0, SPLITS)
    place = (t * splits + s) * heads + h
    top = tl.load(largest + place, mask=s < splits, other=-float("inf"))
    most = tl.max(top, 0)
    factor = tl.exp(top - most)
    total = tl.sum(factor * tl.load(denominator + place, mask=s < splits, other=0.0), 0)
    out = t * heads + h
    if lse is not None:
        tl.store(lse + out, most + tl.log(total))
    for c0 in range(0, width, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        inside = c < width
        result = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, splits):
            part = (t * splits + i) * heads + h
            share = tl.exp(tl.load(largest + part) - most)
            result += share * tl.load(sums + part * width + c, mask=inside, other=0.0)
        tl.store(pooled + out * width + c, result / total, mask=inside)


@Kernel
@triton.jit
def tile_router_combine_kernel(
    sums, largest, denominator, pooled, lse, splits, width, heads, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    h, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    combine(sums, largest, denominator, pooled, lse, t, h, splits, width, heads, SPLITS, BLOCK)


@Kernel
@triton.jit
def tile_router_scores_kernel(
    z, u, grad, scores, slopes, rows, width, tile_stride, row_stride, query_stride, heads, part_width,
    BN: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores, slopes [parts, T, heads, rows] = z u, z grad over `part_width` channels a part; grad may be None."""
    block, part, t = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    z += t * tile_stride
    u += t * query_stride
    n = block * BN + tl.arange(0, BN)
    inside = n < rows
    total = tl.zeros((HEADS, BN), tl.float32)
    if grad is not None:
        grad += t * heads * width
        slope = tl.zeros((HEADS, BN), tl.float32)
    last = tl.minimum((part + 1) * part_width, width)
    for c0 in range(part * part_width, last, CHUNK):
        x = _load_rows(z, n, inside, row_stride, c0, last, CHUNK)
        total = _score(total, _load_queries(u, heads, c0, width, HEADS, CHUNK), x, PRECISION)
        if grad is not None:
            slope = _score(slope, _load_queries(grad, heads, c0, width, HEADS, CHUNK), x, PRECISION)
    h = tl.arange(0, HEADS)
    out = (part * tl.num_programs(2) + t) * heads * rows + h[:, None] * rows + n[None, :]
    mask = (h[:, None] < heads) & inside[None, :]
    tl.store(scores + out, total, mask=mask)
    if grad is not None:
        tl.store(slopes + out, slope, mask=mask)


@triton.jit
def _sum_parts(base, n, rows, parts, part_stride, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, parts):
        total += tl.load(base + n, mask=n < rows, other=0.0)
        base += part_stride
    return total


@Kernel
@triton.jit
def tile_router_weights_kernel(scores, slopes, lse, delta, rows, parts, part_stride, BLOCK: tl.constexpr):
    """One head of one tile. Part 0 of the scores becomes softmax weights, of the slopes the gradients of the scores.

    slopes None: lse is computed and written, else both lse and delta are given.
    """
    pair = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    inside = n < rows
    scores += pair * rows
    score = tl.where(inside, _sum_parts(scores, n, rows, parts, part_stride, BLOCK), -float("inf"))
    if slopes is None:
        top = tl.max(score, 0)
        weight = tl.exp(score - top)
        total = tl.sum(weight, 0)
        tl.store(lse + pair, top + tl.log(total))
        tl.store(scores + n, weight / total, mask=inside)
    else:
        slopes += pair * rows
        weight = tl.exp(score - tl.load(lse + pair))
        slope = weight * (_sum_parts(slopes, n, rows, parts, part_stride, BLOCK) - tl.load(delta + pair))
        tl.store(scores + n, weight, mask=inside)
        tl.store(slopes + n, slope, mask=inside)


@Kernel
@triton.jit
def tile_router_weighted_sum_kernel(
    z, weight, sums, rows, width, tile_stride, row_stride, heads, split_rows,
    BN: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums [T, splits, heads, width] = weight [T, heads, rows] z over a split's rows; a program owns CHUNK channels."""
    block, split, t = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    z += t * tile_stride
    weight += t * heads * rows
    h = tl.arange(0, HEADS)
    total = tl.zeros((HEADS, CHUNK), tl.float32)
    last = tl.minimum((split + 1) * split_rows, rows)
    for n0 in range(split * split_rows, last, BN):
        n = n0 + tl.arange(0, BN)
        inside = n < last
        w = tl.load(weight + h[:, None] * rows + n[None, :], mask=(h[:, None] < heads) & inside[None, :], other=0.0)
        x = _load_rows(z, n, inside, row_stride, block * CHUNK, width, CHUNK)
        total = tl.dot(w, x.to(tl.float32), total, input_precision=PRECISION)
    sums += (t * tl.num_programs(1) + split) * heads * width
    _store_sums(sums, total, heads, block * CHUNK, width, HEADS, CHUNK)


def fused(width: int, heads: int, itemsize: int, target: int) -> bool:
    """Whether a program of the pool kernel can hold the sums of whole rows in registers and the queries in shared
    memory.

    Not with three TF32 products for float32, nor in AMD's 64 KB of shared memory.
    """
    return itemsize == 2 and target > 0 and width <= 4 * CHUNK and heads <= HEADS


def pool_config(rows: int, width: int, tiles: int) -> dict[str, int]:
    """Launch of `tile_router_pool_kernel`: pieces of at least 128 rows, enough of them to fill a GPU with few tiles."""
    splits = max(1, min(16, cdiv(256, tiles), rows // 128))
    chunk = min(CHUNK, max(16, next_power_of_2(width)))
    warps = 8 if width > CHUNK else 4
    return {
        "split_rows": cdiv(cdiv(rows, splits), 16) * 16,
        "BN": 16,
        "CHUNK": chunk,
        "CHUNKS": cdiv(width, chunk),
        "SPLIT": min(warps, chunk // 16),
        "num_warps": warps,
        "num_stages": 1,
    }


def scores_config(rows: int, width: int, tiles: int, itemsize: int, target: int) -> dict[str, int]:
    """Launch of the scores kernel: many rows a program, as each reads the queries; channels in parts to fill a GPU."""
    roomy = target and limits(target).large  # older Tritons keep several copies of z in shared memory
    block = min(256 if roomy else 128, max(16, next_power_of_2(rows)))
    chunk = min(128 // itemsize, max(16, next_power_of_2(width)))
    parts = max(1, min(128 // (cdiv(rows, block) * tiles), width // 512))
    return {
        "part_width": cdiv(cdiv(width, parts), chunk) * chunk,
        "BN": block,
        "CHUNK": chunk,
        "num_warps": 8 if block > 128 else 4,
        "num_stages": 3 if target else 2,
    }


def sum_config(rows: int, width: int, tiles: int, itemsize: int, target: int) -> dict[str, int]:
    """Launch of the weighted sum: wide programs, as each reads the weights; rows in pieces to fill a GPU."""
    chunk = min(512 // itemsize, max(16, next_power_of_2(width)))
    splits = max(1, min(128 // (cdiv(width, chunk) * tiles), rows // 128))
    return {
        "split_rows": cdiv(cdiv(rows, splits), 32) * 32,
        "BN": 32,
        "CHUNK": chunk,
        "num_warps": 8 if target and chunk > 128 else 4,
        "num_stages": 3 if target else 2,
    }


def _queries(u: Tensor) -> Tensor:
    return u if u[0:1].is_contiguous() else u.contiguous()


def _head_block(heads: int) -> int:
    return max(HEADS, next_power_of_2(heads))


def _weights(z: Tensor, u: Tensor, lse: Tensor, grad: Tensor | None, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax weights [T, heads, rows], writing lse; with `grad` weights and gradients of the scores, given lse."""
    (tiles, rows, width), heads = z.shape, u.shape[1]
    config = scores_config(rows, width, tiles, z.element_size(), capability(z))
    part_width = config.pop("part_width")
    parts = cdiv(width, part_width)
    scores = u.new_empty(parts, tiles, heads, rows)
    slopes = None if grad is None else torch.empty_like(scores)
    tile_router_scores_kernel[cdiv(rows, config["BN"]), parts, tiles](
        z, u, grad, scores, slopes, rows, width, z.stride(0), z.stride(1), u.stride(0), heads, part_width,
        HEADS=_head_block(heads), PRECISION=precision(z.dtype), enable_fp_fusion=True, **config,
    )  # fmt: skip
    tile_router_weights_kernel[(tiles * heads,)](
        scores, slopes, lse, delta, rows, parts, tiles * heads * rows, BLOCK=next_power_of_2(rows),
        num_warps=4 if rows <= 4096 else 16, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return scores[0], scores[0] if slopes is None else slopes[0]


def _weighted_sum(z: Tensor, weight: Tensor) -> Tensor:
    (tiles, rows, width), heads = z.shape, weight.shape[1]
    config = sum_config(rows, width, tiles, z.element_size(), capability(z))
    each = config.pop("split_rows")
    splits = cdiv(rows, each)
    sums = weight.new_empty(tiles, splits, heads, width)
    tile_router_weighted_sum_kernel[cdiv(width, config["CHUNK"]), splits, tiles](
        z, weight, sums, rows, width, z.stride(0), z.stride(1), heads, each, HEADS=_head_block(heads),
        PRECISION=precision(z.dtype), enable_fp_fusion=True, **config,
    )  # fmt: skip
    return sums[:, 0] if splits == 1 else sums.sum(1)


def pool_parts(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [T, splits, H, C] over pieces of a tile's rows, with their maxima and denominators [T, splits, H].

    `z` [T, N, C] with adjacent channels, `u` [T, H, C] or one for all tiles, by strides; `fused` shapes only.
    """
    (tiles, rows, width), heads = z.shape, u.shape[1]
    config = pool_config(rows, width, tiles)
    each = config.pop("split_rows")
    splits = cdiv(rows, each)
    sums = u.new_empty(tiles, splits, heads, width)
    largest, denominator = u.new_empty(tiles, splits, heads), u.new_empty(tiles, splits, heads)
    tile_router_pool_kernel[splits, tiles](
        z, u, sums, largest, denominator, rows, width, z.stride(0), z.stride(1), u.stride(0), heads, each,
        HEADS=HEADS, PRECISION=precision(z.dtype), enable_fp_fusion=True, **config,
    )  # fmt: skip
    return sums, largest, denominator


def tile_pool(a: Pool) -> Pooled:
    z, u = rows_last(a.z), _queries(a.u)
    (tiles, _, width), heads = z.shape, u.shape[1]
    lse = u.new_empty(u.shape[:2])
    if tiles == 0:
        return Pooled(u.new_empty(u.shape), lse)
    if not fused(width, heads, z.element_size(), capability(z)):
        return Pooled(pool_unfused(z, u, lse), lse)
    pooled = u.new_empty(u.shape)
    sums, largest, denominator = pool_parts(z, u)
    splits = sums.shape[1]
    tile_router_combine_kernel[heads, tiles](
        sums, largest, denominator, pooled, lse, splits, width, heads, SPLITS=next_power_of_2(splits), BLOCK=256,
        num_warps=2, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return Pooled(pooled, lse)


def pool_unfused(z: Tensor, u: Tensor, lse: Tensor) -> Tensor:
    """What `pool_parts` cannot hold at once: [T, H, C], writing lse [T, H]."""
    weight, _ = _weights(z, u, lse, None, None)
    return _weighted_sum(z, weight)


def tile_pool_backward(b: PoolBackward) -> PoolGradients:
    z, u = rows_last(b.forward.z), _queries(b.forward.u)
    grad, lse = b.grad.contiguous(), b.lse.contiguous()
    if z.shape[0] == 0:
        return PoolGradients(z.new_empty(z.shape if b.need_z else 0), u.new_empty(u.shape))
    weight, slope = _weights(z, u, lse, grad, (grad * b.pooled).sum(-1))
    grad_z = torch.baddbmm(weight.mT @ grad, slope.mT, u).to(z.dtype) if b.need_z else z.new_empty(0)
    return PoolGradients(grad_z, _weighted_sum(z, slope))
