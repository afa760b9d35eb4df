"""The head's log-probabilities and their gradients in plain torch, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    temperature: float,
    softcap: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, w, b = _gathered(hidden, rows), _wide(weight), None if bias is None else _wide(bias)
    count, vocabulary = targets.shape[0], weight.shape[0]
    logp, lse, entropy, mean = (x.new_empty(count) for _ in range(4))
    kept = x.new_empty(count if keep else 0, vocabulary if keep else 0)
    for part in _chunks(count, vocabulary):
        z = _logits(x[part], w, b, temperature, softcap)
        top = z.amax(1, keepdim=True)
        shifted = z - top
        p = shifted.exp()
        total = p.sum(1)
        log_total = total.log()
        own = targets[part, None]
        e, below = p.gather(1, own)[:, 0], shifted.gather(1, own)[:, 0]
        others = p.scatter(1, own, 0).sum(1)  # without the target: 1 - p keeps its digits where p is near 1
        lse[part] = top[:, 0] + log_total
        logp[part] = torch.where(e > others, -torch.log1p(others / e), below - log_total)
        # A word of probability 0 adds nothing, also where its logit is -inf.
        entropy[part] = log_total - torch.where(p > 0, p * shifted, p).sum(1) / total
        mean[part] = z.mean(1)
        if keep:
            kept[part] = z
    return logp, lse, entropy, mean, kept


def _coefficient(grad: Tensor | None, part: slice) -> Tensor | float:
    return 0.0 if grad is None else _wide(grad[part])[:, None]


def _logit_gradient(
    z: Tensor, targets: Tensor, logp: Tensor, lse: Tensor, entropy: Tensor, grads: tuple[Tensor | None, ...],
    part: slice,
) -> Tensor:  # fmt: skip
    g_logp, g_lse, g_entropy, g_mean = (_coefficient(g, part) for g in grads)
    u = z - lse[part, None]
    p = u.exp()
    dz = -g_logp * p
    if grads[0] is not None:
        own = targets[part, None]
        dz.scatter_(1, own, -g_logp * torch.expm1(logp[part, None]))  # 1 - p with all its digits where p is near 1
    dz += p * g_lse
    if grads[2] is not None:
        dz -= torch.where(p > 0, p * (g_entropy * (u + entropy[part, None])), p)
    return dz + g_mean / z.shape[1]


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
    x, w, b = _gathered(hidden, rows), _wide(weight), None if bias is None else _wide(bias)
    count, vocabulary = targets.shape[0], weight.shape[0]
    dx = torch.zeros_like(x)
    dw = torch.zeros_like(w) if need_weight else None
    db = x.new_zeros(vocabulary if need_bias else 0)
    grads = (grad_logp, grad_lse, grad_entropy, grad_mean)
    for part in _chunks(count, vocabulary):
        z = kept[part] if kept.numel() else _logits(x[part], w, b, temperature, softcap)
        dz = _through(_logit_gradient(z, targets, logp, lse, entropy, grads, part), z, temperature, softcap)
        if need_hidden:
            dx[part] = dz @ w
        if dw is not None:
            dw += dz.t() @ x[part]
        if need_bias:
            db += dz.sum(0)
    nothing = hidden.new_empty(0)
    return (
        _scattered(dx, hidden, rows) if need_hidden else nothing,
        weight.new_empty(0) if dw is None else dw.to(weight.dtype),
        db if bias is None else db.to(bias.dtype),
    )


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
    logp, lse, entropy, _, kept = linear_logprob(hidden, weight, bias, targets, rows, 1.0, softcap, False)
    coefficient = torch.ones_like(logp) if row_weight is None else row_weight.to(logp.dtype)
    grads = linear_logprob_backward(
        -coefficient, None, None, None, hidden, weight, bias, targets, rows, logp, lse, entropy, kept, 1.0, softcap,
        need_hidden, need_weight, need_bias,
    )  # fmt: skip
    return -(logp * coefficient).sum(), *grads


def _kl(
    grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The divergence of each row, lse of both heads, and the gradients of the rows' sum weighted by `grad`."""
    x, w = _gathered(hidden, rows), _wide(weight)
    teacher_x, teacher_w = _gathered(teacher_hidden, teacher_rows), _wide(teacher_weight)
    kl, lse, teacher_lse = (x.new_empty(x.shape[0]) for _ in range(3))
    dx = torch.zeros_like(x)
    dw = torch.zeros_like(w) if need_weight else None
    for part in _chunks(x.shape[0], w.shape[0]):
        z, teacher_z = x[part] @ w.t() / temperature, teacher_x[part] @ teacher_w.t() / temperature
        lse[part], teacher_lse[part] = z.logsumexp(1), teacher_z.logsumexp(1)
        gap = (teacher_z - teacher_lse[part, None]) - (z - lse[part, None])
        p, q = (z - lse[part, None]).exp(), (teacher_z - teacher_lse[part, None]).exp()
        kl[part] = torch.where(q > 0, q * gap, q).sum(1).clamp(min=0)
        if not need_hidden and not need_weight:
            continue
        # p - q with all its digits where they are close.
        dz = torch.where(gap.abs() < 1, -p * torch.expm1(gap.clamp(-1, 1)), p - q) / temperature
        if grad is not None:
            dz = dz * grad[part, None].to(dz.dtype)
        dx[part] = dz @ w
        if dw is not None:
            dw += dz.t() @ x[part]
    return (
        kl,
        lse,
        teacher_lse,
        _scattered(dx, hidden, rows) if need_hidden else hidden.new_empty(0),
        weight.new_empty(0) if dw is None else dw.to(weight.dtype),
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _kl(
        row_weight, hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows, temperature, need_hidden,
        need_weight,
    )  # fmt: skip


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
    heads = hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows
    return _kl(grad, *heads, temperature, need_hidden, need_weight)[3:]
