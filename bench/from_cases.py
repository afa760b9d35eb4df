"""Rows of the benchmark from the cases of the ops: ours, eager, torch.compile and peers, held to the accuracy rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ivl_kernels.testing.cases import Cost, Numbers, Timed, cast

from .measure import OURS, Case, Work, backward, device, tensors


def case(timed: Timed) -> Case:
    make = functools.partial(work, timed)
    return Case(timed.op, timed.name, timed.params, make, dtype=timed.dtype, seconds=timed.seconds)


def work(timed: Timed) -> Work:
    one, training = timed.case, timed.training
    assert one.plain is not None, f"{timed.op}: {timed.name}: a timed case needs an eager form"
    inputs = one.inputs(Numbers(timed.dtype, device()))
    kept = {name: inputs[name].clone() for name in timed.mutates}
    forward, backwards = one.cost(inputs) if one.cost else (Cost(0), Cost(0))
    cost = Cost(forward.least + backwards.least, forward.flops + backwards.flops) if training else forward
    grads: list[torch.Tensor] = []
    if training:
        with torch.no_grad():
            grads = [torch.randn_like(out) for out in tensors(one.plain(inputs))]

    def run(function: Callable[[Any], Any], values: Any, upstream: list[torch.Tensor]) -> Any:
        if not training:
            with torch.no_grad():
                return function(values)
        leaves = one.leaves(values)
        for leaf in leaves:
            leaf.requires_grad_()
        return backward(tensors(function(values)), leaves, upstream)

    def truth() -> Any:
        wide = cast(inputs, torch.float64, device())
        return run(lambda v: one.call(v, "reference"), wide, [grad.double() for grad in grads])

    def restore() -> None:
        for name, values in kept.items():
            inputs[name].copy_(values)

    variants: dict[str, Callable[[Any], Any]] = {OURS: lambda v: one.call(v, ""), "eager": one.plain}
    if timed.compile:
        torch._dynamo.reset()
        variants["compile"] = torch.compile(one.plain, dynamic=False)
    variants |= one.peers
    return Work(
        {name: functools.partial(run, function, inputs, grads) for name, function in variants.items()},
        truth=None if timed.exact else truth,
        unchecked=timed.unchecked,
        reset=restore if kept else None,
        cost=cost,
    )
