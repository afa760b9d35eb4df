"""Mixture-of-experts feed-forward in plain torch: a loop over the experts that have rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _parts(pre: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up [M, I] of `pre` [M, 2I], as views."""
    if layout == "interleaved":
        return pre[:, ::2], pre[:, 1::2]
    gate, up = pre.chunk(2, dim=1)
    return gate, up


def _activate(pre: torch.Tensor, activation: str, alpha: float, limit: float, layout: str) -> torch.Tensor:
    gate, up = _parts(pre, layout)
    if activation == "silu":
        return gate * gate.sigmoid() * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (alpha * gate).sigmoid() * (up + 1)


def _activate_backward(
    grad: torch.Tensor, pre: torch.Tensor, activation: str, alpha: float, limit: float, layout: str
) -> torch.Tensor:
    """Gradient of `pre` from that of the activation's result [M, I]."""
    gate, up = _parts(pre, layout)
    if activation == "silu":
        alpha, inside_gate, inside_up, offset = 1.0, 1.0, 1.0, 0.0
    else:
        inside_gate, inside_up, offset = (gate <= limit).to(pre), (up.abs() <= limit).to(pre), 1.0
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = (alpha * gate).sigmoid()
    out = torch.empty_like(pre)
    grad_gate, grad_up = _parts(out, layout)
    grad_gate.copy_(grad * (up + offset) * sigmoid * (1 + alpha * gate * (1 - sigmoid)) * inside_gate)
    grad_up.copy_(grad * gate * sigmoid * inside_up)
    return out


def _groups(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    bounds = offsets.tolist()
    for expert, (first, end) in enumerate(zip(bounds, bounds[1:])):
        if end > first:
            yield expert, slice(first, end)


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
    tokens, top_k = weights.shape
    slots = tokens * top_k
    transposed = layout == "interleaved"
    x = _wide(hidden)
    width = gate_up.shape[2 if transposed else 1]
    pre = hidden.new_zeros(slots if keep else 0, width)
    rows = x.new_zeros(slots, hidden.shape[1])
    for expert, group in _groups(offsets):
        up_matrix, down_matrix = _wide(gate_up[expert]), _wide(down[expert])
        value = x[permutation[group] // top_k] @ (up_matrix if transposed else up_matrix.T)
        if gate_up_bias is not None:
            value = value + _wide(gate_up_bias[expert])
        if keep:
            pre[group] = value.to(hidden.dtype)
        value = _activate(value, activation, alpha, limit, layout) @ (down_matrix if transposed else down_matrix.T)
        if down_bias is not None:
            value = value + _wide(down_bias[expert])
        rows[group] = value
    out = (rows[inverse].view(tokens, top_k, hidden.shape[1]) * weights.to(x.dtype).unsqueeze(-1)).sum(1)
    return out.to(hidden.dtype), pre


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
    """Gradients of hidden, weights, gate_up, down, gate_up_bias, down_bias; those not in `needs` are empty.

    The weight of slot s has the gradient <grad, down(a)> = <down^T grad, a>, so the experts' outputs are not needed.
    """
    need_hidden, need_weights, need_gate_up, need_down, need_gate_up_bias, need_down_bias = needs
    tokens, top_k = weights.shape
    transposed = layout == "interleaved"
    x, wide_grad = _wide(hidden), _wide(grad)
    flat = weights.reshape(-1).to(x.dtype)

    def zeros(needed: bool, like: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros_like(like) if needed and like is not None else hidden.new_empty(0)

    grad_gate_up, grad_down = zeros(need_gate_up, gate_up), zeros(need_down, down)
    grad_gate_up_bias, grad_down_bias = zeros(need_gate_up_bias, gate_up_bias), zeros(need_down_bias, down_bias)
    grad_weights = x.new_zeros(flat.shape[0] if need_weights else 0)
    rows = x.new_zeros(tokens * top_k if need_hidden else 0, hidden.shape[1])
    for expert, group in _groups(offsets):
        slots = permutation[group].long()
        taken = slots // top_k
        scale = flat[slots].unsqueeze(1)
        up_matrix, down_matrix = _wide(gate_up[expert]), _wide(down[expert])
        value = _wide(pre[group])
        active = _activate(value, activation, alpha, limit, layout)
        from_out = wide_grad[taken]
        from_active = from_out @ (down_matrix.T if transposed else down_matrix)
        if need_weights:
            slot_grad = (from_active * active).sum(1)
            if down_bias is not None:
                slot_grad = slot_grad + from_out @ _wide(down_bias[expert])
            grad_weights[slots] = slot_grad
        if need_down or need_down_bias:
            scaled = from_out * scale
            if need_down:
                grad_down[expert] = (active.T @ scaled if transposed else scaled.T @ active).to(down.dtype)
            if need_down_bias:
                grad_down_bias[expert] = scaled.sum(0).to(grad_down_bias.dtype)
        if need_hidden or need_gate_up or need_gate_up_bias:
            from_pre = _activate_backward(from_active * scale, value, activation, alpha, limit, layout)
            if need_gate_up:
                inputs = x[taken]
                grad_gate_up[expert] = (inputs.T @ from_pre if transposed else from_pre.T @ inputs).to(gate_up.dtype)
            if need_gate_up_bias:
                grad_gate_up_bias[expert] = from_pre.sum(0).to(grad_gate_up_bias.dtype)
            if need_hidden:
                rows[group] = from_pre @ (up_matrix.T if transposed else up_matrix)
    rows = rows[inverse].view(tokens, top_k, hidden.shape[1]).sum(1) if need_hidden else rows.view(-1)
    grad_hidden = rows.to(hidden.dtype)
    grad_weights = grad_weights.view(tokens, top_k) if need_weights else grad_weights
    return grad_hidden, grad_weights.to(weights.dtype), grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias


def _stacked(
    gate: list[torch.Tensor], up: list[torch.Tensor], down: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([torch.cat(pair) for pair in zip(gate, up)]), torch.stack(down)


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
    common = (hidden, weights, permutation, inverse, offsets, offsets.new_empty(0, 2), *_stacked(gate, up, down))
    return moe_experts(*common, None, None, "silu", 1.0, 1.0, "concatenated", keep)


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
    common = (hidden, weights, permutation, inverse, offsets, offsets.new_empty(0, 2), *_stacked(gate, up, down))
    options = ("silu", 1.0, 1.0, "concatenated", [*needs, False, False])
    results = moe_experts_backward(grad, *common, None, None, pre, *options)
    halves = [tuple(h.clone() for h in both.chunk(2)) for both in results[2]] if needs[2] else []
    downs = [t.clone() for t in results[3]] if needs[3] else []
    return results[0], results[1], [half[0] for half in halves], [half[1] for half in halves], downs
