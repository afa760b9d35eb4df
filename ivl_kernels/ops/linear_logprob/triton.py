"""The head's log-probabilities on GPUs: a product whose tiles of logits end in registers.

Forward: each program adds up a run of the vocabulary for a block of rows, and a second kernel merges the runs in their
order. Backward: the same product once more, a tile of the vocabulary at a time, ends in the gradients of its logits,
rounded once; the two products with them are the vendor's. No atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gpu import capability, float32_precision, interpreting
from ..._targets import limits
from ..._triton import Kernel, cdiv
from ..common.matmul import operands
from .op import Gradients, Logprob, LogprobBackward, LogprobResult

LOWEST = tl.constexpr(-3.402823466e38)


@triton.jit
def _tanh(x):
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    square = size * size
    near = size + size * square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315)))  # where 1 - e loses digits
    value = tl.where(size < 0.15, near, far)
    return tl.where(x < 0, -value, value)


@triton.jit
def _logits(x, w, bias, row, column, M, V, x_row, w_row, softcap, scale, H: tl.constexpr, BK: tl.constexpr,
            SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Of rows `row` and words `column`; those past the end are of the last row and word."""
    row_in = tl.minimum(row, M - 1).to(tl.int64)
    column_in = tl.minimum(column, V - 1).to(tl.int64)
    x_rows = x + row_in[:, None] * x_row
    w_rows = w + column_in[None, :] * w_row
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for k in range(0, H, BK):
        lanes = k + tl.arange(0, BK)
        if H % BK == 0:
            a = tl.load(x_rows + lanes[None, :])
            b = tl.load(w_rows + lanes[:, None])
        else:
            inside = lanes < H
            a = tl.load(x_rows + lanes[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(w_rows + lanes[:, None], mask=inside[:, None], other=0.0)
        b = b.to(a.dtype)
        a, b = operands(a, b, PRECISION, UPCAST)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + column_in).to(tl.float32)[None, :]
    if SOFTCAP:
        acc = softcap * _tanh(acc / softcap)
    return acc * scale


@Kernel
@triton.jit
def logprob_kernel(
    x, w, bias, targets,  # [M, H] by rows, [V, H] by rows, [V], [M]
    partials, own,  # [runs, 4, M]: max, sum, moment but of the target, total; [M]: the target's logit
    kept,  # [M, V]: the logits; None: nowhere
    M, V, x_row, w_row, softcap, scale,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, run of RUN tiles of the vocabulary)."""
    blocks = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    run = pid // blocks
    row = pid % blocks * BM + tl.arange(0, BM)
    target = tl.load(targets + row, mask=row < M, other=-1)
    most = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    moment = tl.zeros([BM], tl.float32)
    logits = tl.zeros([BM], tl.float32)
    found = tl.zeros([BM], tl.float32)
    for tile in range(0, RUN):
        column = (run * RUN + tile) * BN + tl.arange(0, BN)
        if (run * RUN + tile) * BN < V:
            z = _logits(x, w, bias, row, column, M, V, x_row, w_row, softcap, scale, H, BK, SOFTCAP, PRECISION, UPCAST)
            valid = (column < V)[None, :]
            if kept is not None:
                to = kept + row.to(tl.int64)[:, None] * V + column[None, :]
                tl.store(to, z, mask=(row < M)[:, None] & valid)
            logits += tl.sum(tl.where(valid, z, 0.0), 1)
            found += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
            # The target comes last, so that 1 - p keeps its digits where p is near 1.
            z = tl.where(valid & (column[None, :] != target[:, None]), z, float("-inf"))
            higher = tl.maximum(most, tl.max(z, 1))
            down = most - higher
            shrink = tl.exp(down)
            moment = tl.where(total != 0, (moment + total * down) * shrink, 0.0)
            below = z - higher[:, None]
            e = tl.exp(below)
            total = total * shrink + tl.sum(e, 1)
            moment += tl.sum(tl.where(e == 0, 0.0, e * below), 1)
            most = higher
    stored = row < M
    at = partials + run.to(tl.int64) * (4 * M) + row
    tl.store(at, most, mask=stored)
    tl.store(at + M, total, mask=stored)
    tl.store(at + 2 * M, moment, mask=stored)
    tl.store(at + 3 * M, logits, mask=stored)
    first = run * RUN * BN
    here = (target >= first) & (target < tl.minimum(first + RUN * BN, V))
    tl.store(own + row, found, mask=stored & here)


@Kernel
@triton.jit
def merge_kernel(
    partials, own,  # as above
    logp, lse, entropy, mean,  # [M]
    M, V, runs, R: tl.constexpr,
):  # fmt: skip
    """Program (R rows): the runs in their order."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < M
    target = tl.load(own + row, mask=inside, other=0.0)
    most = tl.maximum(tl.full([R], LOWEST, tl.float32), target)
    at = partials + row
    for _ in range(0, runs):
        most = tl.maximum(most, tl.load(at, mask=inside, other=0.0))
        at += 4 * M
    total = tl.zeros([R], tl.float32)
    moment = tl.zeros([R], tl.float32)
    logits = tl.zeros([R], tl.float32)
    at = partials + row
    for _ in range(0, runs):
        down = tl.load(at, mask=inside, other=0.0) - most
        shrink = tl.exp(down)
        part = tl.load(at + M, mask=inside, other=0.0)
        moment += shrink * (tl.load(at + 2 * M, mask=inside, other=0.0) + tl.where(part != 0, part * down, 0.0))
        total += shrink * part
        logits += tl.load(at + 3 * M, mask=inside, other=0.0)
        at += 4 * M
    below = target - most
    e = tl.exp(below)
    ratio = total / e
    # log(1 + ratio) where it is small: by Newton's correction of the rounded sum.
    rounded = 1.0 + ratio
    small = tl.where(rounded == 1.0, ratio, tl.log(rounded) * (ratio / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    whole = total + e
    log_total = tl.log(whole)
    tl.store(logp + row, tl.where(e > total, -small, below - log_total), mask=inside)
    tl.store(lse + row, most + log_total, mask=inside)
    tl.store(entropy + row, log_total - (moment + tl.where(e == 0, 0.0, e * below)) / whole, mask=inside)
    tl.store(mean + row, logits / V, mask=inside)


@triton.jit
def _expm1(x):
    """Of x <= 0: by its series where e^x - 1 loses digits."""
    series = x * (1 + x * (1.0 / 2) * (1 + x * (1.0 / 3) * (1 + x * (1.0 / 4) * (1 + x * (1.0 / 5) * (1 + x / 6)))))
    return tl.where(x > -0.25, series, tl.exp(x) - 1.0)


@Kernel
@triton.jit
def gradient_kernel(
    x, w, bias, targets, logp, lse, entropy,  # as above
    grads,  # [4, M]: of logp, lse, entropy, mean logit
    kept,  # [M, V]: the logits; None: computed again
    dz,  # [M, words]: words [first, first + words) of the vocabulary
    M, V, first, words, x_row, w_row, softcap, scale,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, tile of words): gradients of the products, zero for rows without any."""
    blocks = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    row = pid % blocks * BM + tl.arange(0, BM)
    inside = row < M
    word = pid // blocks * BN + tl.arange(0, BN)
    g_logp = tl.load(grads + row, mask=inside, other=0.0)
    g_lse = tl.load(grads + M + row, mask=inside, other=0.0)
    g_entropy = tl.load(grads + 2 * M + row, mask=inside, other=0.0)
    g_mean = tl.load(grads + 3 * M + row, mask=inside, other=0.0) / V
    to = dz + row.to(tl.int64)[:, None] * words + word[None, :]
    stored = inside[:, None] & (word < words)[None, :]
    dead = (g_logp == 0) & (g_lse == 0) & (g_entropy == 0) & (g_mean == 0)
    if tl.min(dead.to(tl.int32), 0) == 1:
        tl.store(to, tl.zeros([BM, BN], dz.dtype.element_ty), mask=stored)
    else:
        column = first + word
        if kept is not None:
            z = tl.load(kept + row.to(tl.int64)[:, None] * V + column[None, :], mask=stored, other=0.0)
        else:
            z = _logits(x, w, bias, row, column, M, V, x_row, w_row, softcap, scale, H, BK, SOFTCAP, PRECISION, UPCAST)
        u = z - tl.load(lse + row, mask=inside, other=0.0)[:, None]
        spread = tl.load(entropy + row, mask=inside, other=0.0)
        p = tl.exp(u)
        own = column[None, :] == tl.load(targets + row, mask=inside, other=-1)[:, None]
        chosen = _expm1(tl.load(logp + row, mask=inside, other=0.0))[:, None]
        d = -g_logp[:, None] * tl.where(own, chosen, p) + p * g_lse[:, None]
        # A word of probability 0 adds nothing, also where its logit is -inf.
        by_entropy = p * (tl.maximum(u, -104.0) + spread[:, None]) * g_entropy[:, None]
        d += g_mean[:, None] - tl.where(g_entropy[:, None] == 0, 0.0, by_entropy)
        d *= scale
        if SOFTCAP:
            t = z / (softcap * scale)
            d *= 1.0 - t * t
        d = tl.where(dead[:, None], 0.0, d)
        tl.store(to, d.to(dz.dtype.element_ty), mask=stored)


RUN = 8  # tiles of the vocabulary that a program of the forward adds up
WORDS = 8192  # of a tile of the backward


def config(width: int, itemsize: int, target: int) -> dict[str, Any]:
    """By the width and the dtype only: the sums of a row do not depend on how many rows there are."""
    BM, BN = (64, 64) if itemsize == 4 else (128, 128)
    BK = 128 // itemsize
    while BK > 16 and 2 * width <= BK:
        BK //= 2
    limit = limits(target).pipeline
    while BK > 16 and limit // ((BM + BN) * BK * itemsize) < 2:
        BK //= 2
    stages = 2 if target == 0 else max(2, min(4, limit // ((BM + BN) * BK * itemsize)))
    return dict(BM=BM, BN=BN, BK=BK, num_warps=8 if itemsize == 2 else 4, num_stages=stages)


def _options(x: Tensor, softcap: float) -> dict[str, Any]:
    target, upcast = capability(x), interpreting()
    precision = float32_precision() if x.element_size() == 4 and target and not upcast else "ieee"
    return dict(
        H=x.shape[1], SOFTCAP=softcap != 0, PRECISION=precision, UPCAST=upcast, enable_fp_fusion=True,
        **config(x.shape[1], x.element_size(), target),
    )  # fmt: skip


def _gathered(hidden: Tensor, rows: Tensor | None) -> Tensor:
    x = hidden if rows is None else hidden.index_select(0, rows)
    return x if x.stride(1) == 1 else x.contiguous()


def _rows_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def linear_logprob(a: Logprob) -> LogprobResult:
    x, weight = _gathered(a.hidden, a.rows), _rows_last(a.weight)
    bias = None if a.bias is None else a.bias.contiguous()
    count, vocabulary = x.shape[0], weight.shape[0]
    options = _options(x, a.softcap)
    runs = cdiv(vocabulary, options["BN"] * RUN)
    partials = x.new_empty(runs, 4, count, dtype=torch.float32)
    # Where no run has the target, as for one outside the vocabulary, NaN stays.
    own = x.new_full((count,), float("nan"), dtype=torch.float32)
    found = tuple(x.new_empty(count, dtype=torch.float32) for _ in range(4))
    kept = x.new_empty((count, vocabulary) if a.keep else (0, 0), dtype=torch.float32)
    if count:
        logprob_kernel[(cdiv(count, options["BM"]) * runs,)](
            x, weight, bias, a.targets.contiguous(), partials, own, kept if a.keep else None, count, vocabulary,
            x.stride(0), weight.stride(0), a.softcap, 1 / a.temperature, RUN=RUN, **options,
        )  # fmt: skip
        merge_kernel[(cdiv(count, 128),)](
            partials, own, *found, count, vocabulary, runs, R=128, num_warps=4, enable_fp_fusion=False
        )
    return LogprobResult._make((*found, kept))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        total.copy_(torch.addmm(total, a, b, out_dtype=torch.float32))
    else:
        torch.addmm(total, a.float(), b.float(), out=total)


def linear_logprob_backward(a: LogprobBackward) -> Gradients:
    x, weight = _gathered(a.hidden, a.rows), _rows_last(a.weight)
    bias = None if a.bias is None else a.bias.contiguous()
    count, vocabulary = x.shape[0], weight.shape[0]
    grads = x.new_zeros(4, count, dtype=torch.float32)
    for to, given in zip(grads, (a.grad_logp, a.grad_lse, a.grad_entropy, a.grad_mean)):
        if given is not None:
            to.copy_(given)
    options = _options(x, a.softcap)
    dx = x.new_zeros(count if a.need_hidden else 0, x.shape[1], dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if a.need_weight else 0)
    dbias = x.new_empty(vocabulary if a.need_bias else 0, dtype=torch.float32)
    if count == 0:
        dweight.zero_()
        dbias.zero_()
    tile = x.new_empty(count * min(WORDS, vocabulary))
    for first in range(0, vocabulary if count else 0, WORDS):
        last = min(first + WORDS, vocabulary)
        dz = tile[: count * (last - first)].view(count, last - first)
        gradient_kernel[(cdiv(count, options["BM"]) * cdiv(last - first, options["BN"]),)](
            x, weight, bias, a.targets.contiguous(), a.logp, a.lse, a.entropy, grads,
            a.kept if a.kept.numel() else None, dz, count, vocabulary, first, last - first, x.stride(0),
            weight.stride(0), a.softcap, 1 / a.temperature, **options,
        )  # fmt: skip
        words = weight[first:last]
        if a.need_weight:
            if weight.dtype == x.dtype:
                torch.mm(dz.t(), x, out=dweight[first:last])
            else:  # a float32 weight beside 16-bit rows
                dweight[first:last].zero_()
                _add_product(dweight[first:last], dz.t(), x)
        if a.need_hidden:
            _add_product(dx, dz, words.to(x.dtype))
        if a.need_bias:
            dbias[first:last] = dz.sum(0, dtype=torch.float32)
    dhidden = a.hidden.new_empty(0)
    if a.need_hidden:
        dhidden = dx.to(a.hidden.dtype)
        if a.rows is not None:
            dhidden = a.hidden.new_zeros(a.hidden.shape).index_add_(0, a.rows, dhidden)
    return Gradients(dhidden, dweight, dbias if bias is None else dbias.to(bias.dtype))
