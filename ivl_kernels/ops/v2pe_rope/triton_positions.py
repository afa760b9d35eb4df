"""V2PE positions in Triton: one program goes through the tokens of all rows, a block at a time, and carries sums along.

What an image spans is known at its last token, and moves only the tokens after it: one pass is enough.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton import Kernel
from .op import Located, Positions

BLOCK = 1024


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _first_after(ends, value, count, steps):
    """How many of the ascending `ends` [count] are at most `value`; 2^steps > count."""
    low = tl.zeros_like(value)
    high = low + count
    for _ in range(0, steps):
        middle = (low + high) // 2
        open = low < high
        passed = open & (tl.load(ends + middle, mask=open, other=0) <= value)
        low = tl.where(passed, middle + 1, low)
        high = tl.where(open & (passed == 0), middle, high)
    return low


@triton.jit
def _visual(ids, mask, i, inside, columns, id_row, id_column, mask_row, mask_column, token_id):
    row, column = (i // columns).to(tl.int64), (i % columns).to(tl.int64)
    valid = inside
    if mask is not None:
        valid = inside & (tl.load(mask + row * mask_row + column * mask_column, mask=inside, other=0) != 0)
    same = tl.load(ids + row * id_row + column * id_column, mask=inside, other=0) == token_id
    return valid & same, valid


@triton.jit
def _fresh(i, columns, cu_seqlens, segments, segment_steps):
    """Whether a token is the first of a row or of a sample."""
    fresh = i % columns == 0
    if cu_seqlens is not None:
        before = _first_after(cu_seqlens, i.to(tl.int64), segments, segment_steps)
        fresh = fresh | ((before > 0) & (tl.load(cu_seqlens + tl.maximum(before - 1, 0)) == i))
    return fresh


@triton.jit
def _limit(delta):
    """`position_limit` of the reference."""
    limit = delta * 1048576.0
    for k in tl.static_range(0, 13):
        steps = delta * (1 << (12 - k))
        limit = tl.where(steps == tl.floor(steps), (1 << (12 + k)) * 1.0, limit)
    return limit


@Kernel
@triton.jit(
    do_not_specialize=[
        "total", "columns", "segments", "segment_steps", "token_id", "count", "tiles", "tile_steps", "tile_tokens",
        "compressed_tokens", "compressed_units",
    ]
)  # fmt: skip
def v2pe_position_ids_kernel(
    ids, mask, cu_seqlens, deltas, compress, ends, positions, info,
    total, columns, id_row, id_column, mask_row, mask_column, segments, segment_steps, token_id, count,
    tiles, tile_steps, tile_tokens, compressed_tokens, compressed_units,
    PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. ends [tiles]: scratch. info [5] as in `Located`."""
    at = tl.arange(0, BLOCK)
    slots = tl.full((), 0, tl.int64)
    if compress is not None:
        for first in range(0, tiles, BLOCK):
            t = first + at
            small = tl.load(compress + t, mask=t < tiles, other=0) != 0
            size = tl.where(t < tiles, tl.where(small, compressed_tokens, tile_tokens), 0).to(tl.int64)
            tl.store(ends + t, slots + tl.cumsum(size, 0), mask=t < tiles)
            slots += tl.sum(size, 0)
        tl.debug_barrier()
    images = tl.full((), 0, tl.int64)
    visuals = images
    units_before = images  # of all tokens so far
    run_start = images  # units before the run that is open
    whole_before = images  # text tokens and spans of images so far
    origin_before = images  # of these, before the row or sample that is open
    misfit = images
    bad = images + 9223372036854775807
    bad_end = tl.full((), 0.0, tl.float64)
    for first in range(0, total, BLOCK):
        i = first + at
        inside = i < total
        visual, valid = _visual(ids, mask, i, inside, columns, id_row, id_column, mask_row, mask_column, token_id)
        before, _ = _visual(
            ids, mask, tl.maximum(i - 1, 0), inside & (i > 0), columns, id_row, id_column, mask_row, mask_column,
            token_id,
        )  # fmt: skip
        after, _ = _visual(
            ids, mask, i + 1, i + 1 < total, columns, id_row, id_column, mask_row, mask_column, token_id
        )  # fmt: skip
        fresh = _fresh(i, columns, cu_seqlens, segments, segment_steps)
        start = visual & ((before == 0) | fresh)
        end = visual & ((after == 0) | _fresh(i + 1, columns, cu_seqlens, segments, segment_steps))
        rank = visuals + tl.cumsum(visual.to(tl.int64), 0)  # visual tokens up to this one
        image = images + tl.cumsum(start.to(tl.int64), 0) - 1
        unit = visual.to(tl.int64)
        if compress is not None:
            tile = _first_after(ends, rank - 1, tiles, tile_steps)
            there = visual & (tile < tiles)
            small = tl.load(compress + tile, mask=there, other=0) != 0
            unit = tl.where(visual & small, compressed_units, unit)
            ragged = end & (tl.load(ends + tile, mask=there, other=-1) != rank)
            misfit += tl.sum(ragged.to(tl.int64), 0)
        units = units_before + tl.cumsum(unit, 0)
        opened = tl.associative_scan(tl.where(start, units - unit, 0), 0, _larger)
        opened = tl.maximum(opened, run_start)
        which = (i // columns).to(tl.int64) if PER_ROW else tl.minimum(image, count - 1)
        delta = tl.load(deltas + which, mask=visual, other=1.0)
        moved = (units - opened).to(tl.float64) * delta
        jump = tl.where(end, tl.ceil(moved - 1e-6 * tl.maximum(moved, 1.0)).to(tl.int64), 0)
        text = (valid & (visual == 0)).to(tl.int64)
        step = text + jump
        whole = whole_before + tl.cumsum(step, 0) - jump
        origin = tl.associative_scan(tl.where(fresh & inside, whole - text, 0), 0, _larger)
        origin = tl.maximum(origin, origin_before)
        last = (whole - origin - 1).to(tl.float64)
        position = tl.where(visual, last + moved, last)
        tl.store(positions + i, tl.where(valid, position, 1.0).to(tl.float32), mask=inside)
        wrong = end & (last + moved > _limit(delta))
        worst = tl.min(tl.where(wrong, image, 9223372036854775807), 0)
        if worst < bad:
            bad = worst
            bad_end = tl.max(tl.where(wrong & (image == worst), last + moved, 0.0), 0)
        images += tl.sum(start.to(tl.int64), 0)
        visuals += tl.sum(visual.to(tl.int64), 0)
        units_before += tl.sum(unit, 0)
        run_start = tl.max(opened, 0)
        whole_before += tl.sum(step, 0)
        origin_before = tl.max(origin, 0)
    used = images * 0
    if compress is not None:
        for first in range(0, tiles, BLOCK):
            t = first + at
            used += tl.sum(((t < tiles) & (tl.load(ends + t, mask=t < tiles, other=0) <= visuals)).to(tl.int64), 0)
        used = tl.where((misfit > 0) | (visuals > slots), -1, used)
    tl.store(info, images.to(tl.float64))
    tl.store(info + 1, visuals.to(tl.float64))
    tl.store(info + 2, used.to(tl.float64))
    tl.store(info + 3, tl.where(bad == 9223372036854775807, -1, bad).to(tl.float64))
    tl.store(info + 4, bad_end)


def v2pe_position_ids(a: Positions) -> Located:
    ids, mask = a.input_ids, a.mask
    rows, columns = ids.shape
    positions = ids.new_empty((rows, columns), dtype=torch.float32)
    info = ids.new_empty(5, dtype=torch.float64)
    tiles = 0 if a.compress is None else len(a.compress)
    segments = 0 if a.cu_seqlens is None else len(a.cu_seqlens)
    v2pe_position_ids_kernel[(1,)](
        ids, None if mask is None else mask.view(torch.uint8), a.cu_seqlens, a.deltas.contiguous(),
        None if a.compress is None else a.compress.view(torch.uint8), ids.new_empty(max(tiles, 1)), positions, info,
        rows * columns, max(columns, 1), *ids.stride(), *((0, 0) if mask is None else mask.stride()), segments,
        segments.bit_length(), a.token_id, len(a.deltas), tiles, tiles.bit_length(), a.tile_tokens,
        a.compressed_tokens, a.compressed_units, PER_ROW=a.per_row, BLOCK=BLOCK, num_warps=8, num_stages=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    return Located(positions, info)
