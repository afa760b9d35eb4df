"""Schemas, fakes, backends, gradients and argument checks of the mixture-of-experts feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..._checks import FLOATS, KERNEL_DTYPES, autocast_dtype, check_dtype, check_same, check_shape
from ..._dispatch import Implementation
from ..._library import Op
from ..moe_routing import op as routing

ACTIVATIONS = ("silu", "gpt_oss")
LAYOUTS = ("concatenated", "interleaved")


def tile_rows(slots: int, experts: int) -> int:
    """Rows of a tile of the GPU kernels: about twice the mean of an expert, so that most read their weights once."""
    mean = slots / experts
    return 16 if mean <= 8 else 32 if mean <= 24 else 64 if mean <= 192 else 128


def _fake_forward(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    permutation: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    tiles: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    keep: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    width = gate_up.shape[2 if layout == "interleaved" else 1]
    return hidden.new_empty(hidden.shape), hidden.new_empty(permutation.shape[0] if keep else 0, width)


def _fake_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    permutation: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    tiles: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    pre: torch.Tensor,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    needs: list[bool],
    backend: str,
) -> tuple[torch.Tensor, ...]:
    inputs = (hidden, weights, gate_up, down, gate_up_bias, down_bias)
    return tuple(
        value.new_empty(value.shape) if needed and value is not None else hidden.new_empty(0)
        for value, needed in zip(inputs, needs)
    )


_TENSORS = (
    "Tensor hidden, Tensor weights, Tensor permutation, Tensor inverse, Tensor offsets, Tensor tiles, Tensor gate_up, "
    "Tensor down, Tensor? gate_up_bias, Tensor? down_bias, "
)
_OPTIONS = "str activation, float alpha, float limit, str layout, "

_experts = Op(
    f"moe_experts({_TENSORS}{_OPTIONS}bool keep, str backend) -> (Tensor out, Tensor pre)",
    package=__package__,
    key="hidden",
    implementations=(
        Implementation("native", "native:moe_experts", ("cpu",), KERNEL_DTYPES),
        Implementation("triton", "triton:moe_experts", ("cuda", "hip"), KERNEL_DTYPES),
        Implementation("reference", "reference:moe_experts"),
    ),
    fake=_fake_forward,
)

_experts_backward = Op(
    f"moe_experts_backward(Tensor grad, {_TENSORS}Tensor pre, {_OPTIONS}bool[6] needs, str backend)"
    " -> (Tensor hidden, Tensor weights, Tensor gate_up, Tensor down, Tensor gate_up_bias, Tensor down_bias)",
    package=__package__,
    key="hidden",
    implementations=(
        Implementation("native", "native:moe_experts_backward", ("cpu",), KERNEL_DTYPES),
        Implementation("triton", "triton:moe_experts_backward", ("cuda", "hip"), KERNEL_DTYPES),
        Implementation("reference", "reference:moe_experts_backward"),
    ),
    fake=_fake_backward,
)


_LISTS = (
    "Tensor hidden, Tensor weights, Tensor permutation, Tensor inverse, Tensor offsets, Tensor[] gate, Tensor[] up, "
    "Tensor[] down, "
)


def _fake_list(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    permutation: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    gate: list[torch.Tensor],
    up: list[torch.Tensor],
    down: list[torch.Tensor],
    keep: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = permutation.shape[0] if keep else 0
    return hidden.new_empty(hidden.shape), hidden.new_empty(rows, 2 * gate[0].shape[0])


def _fake_list_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    permutation: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    gate: list[torch.Tensor],
    up: list[torch.Tensor],
    down: list[torch.Tensor],
    pre: torch.Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Any, ...]:
    single = (t.new_empty(t.shape) if n else hidden.new_empty(0) for t, n in zip((hidden, weights), needs))
    lists = ((gate, needs[2]), (up, needs[2]), (down, needs[3]))
    return *single, *([t.new_empty(t.shape) for t in tensors] if n else [] for tensors, n in lists)


_list = Op(
    f"moe_experts_list({_LISTS}bool keep, str backend) -> (Tensor out, Tensor pre)",
    package=__package__,
    key="hidden",
    implementations=(
        Implementation("native", "native:moe_experts_list", ("cpu",), KERNEL_DTYPES),
        Implementation("reference", "reference:moe_experts_list"),
    ),
    fake=_fake_list,
)

_list_backward = Op(
    f"moe_experts_list_backward(Tensor grad, {_LISTS}Tensor pre, bool[4] needs, str backend)"
    " -> (Tensor hidden, Tensor weights, Tensor[] gate, Tensor[] up, Tensor[] down)",
    package=__package__,
    key="hidden",
    implementations=(
        Implementation("native", "native:moe_experts_list_backward", ("cpu",), KERNEL_DTYPES),
        Implementation("reference", "reference:moe_experts_list_backward"),
    ),
    fake=_fake_list_backward,
)


class _ExpertsList(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        permutation: torch.Tensor,
        inverse: torch.Tensor,
        offsets: torch.Tensor,
        backend: str,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        experts = len(matrices) // 3
        lists = (list(matrices[i : i + experts]) for i in (0, experts, 2 * experts))
        out, pre = _list(hidden, weights, permutation, inverse, offsets, *lists, True, backend)
        ctx.save_for_backward(hidden, weights, permutation, inverse, offsets, pre, *matrices)
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weights, permutation, inverse, offsets, pre, *matrices = ctx.saved_tensors
        experts = len(matrices) // 3
        wanted = ctx.needs_input_grad[6:]
        needs = [*ctx.needs_input_grad[:2], any(wanted[: 2 * experts]), any(wanted[2 * experts :])]
        lists = [matrices[i : i + experts] for i in (0, experts, 2 * experts)]
        results = _list_backward(
            grads[0], hidden, weights, permutation, inverse, offsets, *lists, pre, needs, ctx.backend
        )
        absent = [None] * experts
        slopes = [slope for part in results[2:] for slope in (part or absent)]
        # An expert without a token took no part: None, as of a loop over those that did. A graph has no such branch.
        bounds = [] if torch.compiler.is_compiling() else offsets.tolist()
        taken = [end > first for first, end in zip(bounds, bounds[1:])] or [True] * experts
        slopes = [slope if want and part else None for slope, want, part in zip(slopes, wanted, taken * 3)]
        return results[0] if needs[0] else None, results[1] if needs[1] else None, *(None,) * 4, *slopes


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        permutation: torch.Tensor,
        inverse: torch.Tensor,
        offsets: torch.Tensor,
        tiles: torch.Tensor,
        activation: str,
        alpha: float,
        limit: float,
        layout: str,
        backend: str,
    ) -> torch.Tensor:
        tensors = (hidden, weights, permutation, inverse, offsets, tiles, gate_up, down, gate_up_bias, down_bias)
        out, pre = _experts(*tensors, activation, alpha, limit, layout, True, backend)
        ctx.save_for_backward(*tensors, pre)
        ctx.options, ctx.backend = (activation, alpha, limit, layout), backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:6])
        results = _experts_backward(grads[0], *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
        return *(result if needed else None for result, needed in zip(results, needs)), *(None,) * 9


def _check_tokens(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    check_shape("hidden", hidden, ("S", "H"))
    check_dtype("hidden", hidden, FLOATS)
    check_shape("ids", ids, (hidden.shape[0], "k"))
    check_same("ids", ids, "hidden", hidden, dtype=False)
    check_shape("weights", weights, ids.shape)
    check_dtype("weights", weights, FLOATS)
    check_same("weights", weights, "hidden", hidden, dtype=False)


def _check_weights(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    layout: str,
) -> int:
    """The number of experts."""
    width = hidden.shape[1]
    if layout == "interleaved":
        check_shape("gate_up", gate_up, ("E", width, "2I"))
    else:
        check_shape("gate_up", gate_up, ("E", "2I", width))
    experts, double = gate_up.shape[0], gate_up.shape[2 if layout == "interleaved" else 1]
    if double % 2:
        raise ValueError(f"gate_up: got {list(gate_up.shape)}, expected an even number of gate and up rows")
    inner = double // 2
    check_shape("down", down, (experts, inner, width) if layout == "interleaved" else (experts, width, inner))
    named = [("gate_up", gate_up), ("down", down)]
    if gate_up_bias is not None:
        check_shape("gate_up_bias", gate_up_bias, (experts, double))
        named.append(("gate_up_bias", gate_up_bias))
    if down_bias is not None:
        check_shape("down_bias", down_bias, (experts, width))
        named.append(("down_bias", down_bias))
    for name, tensor in named:
        check_same(name, tensor, "hidden", hidden)
    return experts


def moe_experts(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    backend: str,
) -> torch.Tensor:
    _check_tokens(hidden, ids, weights)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    dtype = autocast_dtype(hidden)
    if dtype is not None and ids.numel() >= 2 * gate_up.shape[0]:  # fewer slots would not read what a cast does
        hidden, gate_up, down = hidden.to(dtype), gate_up.to(dtype), down.to(dtype)
        gate_up_bias, down_bias = (b if b is None else b.to(dtype) for b in (gate_up_bias, down_bias))
    experts = _check_weights(hidden, gate_up, down, gate_up_bias, down_bias, layout)
    tile = tile_rows(ids.numel(), experts)
    permutation, inverse, _, offsets, tiles = routing.moe_dispatch(ids, experts, tile, backend)
    options = (activation, float(alpha), float(limit), layout)
    differentiable = (hidden, weights, gate_up, down, gate_up_bias, down_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        return _Experts.apply(*differentiable, permutation, inverse, offsets, tiles, *options, backend)
    tensors = (hidden, weights, permutation, inverse, offsets, tiles, gate_up, down, gate_up_bias, down_bias)
    return _experts(*tensors, *options, False, backend)[0]


def moe_experts_list(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: Sequence[torch.Tensor],
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    backend: str,
) -> torch.Tensor:
    _check_tokens(hidden, ids, weights)
    gate, up, down = list(gate), list(up), list(down)
    if not gate or not len(gate) == len(up) == len(down):
        counts = f"{len(gate)}, {len(up)} and {len(down)}"
        raise ValueError(f"gate, up, down: got {counts} matrices, expected one each for every expert")
    check_shape("gate[0]", gate[0], ("I", hidden.shape[1]))
    inner = gate[0].shape[0]
    for name, tensors, shape in (
        ("gate", gate, (inner, hidden.shape[1])),
        ("up", up, (inner, hidden.shape[1])),
        ("down", down, (hidden.shape[1], inner)),
    ):
        for e, tensor in enumerate(tensors):
            if tensor.shape != shape or tensor.dtype != hidden.dtype or tensor.device != hidden.device:
                check_shape(f"{name}[{e}]", tensor, shape)
                check_same(f"{name}[{e}]", tensor, "hidden", hidden)
    permutation, inverse, _, offsets, _ = routing.moe_dispatch(ids, len(gate), 0, backend)
    matrices = (*gate, *up, *down)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weights, *matrices)):
        return _ExpertsList.apply(hidden, weights, permutation, inverse, offsets, backend, *matrices)
    return _list(hidden, weights, permutation, inverse, offsets, gate, up, down, False, backend)[0]
