"""Schemas, fakes, backends, gradients and argument checks of the tile router, and how its ops are put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..._checks import FLOAT_NAMES, FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape
from ..._dispatch import BackendError
from ..._positional import Implementation, Op
from . import reference


def _backends(function: str) -> tuple[Implementation, ...]:
    return (
        Implementation("native", f"native:{function}", ("cpu",), FLOAT_NAMES),
        Implementation("triton", f"triton:{function}", ("cuda", "hip"), KERNEL_DTYPES),
        Implementation("reference", f"reference:{function}"),
    )


_pool = Op(
    "tile_pool(Tensor z, Tensor u, str backend) -> (Tensor, Tensor)",
    package=__package__,
    key="z",
    implementations=_backends("tile_pool"),
    fake=lambda z, u, backend: (u.new_empty(u.shape), u.new_empty(u.shape[:2])),
)

_pool_backward = Op(
    "tile_pool_backward(Tensor z, Tensor u, Tensor pooled, Tensor lse, Tensor grad, bool need_z, str backend)"
    " -> (Tensor, Tensor)",
    package=__package__,
    key="z",
    implementations=_backends("tile_pool_backward"),
    fake=lambda z, u, pooled, lse, grad, need_z, backend: (
        z.new_empty(z.shape if need_z else (0,)),
        u.new_empty(u.shape),
    ),
)

_linear = Op(
    "few_rows_linear(Tensor x, Tensor w, Tensor? bias, str backend) -> Tensor",
    package=__package__,
    key="w",
    implementations=_backends("few_rows_linear"),
    fake=lambda x, w, bias, backend: x.new_empty(x.shape[0], w.shape[0]),
)

_linear_transposed = Op(
    "few_rows_linear_transposed(Tensor x, Tensor w, str backend) -> Tensor",
    package=__package__,
    key="w",
    implementations=_backends("few_rows_linear_transposed"),
    fake=lambda x, w, backend: x.new_empty(x.shape[0], x.shape[1], w.shape[1]),
)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, u: torch.Tensor, backend: str) -> torch.Tensor:
        pooled, lse = _pool(z, u, backend)
        ctx.save_for_backward(z, u, pooled, lse)
        ctx.backend = backend
        return pooled

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_z, need_u, _ = ctx.needs_input_grad
        grad_z, grad_u = _pool_backward(*ctx.saved_tensors, grads[0], need_z, ctx.backend)
        return grad_z if need_z else None, grad_u if need_u else None, None


def _weight_gradient(rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over M of rows [M, G, N / G] times columns [M, G, K]: [N, K]."""
    return (rows.permute(1, 2, 0) @ columns.transpose(0, 1)).flatten(0, 1).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, backend: str) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.backend, ctx.bias_dtype = backend, None if bias is None else bias.dtype
        return _linear(x, w, bias, backend)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = ctx.saved_tensors
        grad = grads[0].unflatten(1, (x.shape[1], -1)).contiguous()
        grad_x = _linear_transposed(grad, w, ctx.backend) if ctx.needs_input_grad[0] else None
        grad_w = _weight_gradient(grad, x, w.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = grads[0].sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None


class _LinearTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, backend: str) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.backend = backend
        return _linear_transposed(x, w, backend)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = _linear(grad, w, None, ctx.backend).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_w = _weight_gradient(x, grad, w.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None


class Attention(NamedTuple):
    """Parameters of one attention and of the norm behind it."""

    in_weight: torch.Tensor
    in_bias: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor


class Block(NamedTuple):
    """Parameters of one gating block."""

    weight_in: torch.Tensor
    bias_in: torch.Tensor
    weight_out: torch.Tensor
    bias_out: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor


class Gate(NamedTuple):
    """Parameters of the gate."""

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def _check(
    z: torch.Tensor,
    query: torch.Tensor,
    attentions: Sequence[Attention],
    blocks: Sequence[Block],
    gate: Gate,
    skip: int,
    heads: int,
) -> None:
    check_shape("z", z, ("T", "skip + N", "C"))
    check_dtype("z", z, FLOATS)
    width = z.shape[2]
    if not 0 <= skip < z.shape[1]:
        raise ValueError(f"skip: got {skip}, expected 0 <= skip < {z.shape[1]} (the tokens of z)")
    if heads < 1 or width % heads:
        raise ValueError(f"heads: got {heads}, expected a divisor of the width {width}")
    if len(attentions) != 2:
        raise ValueError(f"attentions: got {len(attentions)}, expected 2 (the second is applied three times)")
    wanted: list[tuple[str, Any, tuple[int, ...]]] = [("query", query, (1, width))]
    for i, attention in enumerate(attentions):
        shapes = ((3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,))
        wanted += [(f"attentions[{i}].{n}", t, s) for n, t, s in zip(Attention._fields, attention, shapes, strict=True)]
    for i, block in enumerate(blocks):
        inner = block[0].shape[0]
        shapes = ((inner, width), (inner,), (width, inner), (width,), (width,), (width,))
        wanted += [(f"blocks[{i}].{n}", t, s) for n, t, s in zip(Block._fields, block, shapes, strict=True)]
    wanted += [(f"gate.{n}", t, s) for n, t, s in zip(Gate._fields, gate, ((width,), (width,), (2, width), (2,)))]
    for name, tensor, shape in wanted:
        check_shape(name, tensor, shape)
        check_same(name, tensor, "z", z)


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def _folded_attention(y: torch.Tensor, z: torch.Tensor, attention: Attention, heads: int, backend: str) -> torch.Tensor:
    """One attention with query `y` [T or 1, C]: scores are z u with u = W_k^T q, the output is W_v (softmax(z u) z)."""
    width = z.shape[2]
    w_q, w_k, w_v = attention.in_weight.split(width)
    b_q, _, b_v = attention.in_bias.split(width)  # the bias of the keys cancels in the softmax
    q = _Linear.apply(y.unsqueeze(1), w_q, b_q, backend) / math.sqrt(width // heads)
    u = _LinearTransposed.apply(q.unflatten(1, (heads, -1)), w_k, backend)
    pooled = _Pool.apply(z, u.expand(z.shape[0], -1, -1), backend)
    out = _Linear.apply(pooled, w_v, b_v, backend)
    return _Linear.apply(out.unsqueeze(1), attention.out_weight, attention.out_bias, backend)


def tile_router(
    z: torch.Tensor,
    query: torch.Tensor,
    attentions: Sequence[Attention],
    blocks: Sequence[Block],
    gate: Gate,
    skip: int,
    heads: int,
    eps: float,
    dropout: float,
    folded: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [T, 2] in the dtype of z and logits [T, 2] in that of the sums."""
    _check(z, query, attentions, blocks, gate, skip, heads)
    if not folded and backend not in ("", "reference"):
        raise BackendError(f"backend: got '{backend}', but folded=False is computed by the reference only")
    z = z[:, skip:]
    first, second = attentions
    y = query.to(reference.sum_dtype(z.dtype)) if folded else query.expand(z.shape[0], -1)
    for attention in (first, second, second, second):
        if folded:
            y = _folded_attention(y, z, attention, heads, backend)
        else:
            y = reference.shipped_attention(y, z, *attention[:4], heads)
        y = _norm(y, attention.norm_weight, attention.norm_bias, eps)

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(x.unsqueeze(1), weight, bias, backend) if folded else F.linear(x, weight, bias)

    for block in blocks:
        inner = F.dropout(F.gelu(linear(y, block.weight_in, block.bias_in)), dropout, dropout > 0)
        inner = F.dropout(linear(inner, block.weight_out, block.bias_out), dropout, dropout > 0)
        y = y + _norm(inner, block.norm_weight, block.norm_bias, eps)
    logits = linear(_norm(y, gate.norm_weight, gate.norm_bias, eps), gate.weight, gate.bias)
    probabilities = logits.softmax(-1).to(z.dtype)
    return probabilities, logits.to(reference.sum_dtype(z.dtype))


RULES = ("released", "older")


def select_tiles(
    scores: torch.Tensor | None,
    relative_threshold: float | None,
    absolute_threshold: float | None,
    rule: str,
    groups: torch.Tensor | None,
    budget: int | None,
    mask: torch.Tensor | None,
    tokens: tuple[int, int],
) -> torch.Tensor:
    given = {
        "thresholds": relative_threshold is not None or absolute_threshold is not None,
        "budget": budget is not None,
        "mask": mask is not None,
    }
    if sum(given.values()) != 1:
        got = " and ".join(name for name, on in given.items() if on) or "none"
        raise ValueError(f"select_tiles: got {got}, expected one of thresholds, budget and mask")
    if mask is not None:
        check_shape("mask", mask, ("T",) if scores is None else (scores.shape[0],))
        check_dtype("mask", mask, (torch.bool,))
        return mask.clone()
    if scores is None:
        raise TypeError("scores: got None, expected a tensor (only with mask= they may be missing)")
    check_shape("scores", scores, ("T",))
    check_dtype("scores", scores, FLOATS)
    if groups is not None:
        check_shape("groups", groups, scores.shape)
        check_dtype("groups", groups, (torch.int64, torch.int32))
        check_same("groups", groups, "scores", scores, dtype=False)
        groups = groups.long()
    scores = scores.detach()
    if budget is not None:
        full, small = tokens
        if not 0 < small < full:
            raise ValueError(f"tokens: got {tokens}, expected (full, compressed) with 0 < compressed < full")
        if groups is None:
            if budget < small * scores.shape[0]:
                raise ValueError(
                    f"budget: got {budget} tokens for {scores.shape[0]} tiles, expected at least "
                    f"{small * scores.shape[0]} ({small} a tile)"
                )
            groups = torch.zeros_like(scores, dtype=torch.int64)
        return reference.most_harmless(scores.to(reference.sum_dtype(scores.dtype)), groups, budget, tokens)
    if relative_threshold is None or absolute_threshold is None:
        missing = "relative_threshold" if relative_threshold is None else "absolute_threshold"
        raise ValueError(
            f"{missing}: got None, expected a number (both thresholds are needed; read them from the config)"
        )
    if not 0 <= relative_threshold <= 1:
        raise ValueError(f"relative_threshold: got {relative_threshold}, expected a quantile between 0 and 1")
    if rule not in RULES:
        raise ValueError(f"rule: got '{rule}', expected one of {', '.join(RULES)}")
    if scores.shape[0] == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if groups is None:
        relative = torch.quantile(scores.float(), relative_threshold)
    else:
        relative = reference.group_quantile(scores.float(), groups, relative_threshold)
    # The shipped comparison, with a 0-dim threshold, rounds it to the scores' dtype; so must the [T] thresholds.
    relative = relative.to(scores.dtype)
    if rule == "released":
        return (scores > relative) & (scores >= absolute_threshold)
    return (scores >= relative) & (scores > absolute_threshold)
