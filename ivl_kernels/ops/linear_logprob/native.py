"""The head's log-probabilities on the CPU: thin calls into csrc/cpu/linear_logprob.cpp."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import _native

# Logits that a pass with gradients in the forward holds at a time, in bytes.
CHUNK = 160 << 20


@functools.cache
def _kernel(name: str) -> Any:
    return _native.op(name)


def _gathered(hidden: Tensor, rows: Tensor | None) -> Tensor:
    x = hidden if rows is None else hidden.index_select(0, rows)
    return x if x.stride(1) == 1 else x.contiguous()


def _head(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    return weight, None if bias is None else bias.float().contiguous()


def _scattered(grad: Tensor, hidden: Tensor, rows: Tensor | None) -> Tensor:
    return grad if rows is None else hidden.new_zeros(hidden.shape).index_add_(0, rows, grad)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, softcap: float, kept: Tensor
) -> tuple[Tensor, ...]:
    found = tuple(torch.empty(targets.shape[0]) for _ in range(4))
    _kernel("linear_logprob")(x, weight, bias, targets, temperature, softcap, *found, kept)
    return found


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    temperature: float,
    softcap: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    kept = torch.empty((targets.shape[0], weight.shape[0]) if keep else (0, 0))
    x = _gathered(hidden, rows)
    return *_forward(x, *_head(weight, bias), targets.contiguous(), temperature, softcap, kept), kept


def linear_logprob_backward(
    grad_logp: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    grad_mean: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    kept: Tensor,
    temperature: float,
    softcap: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.zeros(4, targets.shape[0])
    for to, given in zip(grads, (grad_logp, grad_lse, grad_entropy, grad_mean)):
        if given is not None:
            to.copy_(given)
    live = (grads != 0).any(0)
    if not bool(live.all()):
        chosen = live.nonzero().squeeze(1)
        rows = chosen if rows is None else rows[chosen]
        grads, targets = grads[:, chosen], targets[chosen]
        logp, lse, entropy = logp[chosen], lse[chosen], entropy[chosen]
        kept = kept[chosen] if kept.numel() else kept
    x = _gathered(hidden, rows)
    dx = x.new_empty(x.shape if need_hidden else 0)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    dbias = torch.empty(weight.shape[0] if need_bias else 0)
    if targets.shape[0] == 0:
        dweight.zero_()
        dbias.zero_()
    _kernel("linear_logprob_backward")(
        grads.contiguous(), x, *_head(weight, bias), targets.contiguous(), logp, lse, entropy, kept, temperature,
        softcap, dx, dweight, dbias, False,
    )  # fmt: skip
    if bias is not None:
        dbias = dbias.to(bias.dtype)
    return _scattered(dx, hidden, rows) if need_hidden else dx, dweight, dbias


def linear_ce(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    softcap: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some rows at a time: their logits, which become gradients, which are added to the weight's."""
    count, targets = targets.shape[0], targets.contiguous()
    head = _head(weight, bias)
    coefficient = torch.ones(count) if row_weight is None else row_weight.float()
    x = _gathered(hidden, rows)
    dx = x.new_empty(x.shape if need_hidden else 0)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    dbias = torch.empty(weight.shape[0] if need_bias else 0)
    if count == 0:
        dweight.zero_()
        dbias.zero_()
    logp = torch.empty(count)
    most = max(32, CHUNK // (4 * weight.shape[0]))
    chunks = -(-count // most)
    kept = torch.empty(-(-count // max(1, chunks)), weight.shape[0])
    for chunk in range(chunks):
        part = slice(count * chunk // chunks, count * (chunk + 1) // chunks)
        logits = kept[: part.stop - part.start]
        logp[part], lse, entropy, _ = _forward(x[part], *head, targets[part], 1.0, softcap, logits)
        grads = torch.zeros(4, part.stop - part.start)
        grads[0] = -coefficient[part]
        _kernel("linear_logprob_backward")(
            grads, x[part], *head, targets[part], logp[part], lse, entropy, logits, 1.0, softcap,
            dx[part] if need_hidden else dx, dweight, dbias, chunk > 0,
        )  # fmt: skip
    loss = -(logp.double() * coefficient).sum().float()
    if bias is not None:
        dbias = dbias.to(bias.dtype)
    return loss, _scattered(dx, hidden, rows) if need_hidden else dx, dweight, dbias


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    """With gradients: some rows at a time, from the logits of both heads."""
    x, teacher_x = _gathered(hidden, rows), _gathered(teacher_hidden, teacher_rows)
    (weight, _), (teacher_weight, _) = _head(weight, None), _head(teacher_weight, None)
    count = x.shape[0]
    kl, lse, teacher_lse = (torch.empty(count) for _ in range(3))
    dx = x.new_empty(x.shape if need_hidden else 0)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    if not need_hidden and not need_weight:
        _kernel("linear_kl")(x, weight, teacher_x, teacher_weight, temperature, kl, lse, teacher_lse)
        return kl, lse, teacher_lse, dx, dweight
    if count == 0:
        dweight.zero_()
    grad = torch.ones(count) if row_weight is None else row_weight.float().contiguous()
    targets = torch.zeros(count, dtype=torch.int64)
    most = max(32, 2 * CHUNK // (8 * weight.shape[0]))
    chunks = -(-count // most)
    kept = torch.empty(2, -(-count // max(1, chunks)), weight.shape[0])
    for chunk in range(chunks):
        part = slice(count * chunk // chunks, count * (chunk + 1) // chunks)
        logits, teacher_logits = kept[:, : part.stop - part.start]
        _, lse[part], *_ = _forward(x[part], weight, None, targets[part], temperature, 0.0, logits)
        _, teacher_lse[part], *_ = _forward(
            teacher_x[part], teacher_weight, None, targets[part], temperature, 0.0, teacher_logits
        )
        _kernel("linear_kl_backward")(
            grad[part], x[part], weight, teacher_x[part], teacher_weight, lse[part], teacher_lse[part], logits,
            teacher_logits, temperature, kl[part], dx[part] if need_hidden else dx, dweight, chunk > 0,
        )  # fmt: skip
    return kl, lse, teacher_lse, _scattered(dx, hidden, rows) if need_hidden else dx, dweight


def linear_kl_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    lse: Tensor,
    teacher_lse: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    live = (grad != 0).nonzero().squeeze(1)
    if len(live) < grad.shape[0]:
        grad, lse, teacher_lse = grad[live], lse[live], teacher_lse[live]
        rows = live if rows is None else rows[live]
        teacher_rows = live if teacher_rows is None else teacher_rows[live]
    x, teacher_x = _gathered(hidden, rows), _gathered(teacher_hidden, teacher_rows)
    (weight, _), (teacher_weight, _) = _head(weight, None), _head(teacher_weight, None)
    dx = x.new_empty(x.shape if need_hidden else 0)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    if len(live) == 0:
        dweight.zero_()
    none = torch.empty(0)
    _kernel("linear_kl_backward")(
        grad.float().contiguous(), x, weight, teacher_x, teacher_weight, lse, teacher_lse, none, none, temperature,
        none, dx, dweight, False,
    )  # fmt: skip
    return _scattered(dx, hidden, rows) if need_hidden else dx, dweight
