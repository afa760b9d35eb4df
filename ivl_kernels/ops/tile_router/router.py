"""How the tile router is put together from its ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import FLOAT_NAMES, FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape
from ..._dispatch import BackendError, Implementation
from ..._gpu import interpreting
from ..._library import Op, needs_grad
from ..._plan import planned
from .op import FewRows, FewRowsTransposed, Pool, Route, Routed, linear, linear_transposed, pool, sum_dtype


class Attention(NamedTuple):
    """Parameters of one attention and of the norm behind it."""

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


class Block(NamedTuple):
    """Parameters of one gating block."""

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


class Gate(NamedTuple):
    """Parameters of the gate."""

    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor


def _check(
    z: Tensor,
    query: Tensor,
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


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def _folded_attention(y: Tensor, z: Tensor, attention: Attention, heads: int, backend: str) -> Tensor:
    """One attention with query `y` [T or 1, C]: scores are z u with u = W_k^T q, the output is W_v (softmax(z u) z)."""
    width = z.shape[2]
    w_q, w_k, w_v = attention.in_weight.split(width)
    b_q, _, b_v = attention.in_bias.split(width)  # the bias of the keys cancels in the softmax
    q = linear(FewRows(y.unsqueeze(1), w_q, b_q), backend) / math.sqrt(width // heads)
    u = linear_transposed(FewRowsTransposed(q.unflatten(1, (heads, -1)), w_k), backend)
    pooled = pool(Pool(z, u.expand(z.shape[0], -1, -1)), backend).pooled
    out = linear(FewRows(pooled, w_v, b_v), backend)
    return linear(FewRows(out.unsqueeze(1), attention.out_weight, attention.out_bias), backend)


def _shipped(y: Tensor, z: Tensor, attention: Attention, heads: int) -> Tensor:
    """`nn.MultiheadAttention` as the remote code calls it (no folding, every rounding in the model's dtype): [T, C]."""
    out, _ = F.multi_head_attention_forward(
        y.unsqueeze(0), z.transpose(0, 1), z.transpose(0, 1), z.shape[2], heads, attention.in_weight,
        attention.in_bias, None, None, False, 0.0, attention.out_weight, attention.out_bias, training=False,
        key_padding_mask=torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device),
    )  # fmt: skip
    return out[0]


@planned
def tile_router(
    z: Tensor,
    query: Tensor,
    attentions: Sequence[Attention],
    blocks: Sequence[Block],
    gate: Gate,
    skip: int,
    heads: int,
    eps: float,
    dropout: float,
    folded: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Probabilities [T, 2] in the dtype of z and logits [T, 2] in that of the sums."""
    _check(z, query, attentions, blocks, gate, skip, heads)
    if not folded and backend not in ("", "reference"):
        raise BackendError(f"backend: got '{backend}', but folded=False is computed by the reference only")
    z = z[:, skip:]
    tensors = (query, *(t for part in (*attentions, *blocks, gate) for t in part))
    if folded and not needs_grad((z, *tensors)) and not dropout and not interpreting():
        return _route(Route(z, query, [*tensors[1:]], heads, eps), backend)
    return _composed(z, query, attentions, blocks, gate, heads, eps, dropout, folded, backend)


def _composed(
    z: Tensor,
    query: Tensor,
    attentions: Sequence[Attention],
    blocks: Sequence[Block],
    gate: Gate,
    heads: int,
    eps: float,
    dropout: float,
    folded: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The router of ops that have gradients."""
    first, second = attentions
    y = query.to(sum_dtype(z.dtype)) if folded else query.expand(z.shape[0], -1)
    for attention in (first, second, second, second):
        attended = _folded_attention(y, z, attention, heads, backend) if folded else _shipped(y, z, attention, heads)
        y = _norm(attended, attention.norm_weight, attention.norm_bias, eps)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(FewRows(x.unsqueeze(1), weight, bias), backend) if folded else F.linear(x, weight, bias)

    for block in blocks:
        inner = F.dropout(F.gelu(layer(y, block.weight_in, block.bias_in)), dropout, dropout > 0)
        inner = F.dropout(layer(inner, block.weight_out, block.bias_out), dropout, dropout > 0)
        y = y + _norm(inner, block.norm_weight, block.norm_bias, eps)
    logits = layer(_norm(y, gate.norm_weight, gate.norm_bias, eps), gate.weight, gate.bias)
    probabilities = logits.softmax(-1).to(z.dtype)
    return probabilities, logits.to(sum_dtype(z.dtype))


def _composed_of(backend: str) -> Callable[[Route], Any]:
    def route(a: Route) -> Any:
        parts = [a.parameters[i : i + 6] for i in range(0, len(a.parameters) - 4, 6)]
        attentions, blocks = [Attention(*p) for p in parts[:2]], [Block(*p) for p in parts[2:]]
        gate = Gate(*a.parameters[-4:])
        return _composed(a.z, a.query, attentions, blocks, gate, a.heads, a.eps, 0.0, True, backend)

    return route


def _fused(a: Route) -> Any:
    from . import triton_router

    # Barriers between programs are for NVIDIA GPUs; three TF32 products for each of float32 do not fit the registers.
    if torch.version.hip or a.z.dtype == torch.float32:
        return _composed_of("triton")(a)
    return triton_router.tile_router(a)


_route = Op(
    "tile_router",
    Route,
    Routed,
    key="z",
    implementations=(
        Implementation("cpu", FLOAT_NAMES, function=_composed_of("cpu")),
        Implementation("triton", KERNEL_DTYPES, function=_fused),
        Implementation("reference", function=_composed_of("reference")),
    ),
    fake=lambda a: (a.z.new_empty(a.z.shape[0], 2), a.z.new_empty(a.z.shape[0], 2, dtype=sum_dtype(a.z.dtype))),
)
