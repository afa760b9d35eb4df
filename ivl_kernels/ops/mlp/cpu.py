"""The MLPs on the CPU: csrc/cpu/mlp.cpp, and for the backward the products of csrc/include/ivl/gemm/."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu
from .op import Mlp, MlpBackward, MlpGradients, MlpResult, empty_gradients, empty_result


def mlp(a: Mlp) -> MlpResult:
    result = empty_result(a)
    if a.up.shape[0] == 0:  # a product of no depth
        result.out.zero_() if a.down_bias is None else result.out.copy_(a.down_bias)
        return result
    weights = (None if t is None else t.contiguous() for t in (a.gate, a.up, a.up_bias, a.down, a.down_bias))
    x = a.x if a.x.stride(1) == 1 else a.x.contiguous()
    _cpu.op("mlp")(x, *weights, result.out, result.pre if a.keep else None)
    return result


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, or that added to `out`."""
    result = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    if a.shape[1] == 0:
        return result.zero_() if out is None else result
    b = b if 1 in b.stride() else b.contiguous()
    _cpu.op("matmul_into")(a, b, a.new_empty(0), result, out is not None, False)
    return result


def mlp_backward(b: MlpBackward) -> MlpGradients:
    if b.down.shape[0] == 0:  # nothing came out
        return MlpGradients(*(gradient.zero_() for gradient in empty_gradients(b)))
    found = MlpGradients(*(b.x.new_empty(0) for _ in MlpGradients._fields))
    grad = b.grad.contiguous()
    if b.need_down_bias:
        found = found._replace(down_bias=grad.sum(0, dtype=torch.float32).to(b.x.dtype))
    if not any(b[6:11]):
        return found
    change = _product(grad, b.down)
    active = torch.empty_like(change)
    if b.gate is None:
        sums = change.new_zeros(change.shape[1] if b.need_up_bias else 0, dtype=torch.float32)
        _cpu.op("gelu_backward")(b.pre, active, change, sums)
        gates, ups = change, change
        found = found._replace(up_bias=sums.to(b.x.dtype))
    else:
        both = torch.empty_like(b.pre)
        _cpu.op("gated_backward")(b.pre.contiguous(), change, active, both)
        gates, ups = both.tensor_split(2, 1)
    if b.need_down:
        found = found._replace(down=_product(grad.t(), active))
    if b.need_up:
        found = found._replace(up=_product(ups.t(), b.x))
    if b.need_gate:
        found = found._replace(gate=_product(gates.t(), b.x))
    if b.need_x:
        dx = _product(ups, b.up)
        found = found._replace(x=dx if b.gate is None else _product(gates, b.gate, dx))
    return found
