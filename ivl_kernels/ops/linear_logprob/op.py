"""Records, fakes, backends, gradients and argument checks of the head's log-probabilities."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._checks import (
    FLOATS,
    KERNEL_DTYPES,
    autocast_dtype,
    check_dtype,
    check_same,
    check_shape,
    check_tensor,
    describe,
)
from ..._dispatch import Implementation
from ..._library import Op, differentiable, needs_grad

SAVES = ("auto", "nothing", "logits")


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class Logprob(NamedTuple):
    hidden: Tensor  # [T, H]
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    rows: Tensor | None
    temperature: float
    softcap: float
    keep: bool


class LogprobResult(NamedTuple):
    logp: Tensor
    lse: Tensor
    entropy: Tensor
    mean_logit: Tensor
    kept: Tensor  # the logits [N, V], empty unless they are kept


class LogprobBackward(NamedTuple):
    grad_logp: Tensor | None
    grad_lse: Tensor | None
    grad_entropy: Tensor | None
    grad_mean: Tensor | None
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    rows: Tensor | None
    logp: Tensor
    lse: Tensor
    entropy: Tensor
    kept: Tensor
    temperature: float
    softcap: float
    need_hidden: bool
    need_weight: bool
    need_bias: bool


class Gradients(NamedTuple):
    """Empty where not needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


