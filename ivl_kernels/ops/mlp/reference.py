"""The MLPs in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .op import Mlp, MlpBackward, MlpGradients, MlpResult


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, _wide(weight), None if bias is None else _wide(bias))


def mlp(a: Mlp) -> MlpResult:
    x = _wide(a.x)
    pre = _linear(x, a.up, a.up_bias)
    if a.gate is None:
        active = functional.gelu(pre)
    else:
        gates = _linear(x, a.gate, None)
        active, pre = functional.silu(gates) * pre, torch.cat((gates, pre), 1)
    out = _linear(active, a.down, a.down_bias)
    return MlpResult(out.to(a.x.dtype), pre.to(a.x.dtype) if a.keep else a.x.new_empty(0, 0))


def mlp_backward(b: MlpBackward) -> MlpGradients:
    grad, x = _wide(b.grad), _wide(b.x)
    with torch.enable_grad():
        pre = _wide(b.pre).detach().requires_grad_()
        half = pre.shape[1] // 2
        active = functional.gelu(pre) if b.gate is None else functional.silu(pre[:, :half]) * pre[:, half:]
    (change,) = torch.autograd.grad(active, pre, grad @ _wide(b.down))
    ups = change if b.gate is None else change[:, half:]
    dx, dgate = ups @ _wide(b.up), None
    if b.gate is not None:
        dx, dgate = dx + change[:, :half] @ _wide(b.gate), change[:, :half].t() @ x
    found = (dx, dgate, ups.t() @ x, ups.sum(0), grad.t() @ active.detach(), grad.sum(0))
    nothing = b.x.new_empty(0)
    return MlpGradients(
        *(nothing if value is None or not need else value.to(b.x.dtype) for value, need in zip(found, b[6:]))
    )
