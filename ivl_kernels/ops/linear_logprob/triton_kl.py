"""The divergence between two heads on GPUs, as `triton` has the log-probabilities of one: two tiles of logits at once.

Forward: each program adds up a run of the vocabulary of both heads, a second kernel merges the runs in their order.
Backward: both products once more, a tile of the vocabulary at a time, end in p - q; the vendor's products follow.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import Kernel, cdiv
from . import triton_head as head
from .op import Diverged, Divergence, DivergenceBackward, DivergenceGradients
from .triton_head import LOWEST, expm1_series, gathered, head_gradients, logits, rows_last


@Kernel
@triton.jit
def linear_kl_kernel(
    x, w, y, u,  # [M, H] and [V, H] by rows: the student; [M, G] and [V, G]: the teacher
    partials,  # [runs, 5, M]: the student's max and sum, the teacher's, and the cross sum below
    M, V, x_row, w_row, y_row, u_row, scale,
    H: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, run of RUN tiles of the vocabulary).

    With z of the student and t of the teacher, both below their maxima, the cross sum is sum e^t (t - z).
    """
    blocks = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    run = pid // blocks
    row = pid % blocks * BM + tl.arange(0, BM)
    most = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    teacher_most = tl.full([BM], LOWEST, tl.float32)
    teacher_total = tl.zeros([BM], tl.float32)
    cross = tl.zeros([BM], tl.float32)
    for tile in range(0, RUN):
        column = (run * RUN + tile) * BN + tl.arange(0, BN)
        if (run * RUN + tile) * BN < V:
            valid = (column < V)[None, :]
            z = logits(x, w, None, row, column, M, V, x_row, w_row, 0.0, scale, H, BK, False, PRECISION, UPCAST)
            t = logits(y, u, None, row, column, M, V, y_row, u_row, 0.0, scale, G, BK, False, PRECISION, UPCAST)
            z = tl.where(valid, z, float("-inf"))
            t = tl.where(valid, t, float("-inf"))
            higher = tl.maximum(most, tl.max(z, 1))
            teacher_higher = tl.maximum(teacher_most, tl.max(t, 1))
            down = most - higher
            teacher_down = teacher_most - teacher_higher
            shrink = tl.exp(teacher_down)
            cross = tl.where(teacher_total != 0, (cross + teacher_total * (teacher_down - down)) * shrink, 0.0)
            below = z - higher[:, None]
            teacher_below = t - teacher_higher[:, None]
            total = total * tl.exp(down) + tl.sum(tl.exp(below), 1)
            e = tl.exp(teacher_below)
            teacher_total = teacher_total * shrink + tl.sum(e, 1)
            cross += tl.sum(tl.where(e == 0, 0.0, e * (teacher_below - below)), 1)
            most = higher
            teacher_most = teacher_higher
    stored = row < M
    at = partials + run.to(tl.int64) * (5 * M) + row
    tl.store(at, most, mask=stored)
    tl.store(at + M, total, mask=stored)
    tl.store(at + 2 * M, teacher_most, mask=stored)
    tl.store(at + 3 * M, teacher_total, mask=stored)
    tl.store(at + 4 * M, cross, mask=stored)


