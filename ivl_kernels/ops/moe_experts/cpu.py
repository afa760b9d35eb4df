"""Mixture-of-experts feed-forward on the CPU: thin calls into csrc/cpu/moe_experts.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu
from .op import (
    Experts,
    ExpertsBackward,
    ExpertsList,
    Gradients,
    ListBackward,
    ListGradients,
    Output,
    empty_gradients,
    empty_list_gradients,
    empty_output,
)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _wanted(tensor: Tensor, need: bool) -> Tensor | None:
    return tensor if need else None


def _matrices(a: Experts) -> tuple[Tensor | None, ...]:
    matrices = (t.to(a.hidden.dtype) if a.mixed else t for t in (a.gate_up, a.down))  # the kernels read one dtype
    return tuple(_contiguous(t) for t in (*matrices, a.gate_up_bias, a.down_bias, a.gate_up_scales, a.down_scales))


def _lists(a: ExpertsList) -> tuple[list[Tensor], ...]:
    return a.gate, a.up, a.down


def _options(a: Experts) -> tuple[bool, float, float, bool]:
    return a.activation == "gpt_oss", a.alpha, a.limit, a.interleaved


def moe_experts(a: Experts) -> Output:
    result = empty_output(a)
    _cpu.op("moe_experts")(
        a.hidden.contiguous(), a.weights.float().contiguous(), a.permutation, a.offsets, *_matrices(a), *_options(a),
        result.out, _wanted(result.pre, a.keep),
    )  # fmt: skip
    return result


def moe_experts_backward(b: ExpertsBackward) -> Gradients:
    a, result = b.forward, empty_gradients(b)
    weights = result.weights.float()
    written = result._replace(weights=weights)
    if a.mixed:
        gate_up, down = (torch.empty_like(t, dtype=a.hidden.dtype) for t in (result.gate_up, result.down))
        written = written._replace(gate_up=gate_up, down=down)
    gradients = (_wanted(t, need and t.numel() > 0) for t, need in zip(written, b.needs))
    _cpu.op("moe_experts_backward")(
        b.grad.contiguous(), a.hidden.contiguous(), a.weights.float().contiguous(), a.permutation, a.inverse, a.offsets,
        *_matrices(a), b.pre, *_options(a), *gradients,
    )  # fmt: skip
    if a.mixed:
        result = result._replace(gate_up=written.gate_up.float(), down=written.down.float())
    return result._replace(weights=weights.to(a.weights.dtype))


def moe_experts_list(a: ExpertsList) -> Output:
    result = empty_output(a)
    _cpu.op("moe_experts_list")(
        a.hidden.contiguous(), a.weights.float().contiguous(), a.permutation, a.offsets, *_lists(a), result.out,
        _wanted(result.pre, a.keep),
    )  # fmt: skip
    return result


def moe_experts_list_backward(b: ListBackward) -> ListGradients:
    a, result = b.forward, empty_list_gradients(b)
    weights = result.weights.float()
    _cpu.op("moe_experts_list_backward")(
        b.grad.contiguous(), a.hidden.contiguous(), a.weights.float().contiguous(), a.permutation, a.inverse, a.offsets,
        *_lists(a), b.pre, _wanted(result.hidden, b.needs[0]), _wanted(weights, b.needs[1]), result.gate, result.up,
        result.down,
    )  # fmt: skip
    return result._replace(weights=weights.to(a.weights.dtype))
