"""What the kernels of the experts share: where a tile is, and its product."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.matmul import operands
from .triton_formats import of_expert, stored_tile


@triton.jit
def tile(pid, tiles, offsets, num_tiles, E: tl.constexpr, NUM_N: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr):
    """Expert (E: nothing to do), first row, end row and column tile of program `pid`.

    GROUP row tiles go through the column tiles together: neighbours in time read the same weights. The grid is padded
    to whole groups.
    """
    inside = pid % (GROUP * NUM_N)
    t = pid // (GROUP * NUM_N) * GROUP + inside % GROUP
    expert = tl.load(tiles + 2 * t, mask=t < num_tiles, other=E)
    first = tl.load(tiles + 2 * t + 1, mask=t < num_tiles, other=0)
    end = tl.minimum(tl.load(offsets + tl.minimum(expert + 1, E)), first + BM)
    return expert, first, end, inside // GROUP


@triton.jit
def mma(a, b, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b; transposed when SWAP, which puts the weights on the tensor core's tall side (64 rows on Hopper)."""
    b = b.to(a.dtype)  # float32 weights beside 16-bit rows
    a, b = operands(a, b, PRECISION, UPCAST)
    if SWAP:
        return tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product(
    a_rows, a_mask, w, scales, expert, column, w_mask, EVEN: tl.constexpr, STEP_N: tl.constexpr, STEP_K: tl.constexpr,
    COLUMNS: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr,
    TALL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BM, N] = a [BM, K] times some columns of an expert's w [K, COLUMNS], in float32.

    a_rows: pointers to the first of each K. Element (k, n) of w is at k * STEP_K + n * STEP_N; of stored values the
    step along their rows is 1. EVEN: w_mask is all true.
    """
    if FORMAT != "":
        return _stored_product(
            a_rows, a_mask, w, scales, expert, column, w_mask, STEP_K == 1, COLUMNS, K, BM, N, BK, FORMAT == "mxfp4",
            TALL, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        w += expert.to(tl.int64) * (K * COLUMNS)
        return _plain_product(
            a_rows, a_mask, w + column * STEP_N, w_mask, EVEN, STEP_K, K, BM, N, BK, TALL, PRECISION, UPCAST
        )


@triton.jit
def _plain_product(
    a_rows, a_mask, w_columns, w_mask, EVEN: tl.constexpr, STEP_K: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    N: tl.constexpr, BK: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Hopper's tf32 operands lie along K: others would be copied 4 bytes at a time.
    SWAP: tl.constexpr = TALL and BM < 64 and (STEP_K == 1 or a_rows.dtype.element_ty.primitive_bitwidth == 16)
    acc = tl.zeros([N, BM] if SWAP else [BM, N], dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = a_rows[:, None] + k[None, :]
        w = w_columns[None, :] + k[:, None] * STEP_K
        if K % BK == 0:
            left = tl.load(a, mask=a_mask[:, None], other=0.0)
            right = tl.load(w) if EVEN else tl.load(w, mask=w_mask[None, :], other=0.0)
        else:
            left = tl.load(a, mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
            right = tl.load(w, mask=w_mask[None, :] & (k < K)[:, None], other=0.0)
        acc = mma(left, right, acc, SWAP, PRECISION, UPCAST)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def described_product(
    a, at, a_mask, w, expert, n, COLUMNS: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, N: tl.constexpr,
    BK: tl.constexpr, ALONG_K: tl.constexpr, PAIRS: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """As `product`, column tile n of N columns, whose weights bulk copies bring by the tensor descriptor w.

    A: "box", a describes rows, `at` is the first of them; "gather", a describes single rows, `at` are their numbers,
    less than 0 where there is none; "pointers" to rows, of which a_mask exist. w: see `triton_described`. What is
    beyond K reads as zero. Rows and columns beyond an expert's own are its neighbour's, and not to be stored.
    """
    SWAP: tl.constexpr = BM < 64
    acc = tl.zeros([N, BM] if SWAP else [BM, N], dtype=tl.float32)
    for start in range(0, K, BK):
        if A == "box":
            left = a.load([at, start])
        elif A == "gather":
            left = a.gather(at, start)
        else:
            k = start + tl.arange(0, BK)
            mask = a_mask[:, None] if K % BK == 0 else a_mask[:, None] & (k < K)[None, :]
            left = tl.load(a[:, None] + k[None, :], mask=mask, other=0.0)
        if PAIRS:
            right = tl.trans(tl.reshape(w.load([expert * COLUMNS + n * (N // 2), 0, start]), [N, BK]))
        elif ALONG_K:
            right = tl.trans(w.load([expert * COLUMNS + n * N, start]))
        else:
            right = w.load([expert * K + start, n * N])
        acc = mma(left, right, acc, SWAP, PRECISION, UPCAST)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _stored_product(
    a_rows, a_mask, w, scales, expert, column, w_mask, ALONG_K: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, MXFP4: tl.constexpr, TALL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As `product`; ALONG_K: the columns of w are rows in memory, else the rows are and `column` are neighbours."""
    SWAP: tl.constexpr = TALL and BM < 64
    dtype: tl.constexpr = a_rows.dtype.element_ty
    WIDTH: tl.constexpr = K if ALONG_K else COLUMNS
    w, scales = of_expert(w, scales, expert, COLUMNS if ALONG_K else K, WIDTH, MXFP4)
    acc = tl.zeros([N, BM] if SWAP else [BM, N], dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(a_rows[:, None] + k[None, :], mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
        if ALONG_K:
            right = tl.trans(stored_tile(w, scales, column, w_mask, start, WIDTH, BK, MXFP4, dtype))
        else:
            right = stored_tile(w, scales, k, k < K, tl.min(column, 0), WIDTH, N, MXFP4, dtype)
        acc = mma(left, right, acc, SWAP, PRECISION, UPCAST)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def halves(acc):
    """The left and right half of the columns: an epilogue on half a tile at a time needs half the registers."""
    HALF: tl.constexpr = acc.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, HALF]), [0, 2, 1]))