class CrossEntropy(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    rows: Tensor | None
    row_weight: Tensor | None
    softcap: float
    need_hidden: bool
    need_weight: bool
    need_bias: bool


class Loss(NamedTuple):
    """The loss, and gradients that are empty where not needed."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor


class Divergence(NamedTuple):
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    rows: Tensor | None
    teacher_rows: Tensor | None
    row_weight: Tensor | None
    temperature: float
    need_hidden: bool
    need_weight: bool


class Diverged(NamedTuple):
    """Gradients are of the sum weighted by `row_weight`, and empty where not needed."""

    kl: Tensor
    lse: Tensor
    teacher_lse: Tensor
    hidden: Tensor
    weight: Tensor


class DivergenceBackward(NamedTuple):
    grad: Tensor
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    rows: Tensor | None
    teacher_rows: Tensor | None
    lse: Tensor
    teacher_lse: Tensor
    temperature: float
    need_hidden: bool
    need_weight: bool


class DivergenceGradients(NamedTuple):
    """Empty where not needed."""

    hidden: Tensor
    weight: Tensor


def _unlike(a: Divergence | DivergenceBackward) -> str | None:
    """The kernels of two heads want both of one dtype."""
    if (a.hidden.dtype, a.weight.dtype) == (a.teacher_hidden.dtype, a.teacher_weight.dtype):
        return None
    return f"the heads' dtypes differ: {describe(a.teacher_hidden)} beside {describe(a.hidden)}"


def _fake_logprob(a: Logprob) -> LogprobResult:
    count, dtype = a.targets.shape[0], _wide(a.hidden)
    kept = a.hidden.new_empty((count, a.weight.shape[0]) if a.keep else (0, 0), dtype=dtype)
    return LogprobResult._make((*(a.hidden.new_empty(count, dtype=dtype) for _ in range(4)), kept))


def _fake_gradient(tensor: Tensor, need: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if need else (0,))


def _fake_gradients(a: LogprobBackward | CrossEntropy) -> Gradients:
    bias = a.hidden.new_empty(0) if a.bias is None else _fake_gradient(a.bias, a.need_bias)
    return Gradients(_fake_gradient(a.hidden, a.need_hidden), _fake_gradient(a.weight, a.need_weight), bias)


def _fake_divergence_gradients(a: Divergence | DivergenceBackward) -> DivergenceGradients:
    return DivergenceGradients(_fake_gradient(a.hidden, a.need_hidden), _fake_gradient(a.weight, a.need_weight))


def _fake_divergence(a: Divergence) -> Diverged:
    count = a.hidden.shape[0] if a.rows is None else a.rows.shape[0]
    per_row = (a.hidden.new_empty(count, dtype=_wide(a.hidden)) for _ in range(3))
    return Diverged._make((*per_row, *_fake_divergence_gradients(a)))


_BACKENDS = (
    Implementation("cpu", KERNEL_DTYPES),
    Implementation("triton", KERNEL_DTYPES),
    Implementation("reference"),
)
_TWO_HEADS = (
    Implementation("cpu", KERNEL_DTYPES, _unlike),
    Implementation("triton", KERNEL_DTYPES, _unlike),
    Implementation("reference"),
)

_linear_logprob = Op(
    "linear_logprob", Logprob, LogprobResult, key="hidden", implementations=_BACKENDS, fake=_fake_logprob
)

_linear_logprob_backward = Op(
    "linear_logprob_backward",
    LogprobBackward,
    Gradients,
    key="hidden",
    implementations=_BACKENDS,
    fake=_fake_gradients,
)

_linear_ce = Op(
    "linear_ce",
    CrossEntropy,
    Loss,
    key="hidden",
    implementations=(Implementation("cpu", KERNEL_DTYPES), Implementation("reference")),
    fake=lambda a: Loss(a.hidden.new_empty((), dtype=_wide(a.hidden)), *_fake_gradients(a)),
)

_linear_kl = Op("linear_kl", Divergence, Diverged, key="hidden", implementations=_TWO_HEADS, fake=_fake_divergence)

_linear_kl_backward = Op(
    "linear_kl_backward",
    DivergenceBackward,
    DivergenceGradients,
    key="hidden",
    implementations=_TWO_HEADS,
    fake=_fake_divergence_gradients,
)


def _logprob_gradients(saved: Any, needs: Any, backend: str, *grads: Tensor | None) -> dict[str, Tensor]:
    a, *found = saved
    options = a.temperature, a.softcap, needs.hidden, needs.weight, bool(needs.bias)
    heads = a.hidden, a.weight, a.bias, a.targets, a.rows
    return _linear_logprob_backward(LogprobBackward._make((*grads[:4], *heads, *found, *options)), backend)._asdict()


_differentiable_logprob = differentiable(
    _linear_logprob, lambda a, found: (a, found.logp, found.lse, found.entropy, found.kept), _logprob_gradients
)


def _kl_gradients(saved: Any, needs: Any, backend: str, grad: Tensor, *_: Any) -> dict[str, Tensor]:
    a, lse, teacher_lse = saved
    heads = a.hidden, a.weight, a.teacher_hidden, a.teacher_weight, a.rows, a.teacher_rows
    made = DivergenceBackward(grad, *heads, lse, teacher_lse, a.temperature, needs.hidden, needs.weight)
    return _linear_kl_backward(made, backend)._asdict()


_differentiable_kl = differentiable(_linear_kl, lambda a, found: (a, found.lse, found.teacher_lse), _kl_gradients)


class _LinearCE(torch.autograd.Function):
    """Gradients are made in the forward: right only because the result is one number."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None,
        row_weight: Tensor | None, options: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        softcap, backend = options
        needs = ctx.needs_input_grad[:3]
        made = CrossEntropy(hidden, weight, bias, targets, rows, row_weight, softcap, *needs)
        loss, *grads = _linear_ce(made, backend)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx.saved_tensors, grads[0], ctx.needs_input_grad[:3]), None, None, None, None


