"""Tiles of matrices stored in few bits (`formats`), expanded in registers: operands of Triton's products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mxfp4(codes):
    """E2M1 in the low four bits, as float32: exponent and mantissa in their places, then 2^126 for the other bias."""
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 85070591730234615865843651857942052864.0


@triton.jit
def _fp8(codes):
    """E4M3 in the low eight bits, as float32; 2^120 for the other bias, and the largest code is NaN."""
    bits = ((codes & 0x7F) << 20) | ((codes & 0x80) << 24)
    value = bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def of_expert(values, scales, expert, ROWS: tl.constexpr, WIDTH: tl.constexpr, MXFP4: tl.constexpr):
    """Where the values and the scales of an expert's matrix [ROWS, WIDTH] begin."""
    at = expert.to(tl.int64)
    if MXFP4:
        return values + at * (ROWS * WIDTH // 2), scales + at * (ROWS * WIDTH // 32)
    else:
        return values + at * (ROWS * WIDTH), scales + at * (((ROWS + 127) // 128) * ((WIDTH + 127) // 128))


@triton.jit
def stored_tile(
    values, scales, row, inside, first, WIDTH: tl.constexpr, C: tl.constexpr, MXFP4: tl.constexpr, dtype: tl.constexpr
):
    """[R, C] of a stored matrix [..., WIDTH]: rows `row`, columns [first, first + C); zero where there are none.

    values, scales: of the matrix. inside: which rows there are. first: a multiple of C, or C is at most 128.
    """
    R: tl.constexpr = row.shape[0]
    row = row.to(tl.int64)
    if MXFP4:
        pair = first // 2 + tl.arange(0, C // 2)
        at = values + row[:, None] * (WIDTH // 2) + pair[None, :]
        both = tl.load(at, mask=inside[:, None] & (pair < WIDTH // 2)[None, :], other=0).to(tl.int32)
        value = _mxfp4(tl.reshape(tl.join(both & 15, both >> 4), [R, C]))
        block = first // 32 + tl.arange(0, C // 32)
        at = scales + row[:, None] * (WIDTH // 32) + block[None, :]
        byte = tl.load(at, mask=inside[:, None] & (block < WIDTH // 32)[None, :], other=0).to(tl.int32)
        scale = tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)  # byte 0: 2^-127
        value = tl.reshape(tl.reshape(value, [R, C // 32, 32]) * scale[:, :, None], [R, C])
    else:
        column = first + tl.arange(0, C)
        at = values + row[:, None] * WIDTH + column[None, :]
        value = _fp8(tl.load(at, mask=inside[:, None] & (column < WIDTH)[None, :], other=0).to(tl.int32))
        BLOCKS: tl.constexpr = (WIDTH + 127) // 128
        N: tl.constexpr = (C + 127) // 128
        block = first // 128 + tl.arange(0, N)
        at = scales + row[:, None] // 128 * BLOCKS + block[None, :]
        scale = tl.load(at, mask=inside[:, None] & (block < BLOCKS)[None, :], other=0.0)
        value = tl.reshape(tl.reshape(value, [R, N, C // N]) * scale[:, :, None], [R, C])
    return value.to(dtype)
