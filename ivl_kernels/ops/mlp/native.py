"""The MLPs on the CPU: csrc/cpu/mlp.cpp, and for the backward the products of csrc/include/ivl/gemm/."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _native


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def mlp(
    x: Tensor, gate: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = x.new_empty(x.shape[0], down.shape[0])
    pre = x.new_empty(x.shape[0], up.shape[0] * (1 if gate is None else 2)) if save else x.new_empty(0, 0)
    whole = [None if t is None else t.contiguous() for t in (gate, up, up_bias, down, down_bias)]
    _native.op("mlp")(_rows(x), *whole, out, pre if save else None)
    return out, pre


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, or that added to `out`."""
    result = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    if a.shape[1] == 0:
        return result.zero_() if out is None else result
    b = b if 1 in b.stride() else b.contiguous()
    _native.op("matmul_into")(a, b, a.new_empty(0), result, out is not None, False)
    return result


def mlp_backward(
    grad: Tensor, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, pre: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    found = [x.new_empty(0) for _ in needs]
    need_x, need_gate, need_up, need_up_bias, need_down, need_down_bias = needs
    grad = grad.contiguous()
    if need_down_bias:
        found[5] = grad.sum(0, dtype=torch.float32).to(x.dtype)
    if not any(needs[:5]):
        return found
    change = _product(grad, down)
    active = torch.empty_like(change)
    if gate is None:
        sums = torch.zeros(change.shape[1]) if need_up_bias else torch.empty(0)
        _native.op("gelu_backward")(pre, active, change, sums)
        found[3] = sums.to(x.dtype) if need_up_bias else found[3]
        gates, ups = None, change
    else:
        both = torch.empty_like(pre)
        _native.op("gated_backward")(pre, change, active, both)
        gates, ups = both.tensor_split(2, 1)
    if need_down:
        found[4] = _product(grad.t(), active)
    if need_up:
        found[2] = _product(ups.t(), x)
    if gates is not None and need_gate:
        found[1] = _product(gates.t(), x)
    if need_x:
        found[0] = _product(ups, up)
        if gates is not None and gate is not None:
            _product(gates, gate, found[0])
    return found