def _scaled(values: tuple[Tensor, ...], by: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients made in the forward, times the upstream scalar: 1 in most training steps, and then not copied.

    But where the graph is kept: what is handed out becomes a parameter's gradient, which others add to and clip.
    """
    copied = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    if not copied and by.device.type == "cpu" and float(by) == 1:
        return tuple(value if need else None for value, need in zip(values, needs))
    return tuple(value * by.to(value.dtype) if need else None for value, need in zip(values, needs))


class _LinearKLSum(torch.autograd.Function):
    """The weighted sum of the divergences, with gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, rows: Tensor | None,
        teacher_rows: Tensor | None, row_weight: Tensor, options: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        temperature, backend = options
        heads = hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows
        needs = ctx.needs_input_grad[:2]
        kl, _, _, *grads = _linear_kl(Divergence(*heads, row_weight, temperature, *needs), backend)
        ctx.save_for_backward(*grads)
        return (kl * row_weight.to(kl.dtype)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx.saved_tensors, grads[0], ctx.needs_input_grad[:2]), *(None,) * 6


def _check_head(prefix: str, hidden: Tensor, weight: Tensor) -> None:
    for name, tensor in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight)):
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{name}: got a DTensor, expected a whole tensor: call this inside the head's own forward")
    check_dtype(f"{prefix}hidden", hidden, FLOATS)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden: got {describe(hidden)}, expected [..., H] with H > 0")
    check_tensor(f"{prefix}weight", weight)
    if weight.numel() == 0:
        raise ValueError(
            f"{prefix}weight: got {describe(weight)}, expected [V, {hidden.shape[-1]}] with V > 0 (a sharded parameter "
            "is gathered inside the head's own forward)"
        )
    check_shape(f"{prefix}weight", weight, ("V", hidden.shape[-1]))
    check_same(f"{prefix}weight", weight, f"{prefix}hidden", hidden, dtype=False)
    _check_wider(f"{prefix}weight", weight, f"{prefix}hidden", hidden)


def _check_wider(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The dtype of another, or float32 beside a 16-bit one; under autocast any."""
    pair = {tensor.dtype, other.dtype}
    if len(pair) == 1 or autocast_dtype(other) and torch.float64 not in pair:
        return
    if tensor.dtype != torch.float32 or other.dtype == torch.float64:
        raise TypeError(
            f"{name}: got {describe(tensor)}, expected the dtype of {other_name} ({other.dtype}) or float32"
        )


def _cast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast hidden states take its dtype; a float32 weight stays: the kernels cast it by the tile."""
    if dtype := autocast_dtype(hidden):
        hidden = hidden.to(dtype)
        if weight.dtype not in (dtype, torch.float32):
            weight = weight.to(dtype)
    return hidden.reshape(-1, hidden.shape[-1]), weight


def _check_index(name: str, index: Tensor, hidden: Tensor, below: int, what: str, count: int | None = None) -> None:
    check_dtype(name, index, (torch.int64,))
    check_shape(name, index, ("N" if count is None else count,))
    check_same(name, index, "hidden", hidden, dtype=False)
    # On a GPU the values are not read: it would wait. A target beyond the vocabulary gives NaN there.
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(index))
        if low < 0 or high >= below:
            raise ValueError(f"{name}: got {low if low < 0 else high}, expected {what} in [0, {below})")


def _check_rows(name: str, rows: Tensor | None, hidden: Tensor, count: int | None) -> int:
    total = hidden.numel() // hidden.shape[-1]
    if rows is not None:
        _check_index(name, rows, hidden, total, "rows of the hidden states", count)
        return rows.shape[0]
    if count is not None and count != total:
        raise ValueError(f"{name}: got None for {total} hidden states and {count} targets, expected [{count}] rows")
    return total


def _check_number(name: str, value: float, zero: bool) -> None:
    if not 0 <= value < float("inf") or (value == 0 and not zero):
        raise ValueError(f"{name}: got {value}, expected a finite number {'>= 0' if zero else '> 0'}")


def _check_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, bias: Tensor | None, softcap: float
) -> None:
    _check_head("", hidden, weight)
    if bias is not None:
        _check_bias(bias, weight)
    _check_index("targets", targets, hidden, weight.shape[0], "tokens")
    _check_rows("rows", rows, hidden, targets.shape[0])
    _check_number("softcap", softcap, zero=True)


def _check_bias(bias: Tensor, weight: Tensor) -> None:
    check_shape("bias", bias, (weight.shape[0],))
    check_same("bias", bias, "weight", weight, dtype=False)
    _check_wider("bias", bias, "weight", weight)


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, bias: Tensor | None, temperature: float,
    softcap: float, save: str, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_logprob(hidden, weight, targets, rows, bias, softcap)
    _check_number("temperature", temperature, zero=False)
    if save not in SAVES:
        raise ValueError(f"save: got {save!r}, expected one of {', '.join(map(repr, SAVES))}")
    hidden, weight = _cast(hidden, weight)
    fits = targets.shape[0] * _wide(hidden).itemsize <= hidden.shape[1] * weight.element_size()
    keep = needs_grad((hidden, weight, bias)) and (save == "logits" or save == "auto" and fits)
    made = Logprob(hidden, weight, bias, targets, rows, temperature, softcap, keep)
    return _differentiable_logprob(made, backend)[:4]


