"""The head's log-probabilities and their gradients in plain torch, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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

# Logits of a chunk of rows.
CHUNK = 1 << 24


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunks(count: int, vocabulary: int) -> Iterator[slice]:
    rows = max(1, CHUNK // vocabulary)
    return (slice(first, min(first + rows, count)) for first in range(0, count, rows))


def _gathered(hidden: Tensor, rows: Tensor | None) -> Tensor:
    return _wide(hidden if rows is None else hidden.index_select(0, rows))


def _scattered(grad: Tensor, hidden: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return grad.to(hidden.dtype)
    return grad.new_zeros(hidden.shape).index_add_(0, rows, grad).to(hidden.dtype)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float) -> Tensor:
    z = x @ weight.t()
    if bias is not None:
        z = z + bias
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def _through(dz: Tensor, z: Tensor, temperature: float, softcap: float) -> Tensor:
    """From the gradient of the logits to that of the product."""
    if softcap:
        dz = dz * (1 - (z * (temperature / softcap)).square())
    return dz / temperature


def linear_logprob(a: Logprob) -> LogprobResult:
    x, w, b = _gathered(a.hidden, a.rows), _wide(a.weight), None if a.bias is None else _wide(a.bias)
    count, vocabulary = a.targets.shape[0], a.weight.shape[0]
    logp, lse, entropy, mean = (x.new_empty(count) for _ in range(4))
    kept = x.new_empty(count if a.keep else 0, vocabulary if a.keep else 0)
    for part in _chunks(count, vocabulary):
        z = _logits(x[part], w, b, a.temperature, a.softcap)
        top = z.amax(1, keepdim=True)
        shifted = z - top
        p = shifted.exp()
        total = p.sum(1)
        log_total = total.log()
        own = a.targets[part, None]
        e, below = p.gather(1, own)[:, 0], shifted.gather(1, own)[:, 0]
        others = p.scatter(1, own, 0).sum(1)  # without the target: 1 - p keeps its digits where p is near 1
        lse[part] = top[:, 0] + log_total
        logp[part] = torch.where(e > others, -torch.log1p(others / e), below - log_total)
        # A word of probability 0 adds nothing, also where its logit is -inf.
        entropy[part] = log_total - torch.where(p > 0, p * shifted, p).sum(1) / total
        mean[part] = z.mean(1)
        if a.keep:
            kept[part] = z
    return LogprobResult(logp, lse, entropy, mean, kept)


def _coefficient(grad: Tensor | None, part: slice) -> Tensor | float:
    return 0.0 if grad is None else _wide(grad[part])[:, None]


def _logit_gradient(z: Tensor, a: LogprobBackward, part: slice) -> Tensor:
    grads = a.grad_logp, a.grad_lse, a.grad_entropy, a.grad_mean
    g_logp, g_lse, g_entropy, g_mean = (_coefficient(g, part) for g in grads)
    u = z - a.lse[part, None]
    p = u.exp()
    dz = -g_logp * p
    if a.grad_logp is not None:
        own = a.targets[part, None]
        dz.scatter_(1, own, -g_logp * torch.expm1(a.logp[part, None]))  # 1 - p with all its digits where p is near 1
    dz += p * g_lse
    if a.grad_entropy is not None:
        dz -= torch.where(p > 0, p * (g_entropy * (u + a.entropy[part, None])), p)
    return dz + g_mean / z.shape[1]


def linear_logprob_backward(a: LogprobBackward) -> Gradients:
    x, w, b = _gathered(a.hidden, a.rows), _wide(a.weight), None if a.bias is None else _wide(a.bias)
    count, vocabulary = a.targets.shape[0], a.weight.shape[0]
    dx = torch.zeros_like(x)
    dw = torch.zeros_like(w) if a.need_weight else None
    db = x.new_zeros(vocabulary if a.need_bias else 0)
    for part in _chunks(count, vocabulary):
        z = a.kept[part] if a.kept.numel() else _logits(x[part], w, b, a.temperature, a.softcap)
        dz = _through(_logit_gradient(z, a, part), z, a.temperature, a.softcap)
        if a.need_hidden:
            dx[part] = dz @ w
        if dw is not None:
            dw += dz.t() @ x[part]
        if a.need_bias:
            db += dz.sum(0)
    nothing = a.hidden.new_empty(0)
    return Gradients(
        _scattered(dx, a.hidden, a.rows) if a.need_hidden else nothing,
        a.weight.new_empty(0) if dw is None else dw.to(a.weight.dtype),
        db if a.bias is None else db.to(a.bias.dtype),
    )


def linear_ce(a: CrossEntropy) -> Loss:
    head = a.hidden, a.weight, a.bias, a.targets, a.rows
    logp, lse, entropy, _, kept = linear_logprob(Logprob(*head, 1.0, a.softcap, False))
    coefficient = torch.ones_like(logp) if a.row_weight is None else a.row_weight.to(logp.dtype)
    options = 1.0, a.softcap, a.need_hidden, a.need_weight, a.need_bias
    grads = linear_logprob_backward(
        LogprobBackward(-coefficient, None, None, None, *head, logp, lse, entropy, kept, *options)
    )
    return Loss(-(logp * coefficient).sum(), *grads)


def linear_kl(a: Divergence) -> Diverged:
    x, w = _gathered(a.hidden, a.rows), _wide(a.weight)
    teacher_x, teacher_w = _gathered(a.teacher_hidden, a.teacher_rows), _wide(a.teacher_weight)
    kl, lse, teacher_lse = (x.new_empty(x.shape[0]) for _ in range(3))
    dx = torch.zeros_like(x)
    dw = torch.zeros_like(w) if a.need_weight else None
    for part in _chunks(x.shape[0], w.shape[0]):
        z, teacher_z = x[part] @ w.t() / a.temperature, teacher_x[part] @ teacher_w.t() / a.temperature
        lse[part], teacher_lse[part] = z.logsumexp(1), teacher_z.logsumexp(1)
        gap = (teacher_z - teacher_lse[part, None]) - (z - lse[part, None])
        p, q = (z - lse[part, None]).exp(), (teacher_z - teacher_lse[part, None]).exp()
        kl[part] = torch.where(q > 0, q * gap, q).sum(1).clamp(min=0)
        if not a.need_hidden and not a.need_weight:
            continue
        # p - q with all its digits where they are close.
        dz = torch.where(gap.abs() < 1, -p * torch.expm1(gap.clamp(-1, 1)), p - q) / a.temperature
        if a.row_weight is not None:
            dz = dz * a.row_weight[part, None].to(dz.dtype)
        dx[part] = dz @ w
        if dw is not None:
            dw += dz.t() @ x[part]
    return Diverged(
        kl,
        lse,
        teacher_lse,
        _scattered(dx, a.hidden, a.rows) if a.need_hidden else a.hidden.new_empty(0),
        a.weight.new_empty(0) if dw is None else dw.to(a.weight.dtype),
    )


def linear_kl_backward(a: DivergenceBackward) -> DivergenceGradients:
    heads = a.hidden, a.weight, a.teacher_hidden, a.teacher_weight, a.rows, a.teacher_rows
    found = linear_kl(Divergence(*heads, a.grad, a.temperature, a.need_hidden, a.need_weight))
    return DivergenceGradients(found.hidden, found.weight)
