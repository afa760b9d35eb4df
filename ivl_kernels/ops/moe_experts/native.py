"""Mixture-of-experts feed-forward on the CPU: thin calls into csrc/cpu/moe_experts.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _native


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def moe_experts(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    interleaved = layout == "interleaved"
    width = gate_up.shape[2 if interleaved else 1]
    out = hidden.new_empty(hidden.shape)
    pre = hidden.new_empty(permutation.shape[0] if keep else 0, width)
    _native.op("moe_experts")(
        hidden.contiguous(),
        weights.float().contiguous(),
        permutation,
        offsets,
        gate_up.contiguous(),
        down.contiguous(),
        _contiguous(gate_up_bias),
        _contiguous(down_bias),
        activation == "gpt_oss",
        alpha,
        limit,
        interleaved,
        out,
        pre if keep else None,
    )
    return out, pre


def moe_experts_backward(
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
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    tensors = (hidden, weights, gate_up, down, gate_up_bias, down_bias)
    results = [
        tensor.new_empty(tensor.shape, dtype=torch.float32 if tensor is weights else None)
        if needed and tensor is not None
        else None
        for tensor, needed in zip(tensors, needs)
    ]
    _native.op("moe_experts_backward")(
        grad.contiguous(),
        hidden.contiguous(),
        weights.float().contiguous(),
        permutation,
        inverse,
        offsets,
        gate_up.contiguous(),
        down.contiguous(),
        _contiguous(gate_up_bias),
        _contiguous(down_bias),
        pre,
        activation == "gpt_oss",
        alpha,
        limit,
        layout == "interleaved",
        *results,
    )
    if results[1] is not None:
        results[1] = results[1].to(weights.dtype)
    return tuple(hidden.new_empty(0) if result is None else result for result in results)


def moe_experts_list(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    permutation: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    gate: list[torch.Tensor],
    up: list[torch.Tensor],
    down: list[torch.Tensor],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = hidden.new_empty(hidden.shape)
    pre = hidden.new_empty(permutation.shape[0] if keep else 0, 2 * down[0].shape[1])
    _native.op("moe_experts_list")(
        hidden.contiguous(),
        weights.float().contiguous(),
        permutation,
        offsets,
        [t.contiguous() for t in gate],
        [t.contiguous() for t in up],
        [t.contiguous() for t in down],
        out,
        pre if keep else None,
    )
    return out, pre


def moe_experts_list_backward(
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
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    def like(tensors: list[torch.Tensor], needed: bool) -> list[torch.Tensor]:
        return [t.new_empty(t.shape) for t in tensors] if needed else []

    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    grad_weights = weights.new_empty(weights.shape, dtype=torch.float32) if needs[1] else None
    lists = like(gate, needs[2]), like(up, needs[2]), like(down, needs[3])
    _native.op("moe_experts_list_backward")(
        grad.contiguous(),
        hidden.contiguous(),
        weights.float().contiguous(),
        permutation,
        inverse,
        offsets,
        [t.contiguous() for t in gate],
        [t.contiguous() for t in up],
        [t.contiguous() for t in down],
        pre,
        grad_hidden,
        grad_weights,
        *lists,
    )
    none = hidden.new_empty(0)
    return (
        none if grad_hidden is None else grad_hidden,
        none if grad_weights is None else grad_weights.to(weights.dtype),
        *lists,
    )
