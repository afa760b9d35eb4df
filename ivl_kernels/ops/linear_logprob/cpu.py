"""The head's log-probabilities on the CPU: thin calls into csrc/cpu/linear_logprob.cpp."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import _cpu
from .op import (
    CrossEntropy,
    Diverged,
    Divergence,
    DivergenceBackward,
    DivergenceGradients,
    Gradients,
    Logprob,
    LogprobBackward,
    LogprobResult,
    Loss,
)

# Logits that a pass with gradients in the forward holds at a time, in bytes.
CHUNK = 160 << 20


@functools.cache
def _kernel(name: str) -> Any:
    return _cpu.op(name)


def _floats(*shape: int) -> Tensor:
    """float32 to be written, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


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
    found = tuple(_floats(targets.shape[0]) for _ in range(4))
    _kernel("linear_logprob")(x, weight, bias, targets, temperature, softcap, *found, kept)
    return found


def linear_logprob(a: Logprob) -> LogprobResult:
    kept = _floats(*((a.targets.shape[0], a.weight.shape[0]) if a.keep else (0, 0)))
    x = _gathered(a.hidden, a.rows)
    found = _forward(x, *_head(a.weight, a.bias), a.targets.contiguous(), a.temperature, a.softcap, kept)
    return LogprobResult._make((*found, kept))


def linear_logprob_backward(a: LogprobBackward) -> Gradients:
    targets, rows, logp, lse, entropy, kept = a.targets, a.rows, a.logp, a.lse, a.entropy, a.kept
    grads = _floats(4, targets.shape[0]).zero_()
    for to, given in zip(grads, (a.grad_logp, a.grad_lse, a.grad_entropy, a.grad_mean)):
        if given is not None:
            to.copy_(given)
    live = (grads != 0).any(0)
    if not bool(live.all()):
        chosen = live.nonzero().squeeze(1)
        rows = chosen if rows is None else rows[chosen]
        grads, targets = grads[:, chosen], targets[chosen]
        logp, lse, entropy = logp[chosen], lse[chosen], entropy[chosen]
        kept = kept[chosen] if kept.numel() else kept
    x = _gathered(a.hidden, rows)
    dx = x.new_empty(x.shape if a.need_hidden else 0)
    dweight = a.weight.new_empty(a.weight.shape if a.need_weight else 0)
    dbias = _floats(a.weight.shape[0] if a.need_bias else 0)
    if targets.shape[0] == 0:
        dweight.zero_()
        dbias.zero_()
    _kernel("linear_logprob_backward")(
        grads.contiguous(), x, *_head(a.weight, a.bias), targets.contiguous(), logp, lse, entropy, kept, a.temperature,
        a.softcap, dx, dweight, dbias, False,
    )  # fmt: skip
    if a.bias is not None:
        dbias = dbias.to(a.bias.dtype)
    return Gradients(_scattered(dx, a.hidden, rows) if a.need_hidden else dx, dweight, dbias)


