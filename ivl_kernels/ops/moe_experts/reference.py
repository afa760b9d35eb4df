"""Mixture-of-experts feed-forward in plain torch: a loop over the experts that have rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..moe_routing.op import Sorting
from ..moe_routing.reference import moe_dispatch
from . import formats
from .op import (
    Experts,
    ExpertsBackward,
    ExpertsList,
    FewTokens,
    Gradients,
    ListBackward,
    ListGradients,
    Output,
    empty_output,
)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _parts(pre: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gate and up [M, I] of `pre` [M, 2I], as views."""
    if layout == "interleaved":
        return pre[:, ::2], pre[:, 1::2]
    gate, up = pre.chunk(2, dim=1)
    return gate, up


def _activate(pre: Tensor, a: Experts) -> Tensor:
    gate, up = _parts(pre, a.layout)
    if a.activation == "silu":
        return gate * gate.sigmoid() * up
    gate, up = gate.clamp(max=a.limit), up.clamp(-a.limit, a.limit)
    return gate * (a.alpha * gate).sigmoid() * (up + 1)


def _activate_backward(grad: Tensor, pre: Tensor, a: Experts) -> Tensor:
    """Gradient of `pre` from that of the activation's result [M, I]."""
    gate, up = _parts(pre, a.layout)
    if a.activation == "silu":
        alpha, inside_gate, inside_up, offset = 1.0, 1.0, 1.0, 0.0
    else:
        alpha, offset = a.alpha, 1.0
        inside_gate, inside_up = (gate <= a.limit).to(pre), (up.abs() <= a.limit).to(pre)
        gate, up = gate.clamp(max=a.limit), up.clamp(-a.limit, a.limit)
    sigmoid = (alpha * gate).sigmoid()
    out = torch.empty_like(pre)
    grad_gate, grad_up = _parts(out, a.layout)
    grad_gate.copy_(grad * (up + offset) * sigmoid * (1 + alpha * gate * (1 - sigmoid)) * inside_gate)
    grad_up.copy_(grad * gate * sigmoid * inside_up)
    return out


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    bounds = offsets.tolist()
    for expert, (first, end) in enumerate(zip(bounds, bounds[1:])):
        if end > first:
            yield expert, slice(first, end)


def _matrices(a: Experts, expert: int) -> tuple[Tensor, Tensor]:
    """Gate and up [H, 2I], and down [I, H]."""
    if a.gate_up_scales is not None and a.down_scales is not None:
        dtype = torch.promote_types(a.hidden.dtype, torch.float32)
        gate_up = formats.dequantise(a.gate_up[expert], a.gate_up_scales[expert], dtype)
        return gate_up.T, formats.dequantise(a.down[expert], a.down_scales[expert], dtype).T
    both = _wide(a.gate_up[expert].to(a.hidden.dtype)), _wide(a.down[expert].to(a.hidden.dtype))
    return both if a.interleaved else (both[0].T, both[1].T)


