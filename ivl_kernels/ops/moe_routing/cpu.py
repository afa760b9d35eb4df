"""Mixture-of-experts routing on the CPU: thin calls into csrc/cpu/moe_routing.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import _cpu
from .op import Dispatch, Routed, Routing, RoutingBackward, Sorting, empty_dispatch, empty_routed


def moe_routing(a: Routing) -> Routed:
    result = empty_routed(a)
    bias = None if a.bias is None else a.bias.contiguous()
    softmax_first = a.scoring == "softmax_then_topk"
    _cpu.op("moe_routing")(a.logits.contiguous(), bias, softmax_first, a.renormalize, *result)
    return result


def moe_routing_backward(a: RoutingBackward) -> Tensor:
    out = a.logits.new_empty(a.logits.shape)
    bias = None if a.bias is None else a.bias.contiguous()
    softmax_first = a.scoring == "softmax_then_topk"
    _cpu.op("moe_routing_backward")(
        a.grad.contiguous(), a.logits.contiguous(), bias, a.ids.contiguous(), softmax_first, a.renormalize, out
    )
    return out


def moe_dispatch(a: Sorting) -> Dispatch:
    result = empty_dispatch(a)
    _cpu.op("moe_dispatch")(a.ids.long().contiguous(), a.tile, *result)
    return result
