"""Schemas, fakes, backends, gradients and argument checks of the head's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from ..._positional import Implementation, Op

SAVES = ("auto", "nothing", "logits")


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _implementations(*backends: str, unless: Callable[..., str | None] | None = None) -> tuple[Any, ...]:
    """From "native:function" and "triton:function"."""
    devices = {"native": ("cpu",), "triton": ("cuda", "hip")}
    found = []
    for function in backends:
        name = function.split(":")[0]
        found.append(Implementation(name, function, devices[name], KERNEL_DTYPES, unless))
    return *found, Implementation("reference", f"reference:{function.split(':')[1]}")


def _unlike(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *_: Any) -> str | None:
    """The kernels of two heads want both of one dtype."""
    if (hidden.dtype, weight.dtype) == (teacher_hidden.dtype, teacher_weight.dtype):
        return None
    return f"the heads' dtypes differ: {describe(teacher_hidden)} beside {describe(hidden)}"


def _grads_like(tensors: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    some = tensors[0]
    assert some is not None
    return tuple(
        some.new_empty(0) if t is None else t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needs)
    )


def _fake_logprob(
    hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, rows: Any, temperature: float, softcap: float,
    keep: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    count, dtype = targets.shape[0], _wide(hidden)
    kept = hidden.new_empty((count, weight.shape[0]) if keep else (0, 0), dtype=dtype)
    return *(hidden.new_empty(count, dtype=dtype) for _ in range(4)), kept


_linear_logprob = Op(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? rows, float temperature, "
    "float softcap, bool keep, str backend) "
    "-> (Tensor logp, Tensor lse, Tensor entropy, Tensor mean_logit, Tensor kept)",
    package=__package__,
    key="hidden",
    implementations=_implementations("native:linear_logprob", "triton:linear_logprob"),
    fake=_fake_logprob,
)

_linear_logprob_backward = Op(
    "linear_logprob_backward(Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_mean, "
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? rows, Tensor logp, Tensor lse, "
    "Tensor entropy, Tensor kept, float temperature, float softcap, bool need_hidden, bool need_weight, "
    "bool need_bias, str backend) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    package=__package__,
    key="hidden",
    implementations=_implementations("native:linear_logprob_backward", "triton:linear_logprob_backward"),
    fake=lambda *args: _grads_like(args[4:7], args[15:18]),
)

_linear_ce = Op(
    "linear_ce(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? rows, Tensor? row_weight, "
    "float softcap, bool need_hidden, bool need_weight, bool need_bias, str backend) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    package=__package__,
    key="hidden",
    implementations=_implementations("native:linear_ce"),
    fake=lambda *args: (args[0].new_empty((), dtype=_wide(args[0])), *_grads_like(args[:3], args[7:10])),
)


def _fake_kl(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    rows, needs = args[2], args[6:8]
    count = hidden.shape[0] if rows is None else rows.shape[0]
    per_row = (hidden.new_empty(count, dtype=_wide(hidden)) for _ in range(3))
    return *per_row, *_grads_like((hidden, weight), needs)


_linear_kl = Op(
    "linear_kl(Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, Tensor? rows, "
    "Tensor? teacher_rows, Tensor? row_weight, float temperature, bool need_hidden, bool need_weight, str backend) "
    "-> (Tensor kl, Tensor lse, Tensor teacher_lse, Tensor grad_hidden, Tensor grad_weight)",
    package=__package__,
    key="hidden",
    implementations=_implementations("native:linear_kl", unless=_unlike),
    fake=_fake_kl,
)

_linear_kl_backward = Op(
    "linear_kl_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, "
    "Tensor? rows, Tensor? teacher_rows, Tensor lse, Tensor teacher_lse, float temperature, bool need_hidden, "
    "bool need_weight, str backend) -> (Tensor grad_hidden, Tensor grad_weight)",
    package=__package__,
    key="hidden",
    implementations=_implementations("native:linear_kl_backward", unless=lambda grad, *args: _unlike(*args)),
    fake=lambda *args: _grads_like(args[1:3], args[10:12]),
)


def _some(values: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(value if need else None for value, need in zip(values, needs))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        temperature, softcap, keep, backend = options
        *found, kept = _linear_logprob(hidden, weight, bias, targets, rows, temperature, softcap, keep, backend)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, *found[:3], kept)
        ctx.options = temperature, softcap, backend
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        temperature, softcap, backend = ctx.options
        found = _linear_logprob_backward(*grads, *ctx.saved_tensors, temperature, softcap, *needs, backend)
        return *_some(found, needs), None, None, None


class _LinearCE(torch.autograd.Function):
    """Gradients are made in the forward: right only because the result is one number."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None,
        row_weight: Tensor | None, options: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        needs = ctx.needs_input_grad[:3]
        loss, *grads = _linear_ce(hidden, weight, bias, targets, rows, row_weight, options[0], *needs, options[1])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx.saved_tensors, grads[0], ctx.needs_input_grad[:3]), None, None, None, None


def _scaled(values: tuple[Tensor, ...], by: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients made in the forward, times the upstream scalar: 1 in most training steps, and then not copied."""
    if not torch.compiler.is_compiling() and by.device.type == "cpu" and float(by) == 1:
        return _some(values, needs)
    return tuple(value * by.to(value.dtype) if need else None for value, need in zip(values, needs))


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, rows: Tensor | None,
        teacher_rows: Tensor | None, options: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        temperature, backend = options
        heads = hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows
        kl, lse, teacher_lse, *_ = _linear_kl(*heads, None, temperature, False, False, backend)
        ctx.save_for_backward(*heads, lse, teacher_lse)
        ctx.options = options
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        temperature, backend = ctx.options
        found = _linear_kl_backward(grads[0], *ctx.saved_tensors, temperature, *needs, backend)
        return *_some(found, needs), None, None, None, None, None


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
        kl, _, _, *grads = _linear_kl(*heads, row_weight, temperature, *needs, backend)
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


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, bias: Tensor | None, temperature: float,
    softcap: float, save: str, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_logprob(hidden, weight, targets, rows, bias, softcap)
    _check_number("temperature", temperature, zero=False)
    if save not in SAVES:
        raise ValueError(f"save: got {save!r}, expected one of {', '.join(map(repr, SAVES))}")
    hidden, weight = _cast(hidden, weight)
    if not _needs_grad(hidden, weight, bias):
        return _linear_logprob(hidden, weight, bias, targets, rows, temperature, softcap, False, backend)[:4]
    fits = targets.shape[0] * _wide(hidden).itemsize <= hidden.shape[1] * weight.element_size()
    keep = save == "logits" or save == "auto" and fits
    return _LinearLogprob.apply(hidden, weight, bias, targets, rows, (temperature, softcap, keep, backend))


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
    if _needs_grad(hidden, weight, bias) and _one_pass(hidden, weight):
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
    if _needs_grad(teacher_hidden, teacher_weight):
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    hidden, weight = _cast(hidden, weight)
    teacher_hidden, teacher_weight = _cast(teacher_hidden, teacher_weight)
    heads = hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows
    if row_weight is not None and _one_pass(hidden, weight):
        return _LinearKLSum.apply(*heads, row_weight, (temperature, backend))
    kl = _LinearKL.apply(*heads, (temperature, backend))
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