def _one_pass(hidden: Tensor, weight: Tensor) -> bool:
    """Rows outermost: where the weight's gradient can be added to in its own dtype."""
    return weight.dtype == _wide(hidden) and hidden.device.type == "cpu"


def linear_ce(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, row_weight: Tensor | None,
    bias: Tensor | None, softcap: float, backend: str,
) -> Tensor:  # fmt: skip
    _check_logprob(hidden, weight, targets, rows, bias, softcap)
    if row_weight is not None:
        _check_row_weight(row_weight, targets.shape[0], hidden)
    hidden, weight = _cast(hidden, weight)
    if needs_grad((hidden, weight, bias)) and _one_pass(hidden, weight):
        return _LinearCE.apply(hidden, weight, bias, targets, rows, row_weight, (softcap, backend))
    logp = linear_logprob(hidden, weight, targets, rows, bias, 1.0, softcap, "auto", backend)[0]
    return -(logp if row_weight is None else logp * row_weight.to(logp.dtype)).sum()


def _check_row_weight(row_weight: Tensor, count: int, hidden: Tensor) -> None:
    check_dtype("row_weight", row_weight, (torch.float32, torch.float64))
    check_shape("row_weight", row_weight, (count,))
    check_same("row_weight", row_weight, "hidden", hidden, dtype=False)
    if row_weight.requires_grad:
        raise ValueError("row_weight: got one that requires gradients, expected a constant (use the per-row results)")


def linear_kl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, rows: Tensor | None,
    teacher_rows: Tensor | None, row_weight: Tensor | None, temperature: float, backend: str,
) -> Tensor:  # fmt: skip
    _check_head("", hidden, weight)
    _check_head("teacher_", teacher_hidden, teacher_weight)
    check_same("teacher_hidden", teacher_hidden, "hidden", hidden, dtype=False)
    if teacher_weight.shape[0] != weight.shape[0]:
        check_shape("teacher_weight", teacher_weight, (weight.shape[0], teacher_hidden.shape[-1]))
    if _wide(teacher_hidden) != _wide(hidden):
        check_dtype("teacher_hidden", teacher_hidden, (hidden.dtype,))
    count = _check_rows("rows", rows, hidden, None)
    _check_rows("teacher_rows", teacher_rows, teacher_hidden, count)
    _check_number("temperature", temperature, zero=False)
    if row_weight is not None:
        _check_row_weight(row_weight, count, hidden)
    if needs_grad((teacher_hidden, teacher_weight)):
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    hidden, weight = _cast(hidden, weight)
    teacher_hidden, teacher_weight = _cast(teacher_hidden, teacher_weight)
    heads = hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows
    if row_weight is not None and _one_pass(hidden, weight):
        return _LinearKLSum.apply(*heads, row_weight, (temperature, backend))
    kl = _differentiable_kl(Divergence(*heads, None, temperature, False, False), backend).kl
    return kl if row_weight is None else (kl * row_weight.to(kl.dtype)).sum()


def linear_candidates(
    hidden: Tensor, weight: Tensor, candidates: Tensor, rows: Tensor | None, bias: Tensor | None
) -> Tensor:
    _check_head("", hidden, weight)
    _check_index("candidates", candidates, hidden, weight.shape[0], "tokens")
    count = _check_rows("rows", rows, hidden, None)
    if bias is not None:
        _check_bias(bias, weight)
    hidden, weight = _cast(hidden, weight)
    x = (hidden if rows is None else hidden.index_select(0, rows)).to(_wide(hidden))
    words = weight.index_select(0, candidates).to(x.dtype)
    # A sum a word, not a product of matrices: a row's logits do not depend on the other rows.
    columns = [(x * word).sum(1) for word in words]
    logits = torch.stack(columns, 1) if columns else x.new_empty(count, 0)
    return logits if bias is None else logits + bias.index_select(0, candidates).to(x.dtype)