def moe_experts(a: Experts) -> Output:
    tokens, top_k = a.weights.shape
    x = _wide(a.hidden)
    pre = empty_output(a).pre.zero_()
    rows = x.new_zeros(tokens * top_k, x.shape[1])
    for expert, group in _groups(a.offsets):
        gate_up, down = _matrices(a, expert)
        value = x[a.permutation[group] // top_k] @ gate_up
        if a.gate_up_bias is not None:
            value = value + _wide(a.gate_up_bias[expert])
        if a.keep:
            pre[group] = value.to(pre.dtype)
        value = _activate(value, a) @ down
        if a.down_bias is not None:
            value = value + _wide(a.down_bias[expert])
        rows[group] = value
    out = (rows[a.inverse].view(tokens, top_k, x.shape[1]) * a.weights.to(x.dtype).unsqueeze(-1)).sum(1)
    return Output(out.to(a.hidden.dtype), pre)


def moe_experts_few(a: FewTokens) -> Tensor:
    found = moe_dispatch(Sorting(a.ids, a.gate_up.shape[0], 0))
    return moe_experts(a.placed(found.permutation, found.inverse, found.offsets, found.tiles)).out


def moe_experts_backward(b: ExpertsBackward) -> Gradients:
    """The weight of slot s has the gradient <grad, down(a)> = <down^T grad, a>: experts' outputs are not needed."""
    a, needs = b.forward, b.need
    tokens, top_k = a.weights.shape
    x, wide_grad = _wide(a.hidden), _wide(b.grad)
    flat = a.weights.reshape(-1).to(x.dtype)

    def zeros(needed: bool, like: Tensor | None) -> Tensor:
        return torch.zeros_like(like) if needed and like is not None else x.new_empty(0)

    grad_gate_up, grad_down = zeros(needs.gate_up, a.gate_up), zeros(needs.down, a.down)
    grad_gate_up_bias = zeros(needs.gate_up_bias, a.gate_up_bias)
    grad_down_bias = zeros(needs.down_bias, a.down_bias)
    grad_weights = x.new_zeros(flat.shape[0] if needs.weights else 0)
    rows = x.new_zeros(tokens * top_k if needs.hidden else 0, x.shape[1])
    for expert, group in _groups(a.offsets):
        slots = a.permutation[group].long()
        taken = slots // top_k
        scale = flat[slots].unsqueeze(1)
        gate_up, down = _matrices(a, expert)
        value = _wide(b.pre[group])
        active = _activate(value, a)
        from_out = wide_grad[taken]
        from_active = from_out @ down.T
        if needs.weights:
            slot_grad = (from_active * active).sum(1)
            if a.down_bias is not None:
                slot_grad = slot_grad + from_out @ _wide(a.down_bias[expert])
            grad_weights[slots] = slot_grad
        if needs.down or needs.down_bias:
            scaled = from_out * scale
            if needs.down:
                grad_down[expert] = (active.T @ scaled if a.interleaved else scaled.T @ active).to(a.down.dtype)
            if needs.down_bias:
                grad_down_bias[expert] = scaled.sum(0).to(grad_down_bias.dtype)
        if needs.hidden or needs.gate_up or needs.gate_up_bias:
            from_pre = _activate_backward(from_active * scale, value, a)
            if needs.gate_up:
                inputs = x[taken]
                found = inputs.T @ from_pre if a.interleaved else from_pre.T @ inputs
                grad_gate_up[expert] = found.to(a.gate_up.dtype)
            if needs.gate_up_bias:
                grad_gate_up_bias[expert] = from_pre.sum(0).to(grad_gate_up_bias.dtype)
            if needs.hidden:
                rows[group] = from_pre @ gate_up.T
    rows = rows[a.inverse].view(tokens, top_k, x.shape[1]).sum(1) if needs.hidden else rows.view(-1)
    grad_weights = grad_weights.view(tokens, top_k) if needs.weights else grad_weights
    return Gradients(
        rows.to(a.hidden.dtype),
        grad_weights.to(a.weights.dtype),
        grad_gate_up,
        grad_down,
        grad_gate_up_bias,
        grad_down_bias,
    )


def _stacked(a: ExpertsList) -> Experts:
    gate_up, down = torch.stack([torch.cat(pair) for pair in zip(a.gate, a.up)]), torch.stack(a.down)
    tiles = a.offsets.new_empty(0, 2)
    return Experts(*a[:5], tiles, gate_up, down, None, None, None, None, "silu", 1.0, 1.0, "concatenated", a.keep)


def moe_experts_list(a: ExpertsList) -> Output:
    return moe_experts(_stacked(a))


def moe_experts_list_backward(b: ListBackward) -> ListGradients:
    found = moe_experts_backward(ExpertsBackward(b.grad, _stacked(b.forward), b.pre, [*b.needs, False, False]))
    halves = [tuple(half.clone() for half in both.chunk(2)) for both in found.gate_up]
    downs = [t.clone() for t in found.down]
    return ListGradients(found.hidden, found.weights, [half[0] for half in halves], [half[1] for half in halves], downs)