def linear_ce(a: CrossEntropy) -> Loss:
    """Some rows at a time: their logits, which become gradients, which are added to the weight's."""
    count, targets = a.targets.shape[0], a.targets.contiguous()
    head = _head(a.weight, a.bias)
    coefficient = _floats(count).fill_(1) if a.row_weight is None else a.row_weight.float()
    x = _gathered(a.hidden, a.rows)
    dx = x.new_empty(x.shape if a.need_hidden else 0)
    dweight = a.weight.new_empty(a.weight.shape if a.need_weight else 0)
    dbias = _floats(a.weight.shape[0] if a.need_bias else 0)
    if count == 0:
        dweight.zero_()
        dbias.zero_()
    logp = _floats(count)
    most = max(32, CHUNK // (4 * a.weight.shape[0]))
    chunks = -(-count // most)
    kept = _floats(-(-count // max(1, chunks)), a.weight.shape[0])
    for chunk in range(chunks):
        part = slice(count * chunk // chunks, count * (chunk + 1) // chunks)
        logits = kept[: part.stop - part.start]
        logp[part], lse, entropy, _ = _forward(x[part], *head, targets[part], 1.0, a.softcap, logits)
        grads = _floats(4, part.stop - part.start).zero_()
        grads[0] = -coefficient[part]
        _kernel("linear_logprob_backward")(
            grads, x[part], *head, targets[part], logp[part], lse, entropy, logits, 1.0, a.softcap,
            dx[part] if a.need_hidden else dx, dweight, dbias, chunk > 0,
        )  # fmt: skip
    loss = -(logp.double() * coefficient).sum().float()
    if a.bias is not None:
        dbias = dbias.to(a.bias.dtype)
    return Loss(loss, _scattered(dx, a.hidden, a.rows) if a.need_hidden else dx, dweight, dbias)


def linear_kl(a: Divergence) -> Diverged:
    """With gradients: some rows at a time, from the logits of both heads."""
    x, teacher_x = _gathered(a.hidden, a.rows), _gathered(a.teacher_hidden, a.teacher_rows)
    (weight, _), (teacher_weight, _) = _head(a.weight, None), _head(a.teacher_weight, None)
    count = x.shape[0]
    kl, lse, teacher_lse = (_floats(count) for _ in range(3))
    dx = x.new_empty(x.shape if a.need_hidden else 0)
    dweight = weight.new_empty(weight.shape if a.need_weight else 0)
    if not a.need_hidden and not a.need_weight:
        _kernel("linear_kl")(x, weight, teacher_x, teacher_weight, a.temperature, kl, lse, teacher_lse)
        return Diverged(kl, lse, teacher_lse, dx, dweight)
    if count == 0:
        dweight.zero_()
    grad = _floats(count).fill_(1) if a.row_weight is None else a.row_weight.float().contiguous()
    targets = torch.zeros(count, dtype=torch.int64, device="cpu")
    most = max(32, 2 * CHUNK // (8 * weight.shape[0]))
    chunks = -(-count // most)
    kept = _floats(2, -(-count // max(1, chunks)), weight.shape[0])
    for chunk in range(chunks):
        part = slice(count * chunk // chunks, count * (chunk + 1) // chunks)
        logits, teacher_logits = kept[:, : part.stop - part.start]
        _, lse[part], *_ = _forward(x[part], weight, None, targets[part], a.temperature, 0.0, logits)
        _, teacher_lse[part], *_ = _forward(
            teacher_x[part], teacher_weight, None, targets[part], a.temperature, 0.0, teacher_logits
        )
        _kernel("linear_kl_backward")(
            grad[part], x[part], weight, teacher_x[part], teacher_weight, lse[part], teacher_lse[part], logits,
            teacher_logits, a.temperature, kl[part], dx[part] if a.need_hidden else dx, dweight, chunk > 0,
        )  # fmt: skip
    return Diverged(kl, lse, teacher_lse, _scattered(dx, a.hidden, a.rows) if a.need_hidden else dx, dweight)


def linear_kl_backward(a: DivergenceBackward) -> DivergenceGradients:
    grad, rows, teacher_rows, lse, teacher_lse = a.grad, a.rows, a.teacher_rows, a.lse, a.teacher_lse
    live = (grad != 0).nonzero().squeeze(1)
    if len(live) < grad.shape[0]:
        grad, lse, teacher_lse = grad[live], lse[live], teacher_lse[live]
        rows = live if rows is None else rows[live]
        teacher_rows = live if teacher_rows is None else teacher_rows[live]
    x, teacher_x = _gathered(a.hidden, rows), _gathered(a.teacher_hidden, teacher_rows)
    (weight, _), (teacher_weight, _) = _head(a.weight, None), _head(a.teacher_weight, None)
    dx = x.new_empty(x.shape if a.need_hidden else 0)
    dweight = weight.new_empty(weight.shape if a.need_weight else 0)
    if len(live) == 0:
        dweight.zero_()
    none = _floats(0)
    _kernel("linear_kl_backward")(
        grad.float().contiguous(), x, weight, teacher_x, teacher_weight, lse, teacher_lse, none, none, a.temperature,
        none, dx, dweight, False,
    )  # fmt: skip
    return DivergenceGradients(_scattered(dx, a.hidden, rows) if a.need_hidden else dx, dweight)
