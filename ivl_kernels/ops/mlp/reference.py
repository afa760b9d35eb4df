"""The MLPs in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _biased(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + _wide(bias)


def mlp(
    x: Tensor, gate: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = _wide(x)
    pre = _biased(wide @ _wide(up).t(), up_bias)
    if gate is None:
        active = functional.gelu(pre)
    else:
        gates = wide @ _wide(gate).t()
        active, pre = functional.silu(gates) * pre, torch.cat((gates, pre), 1)
    out = _biased(active @ _wide(down).t(), down_bias)
    return out.to(x.dtype), pre.to(x.dtype) if save else x.new_empty(0, 0)


def mlp_backward(
    grad: Tensor, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, pre: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x, gate, up, up_bias, down and down_bias; empty where not needed."""
    grad, wide, values = _wide(grad), _wide(x), _wide(pre)
    with torch.enable_grad():
        values = values.detach().requires_grad_()
        half = values.shape[1] // 2
        active = functional.gelu(values) if gate is None else functional.silu(values[:, :half]) * values[:, half:]
    (change,) = torch.autograd.grad(active, values, grad @ _wide(down))
    gates, ups = (None, change) if gate is None else (change[:, :half], change[:, half:])
    dx = ups @ _wide(up)
    if gate is not None:
        dx = dx + gates @ _wide(gate)
    found = (
        dx,
        None if gates is None else gates.t() @ wide,
        ups.t() @ wide,
        ups.sum(0),
        grad.t() @ active.detach(),
        grad.sum(0),
    )
    return [x.new_empty(0) if value is None or not need else value.to(x.dtype) for value, need in zip(found, needs)]