@Kernel
@triton.jit
def linear_kl_merge_kernel(
    partials,  # as above
    kl, lse, teacher_lse,  # [M]
    M, runs, R: tl.constexpr,
):  # fmt: skip
    """Program (R rows): the runs in their order."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < M
    most = tl.full([R], LOWEST, tl.float32)
    teacher_most = tl.full([R], LOWEST, tl.float32)
    at = partials + row
    for _ in range(0, runs):
        most = tl.maximum(most, tl.load(at, mask=inside, other=0.0))
        teacher_most = tl.maximum(teacher_most, tl.load(at + 2 * M, mask=inside, other=0.0))
        at += 5 * M
    total = tl.zeros([R], tl.float32)
    teacher_total = tl.zeros([R], tl.float32)
    cross = tl.zeros([R], tl.float32)
    at = partials + row
    for _ in range(0, runs):
        down = tl.load(at, mask=inside, other=0.0) - most
        teacher_down = tl.load(at + 2 * M, mask=inside, other=0.0) - teacher_most
        part = tl.load(at + 3 * M, mask=inside, other=0.0)
        shrink = tl.exp(teacher_down)
        total += tl.exp(down) * tl.load(at + M, mask=inside, other=0.0)
        teacher_total += shrink * part
        shifted = tl.load(at + 4 * M, mask=inside, other=0.0) + part * (teacher_down - down)
        cross += tl.where(part * shrink != 0, shifted * shrink, 0.0)
        at += 5 * M
    log_total = tl.log(total)
    log_teacher = tl.log(teacher_total)
    found = cross / teacher_total - log_teacher + log_total
    tl.store(kl + row, tl.where(found < 0, 0.0, found), mask=inside)
    tl.store(lse + row, most + log_total, mask=inside)
    tl.store(teacher_lse + row, teacher_most + log_teacher, mask=inside)


@Kernel
@triton.jit
def linear_kl_gradient_kernel(
    x, w, y, u, lse, teacher_lse,  # as above
    grad,  # [M]
    dz,  # [M, words]: words [first, first + words) of the vocabulary
    M, V, first, words, x_row, w_row, y_row, u_row, scale,
    H: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, tile of words): grad (p - q), zero for rows without any."""
    blocks = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    row = pid % blocks * BM + tl.arange(0, BM)
    inside = row < M
    word = pid // blocks * BN + tl.arange(0, BN)
    g = tl.load(grad + row, mask=inside, other=0.0)
    to = dz + row.to(tl.int64)[:, None] * words + word[None, :]
    stored = inside[:, None] & (word < words)[None, :]
    if tl.min((g == 0).to(tl.int32), 0) == 1:
        tl.store(to, tl.zeros([BM, BN], dz.dtype.element_ty), mask=stored)
    else:
        column = first + word
        z = logits(x, w, None, row, column, M, V, x_row, w_row, 0.0, scale, H, BK, False, PRECISION, UPCAST)
        t = logits(y, u, None, row, column, M, V, y_row, u_row, 0.0, scale, G, BK, False, PRECISION, UPCAST)
        log_p = z - tl.load(lse + row, mask=inside, other=0.0)[:, None]
        log_q = t - tl.load(teacher_lse + row, mask=inside, other=0.0)[:, None]
        gap = log_q - log_p
        p = tl.exp(log_p)
        # p - q with all its digits where they are close.
        d = tl.where(tl.abs(gap) < 0.5, -p * expm1_series(gap), p - tl.exp(log_q)) * (g * scale)[:, None]
        tl.store(to, tl.where((g == 0)[:, None], 0.0, d).to(dz.dtype.element_ty), mask=stored)


def _pair(a: Divergence | DivergenceBackward) -> tuple[list[Tensor], list[int], dict[str, Any]]:
    """The operands of both heads, the strides of their rows, and the options of a kernel."""
    x, y = gathered(a.hidden, a.rows), gathered(a.teacher_hidden, a.teacher_rows)
    heads = [x, rows_last(a.weight), y, rows_last(a.teacher_weight)]
    options = head.options_of(max(x, y, key=lambda t: t.shape[1]), 0.0)
    del options["SOFTCAP"]
    # Two products' sums are in registers at once.
    options |= {"H": x.shape[1], "G": y.shape[1], "BN": min(options["BN"], 64)}
    return heads, [t.stride(0) for t in heads], options


def linear_kl(a: Divergence) -> Diverged:
    heads, strides, options = _pair(a)
    count, vocabulary = heads[0].shape[0], heads[1].shape[0]
    runs = cdiv(vocabulary, options["BN"] * head.RUN)
    kl, lse, teacher_lse = (heads[0].new_empty(count, dtype=torch.float32) for _ in range(3))
    if count:
        partials = heads[0].new_empty(runs, 5, count, dtype=torch.float32)
        linear_kl_kernel[(cdiv(count, options["BM"]) * runs,)](
            *heads, partials, count, vocabulary, *strides, 1 / a.temperature, RUN=head.RUN, **options
        )
        linear_kl_merge_kernel[(cdiv(count, 128),)](
            partials, kl, lse, teacher_lse, count, runs, R=128, num_warps=4, enable_fp_fusion=False
        )
    weight = torch.ones_like(kl) if a.row_weight is None else a.row_weight
    hidden, rows = (a.hidden, a.weight, a.teacher_hidden, a.teacher_weight), (a.rows, a.teacher_rows)
    made = DivergenceBackward(
        weight, *hidden, *rows, lse, teacher_lse, a.temperature, a.need_hidden, a.need_weight
    )  # fmt: skip
    grads = linear_kl_backward(made) if a.need_hidden or a.need_weight else (a.hidden.new_empty(0),) * 2
    return Diverged(kl, lse, teacher_lse, *grads)


def linear_kl_backward(a: DivergenceBackward) -> DivergenceGradients:
    heads, strides, options = _pair(a)
    count, vocabulary = heads[0].shape[0], heads[1].shape[0]
    grad = a.grad.float().contiguous()

    def launch(dz: Tensor, first: int, words: int) -> None:
        linear_kl_gradient_kernel[(cdiv(count, options["BM"]) * cdiv(words, options["BN"]),)](
            *heads, a.lse, a.teacher_lse, grad, dz, count, vocabulary, first, words, *strides, 1 / a.temperature,
            **options,
        )  # fmt: skip

    needs = a.need_hidden, a.need_weight, False
    return DivergenceGradients(*head_gradients(a.hidden, a.rows, heads[0], heads[1], needs, launch)[:2])
