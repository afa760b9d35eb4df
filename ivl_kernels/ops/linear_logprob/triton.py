"""The head's log-probabilities on GPUs: a product whose tiles of logits end in registers.

Forward: each program adds up a run of the vocabulary for a block of rows, and a second kernel merges the runs in their
order. Backward: the same product once more, a tile of the vocabulary at a time, ends in the gradients of its logits,
rounded once; the two products with them are the vendor's. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import Kernel, cdiv
from . import triton_head as head
from .op import Gradients, Logprob, LogprobBackward, LogprobResult
from .triton_head import LOWEST, expm1, gathered, head_gradients, logits, rows_last
from .triton_kl import linear_kl, linear_kl_backward

__all__ = ["linear_kl", "linear_kl_backward", "linear_logprob", "linear_logprob_backward"]


@Kernel
@triton.jit
def linear_logprob_kernel(
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
    all_logits = tl.zeros([BM], tl.float32)
    found = tl.zeros([BM], tl.float32)
    for tile in range(0, RUN):
        column = (run * RUN + tile) * BN + tl.arange(0, BN)
        if (run * RUN + tile) * BN < V:
            z = logits(x, w, bias, row, column, M, V, x_row, w_row, softcap, scale, H, BK, SOFTCAP, PRECISION, UPCAST)
            valid = (column < V)[None, :]
            if kept is not None:
                to = kept + row.to(tl.int64)[:, None] * V + column[None, :]
                tl.store(to, z, mask=(row < M)[:, None] & valid)
            all_logits += tl.sum(tl.where(valid, z, 0.0), 1)
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
    tl.store(at + 3 * M, all_logits, mask=stored)
    first = run * RUN * BN
    here = (target >= first) & (target < tl.minimum(first + RUN * BN, V))
    tl.store(own + row, found, mask=stored & here)


@Kernel
@triton.jit
def linear_logprob_merge_kernel(
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


@Kernel
@triton.jit
def linear_logprob_gradient_kernel(
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
            z = logits(x, w, bias, row, column, M, V, x_row, w_row, softcap, scale, H, BK, SOFTCAP, PRECISION, UPCAST)
        u = z - tl.load(lse + row, mask=inside, other=0.0)[:, None]
        spread = tl.load(entropy + row, mask=inside, other=0.0)
        p = tl.exp(u)
        own = column[None, :] == tl.load(targets + row, mask=inside, other=-1)[:, None]
        chosen = expm1(tl.load(logp + row, mask=inside, other=0.0))[:, None]
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


def linear_logprob(a: Logprob) -> LogprobResult:
    x, weight = gathered(a.hidden, a.rows), rows_last(a.weight)
    bias = None if a.bias is None else a.bias.contiguous()
    count, vocabulary = x.shape[0], weight.shape[0]
    options = head.options_of(x, a.softcap)
    runs = cdiv(vocabulary, options["BN"] * head.RUN)
    partials = x.new_empty(runs, 4, count, dtype=torch.float32)
    # Where no run has the target, as for one outside the vocabulary, NaN stays.
    own = x.new_full((count,), float("nan"), dtype=torch.float32)
    found = tuple(x.new_empty(count, dtype=torch.float32) for _ in range(4))
    kept = x.new_empty((count, vocabulary) if a.keep else (0, 0), dtype=torch.float32)
    if count:
        linear_logprob_kernel[(cdiv(count, options["BM"]) * runs,)](
            x, weight, bias, a.targets.contiguous(), partials, own, kept if a.keep else None, count, vocabulary,
            x.stride(0), weight.stride(0), a.softcap, 1 / a.temperature, RUN=head.RUN, **options,
        )  # fmt: skip
        linear_logprob_merge_kernel[(cdiv(count, 128),)](
            partials, own, *found, count, vocabulary, runs, R=128, num_warps=4, enable_fp_fusion=False
        )
    return LogprobResult._make((*found, kept))


def linear_logprob_backward(a: LogprobBackward) -> Gradients:
    x, weight = gathered(a.hidden, a.rows), rows_last(a.weight)
    bias = None if a.bias is None else a.bias.contiguous()
    count, vocabulary = x.shape[0], weight.shape[0]
    grads = x.new_zeros(4, count, dtype=torch.float32)
    for to, given in zip(grads, (a.grad_logp, a.grad_lse, a.grad_entropy, a.grad_mean)):
        if given is not None:
            to.copy_(given)
    options = head.options_of(x, a.softcap)
    targets, kept = a.targets.contiguous(), a.kept if a.kept.numel() else None

    def launch(dz: Tensor, first: int, words: int) -> None:
        linear_logprob_gradient_kernel[(cdiv(count, options["BM"]) * cdiv(words, options["BN"]),)](
            x, weight, bias, targets, a.logp, a.lse, a.entropy, grads, kept, dz, count, vocabulary, first, words,
            x.stride(0), weight.stride(0), a.softcap, 1 / a.temperature, **options,
        )  # fmt: skip

    needs = a.need_hidden, a.need_weight, a.need_bias
    dhidden, dweight, dbias = head_gradients(a.hidden, a.rows, x, weight, needs, launch)
    return Gradients(dhidden, dweight, dbias if bias is None else dbias.to(bias.dtype))