@triton.jit
def gates_and_ups(
    x, token, live, w, scales, expert, n, H: tl.constexpr, I: tl.constexpr, CONCATENATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr, TALL: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Column tile n, [BM, 2 BN]: gates and ups in turns. With the weight's columns, and which of them exist.

    DESCRIBED: "" for pointers x and w, "weights" where w is a tensor descriptor, "all" where both are.
    """
    j = tl.arange(0, 2 * BN)
    both = n * (2 * BN) + j < 2 * I
    column = (j % 2) * I + n * BN + j // 2 if CONCATENATED else n * (2 * BN) + j
    IN_ROWS: tl.constexpr = CONCATENATED or FORMAT != ""
    if DESCRIBED == "all":
        acc = described_product(
            x, token, None, w, expert, n, 2 * I, H, BM, 2 * BN, BK, IN_ROWS, CONCATENATED, "gather", PRECISION, UPCAST
        )
    elif DESCRIBED == "weights":
        acc = described_product(
            x + token.to(tl.int64) * H, None, live, w, expert, n, 2 * I, H, BM, 2 * BN, BK, IN_ROWS, CONCATENATED,
            "pointers", PRECISION, UPCAST,
        )  # fmt: skip
    else:
        acc = product(
            x + token.to(tl.int64) * H, live, w, scales, expert, column, both, I % BN == 0, H if IN_ROWS else 1,
            1 if IN_ROWS else 2 * I, 2 * I, H, BM, 2 * BN, BK, FORMAT, TALL, PRECISION, UPCAST,
        )  # fmt: skip
    return acc, column, both


@triton.jit
def runs_at(part: tl.constexpr, rows, BM: tl.constexpr):
    """Whether a tile of so many rows is computed BM / 4 * 2^part rows tall: a quarter, half or all of its height."""
    return (rows <= BM // 4 * 2**part) & ((part == 0) | (rows > BM // 8 * 2**part))
