"""The experts of a layer, in both checkpoint layouts; the eager form is the loop over experts."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional

from ... import ops
from ...ops.moe_experts.formats import dequantise
from . import Case, Cost, Numbers, Shape, Subject, scaled
from ._case import Inputs

GRADIENTS = ("hidden", "weights", "gate_up", "down")
BIASES = ("gate_up_bias", "down_bias")


def inputs(
    n: Numbers, tokens: int, width: int, inner: int, experts: int, top_k: int, interleaved: bool, biased: bool
) -> Inputs:
    first, second = (2 * inner, width), (width, inner)
    if interleaved:
        first, second = first[::-1], second[::-1]
    values: Inputs = {
        "ids": n.choices(tokens, experts, top_k),
        "hidden": n.normal(tokens, width),
        "weights": n.uniform(tokens, top_k),
        "gate_up": n.normal(experts, *first, scale=width**-0.5),
        "down": n.normal(experts, *second, scale=inner**-0.5),
    }
    if biased:
        values["gate_up_bias"] = n.normal(experts, 2 * inner, scale=0.1)
        values["down_bias"] = n.normal(experts, width, scale=0.1)
    return values


def limited(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """x in [low, high]. A value that is a limit has its gradient, which torch's own clamp passes on up to 2.13 only."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def plain(v: Inputs, activation: str, layout: str) -> torch.Tensor:
    """The loop over experts, every product and activation rounded to the dtype of the inputs."""
    transposed = layout == "interleaved"
    out = torch.zeros_like(v["hidden"])
    for expert in range(v["gate_up"].shape[0]):
        token, slot = (v["ids"] == expert).nonzero(as_tuple=True)
        first, second = (v[n][expert].T if transposed else v[n][expert] for n in ("gate_up", "down"))
        biases = [v[n][expert] if n in v else None for n in BIASES]
        each = functional.linear(v["hidden"][token], first, biases[0])
        gate, up = (each[:, ::2], each[:, 1::2]) if transposed else each.chunk(2, -1)
        if activation == "gpt_oss":
            gate, up = limited(gate, -math.inf, 7.0), limited(up, -7.0, 7.0)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        else:
            inner = functional.silu(gate) * up
        out = out.index_add(0, token, functional.linear(inner, second, biases[1]) * v["weights"][token, slot, None])
    return out


def cost(v: Inputs) -> tuple[Cost, Cost]:
    (tokens, width), slots, size = v["hidden"].shape, v["ids"].numel(), v["hidden"].itemsize
    experts, inner = v["down"].shape[0], v["down"].numel() // (v["down"].shape[0] * width)
    used, matrices = v["ids"].unique().numel(), 3 * inner * width
    chosen = slots * (8 + size)
    least = size * (used * matrices + 2 * tokens * width) + chosen
    least_backward = size * ((used + experts) * matrices + 3 * tokens * width) + chosen + slots * size
    # `act` [slots, I] and a row [slots, H] for the gather-sum go out and in; ids, their dispatch and weights.
    small = slots * (8 + 4 * 4 + size)
    planned = size * (used * matrices + 2 * slots * (inner + width) + 2 * tokens * width) + small
    # Gradient of pre out and in twice, its input and the weighted activation; both weight gradients; rows as before.
    planned_backward = small + size * (
        (used + experts) * matrices + slots * (2 * inner * 4 + 2 * inner + 2 * width) + 4 * tokens * width
    )
    flops, elements = 2 * slots * matrices, slots * width
    return Cost(least, flops, elements, planned), Cost(least_backward, 2 * flops, elements, planned_backward)


def case(tokens: int, width: int, inner: int, experts: int, top_k: int, gpt_oss: bool) -> Case:
    activation, layout = ("gpt_oss", "interleaved") if gpt_oss else ("silu", "concatenated")
    return Case(
        "moe_experts",
        f"{activation}, {layout}, {tokens} tokens, {top_k} of {experts}",
        lambda n: inputs(n, tokens, width, inner, experts, top_k, gpt_oss, gpt_oss),
        lambda v, backend: ops.moe_experts(**v, activation=activation, layout=layout, backend=backend),
        GRADIENTS + BIASES if gpt_oss else GRADIENTS,
        functools.partial(plain, activation=activation, layout=layout),
        cost,
        graph=True,
    )


def few_case(tokens: int, width: int, inner: int, experts: int, top_k: int) -> Case:
    """So few tokens that GPUs serve them unsorted, where nobody wants gradients."""
    one = case(tokens, width, inner, experts, top_k, False)
    name = f"{tokens} tokens, {top_k} of {experts}"
    return Case("moe_experts_few", name, one.inputs, one.call, (), one.plain, one.cost, graph=True)


MATRICES = ("gate_up", "down")


def _stored_inputs(n: Numbers, tokens: int, width: int, inner: int, experts: int, top_k: int) -> Inputs:
    """Matrices in MXFP4: any bytes are weights, and the scales make them as large as those of others."""

    def whole(shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
        if n.reserve:
            return torch.empty(shape, dtype=torch.uint8, device=n.device)
        return (n.uniform(*shape, dtype=torch.float32) * (high - low) + low).to(torch.uint8)

    values: Inputs = {
        "ids": n.choices(tokens, experts, top_k),
        "hidden": n.normal(tokens, width),
        "weights": n.uniform(tokens, top_k),
        "gate_up_bias": n.normal(experts, 2 * inner, scale=0.1),
        "down_bias": n.normal(experts, width, scale=0.1),
    }
    for name, rows, columns in (("gate_up", 2 * inner, width), ("down", width, inner)):
        shape, size = (experts, rows, columns // 32), 126 - math.ceil(math.log2(columns) / 2)
        values |= {name: whole((*shape, 16), 0, 256), f"{name}_scales": whole(shape, size - 1, size + 2)}
    return values


def _expanded(v: Inputs) -> Inputs:
    rest = {name: value for name, value in v.items() if not name.endswith("_scales")}
    dtype = v["hidden"].dtype
    return rest | {n: dequantise(v[n], v[f"{n}_scales"], dtype).mT.contiguous() for n in MATRICES}


def _stored_cost(v: Inputs) -> tuple[Cost, Cost]:
    (tokens, width), slots, size = v["hidden"].shape, v["ids"].numel(), v["hidden"].itemsize
    experts, inner, used = v["gate_up"].shape[0], v["gate_up"].shape[1] // 2, v["ids"].unique().numel()
    read = used * sum(v[name].nbytes + v[f"{name}_scales"].nbytes for name in MATRICES) // experts
    chosen, small = slots * (8 + size), slots * (8 + 4 * 4 + size)
    planned = read + size * (2 * slots * (inner + width) + 2 * tokens * width) + small
    planned_backward = read + size * (slots * (2 * inner * 4 + 2 * width) + 4 * tokens * width) + small
    flops, elements = 6 * slots * inner * width, slots * width
    return (
        Cost(read + size * 2 * tokens * width + chosen, flops, elements, planned),
        Cost(read + size * 3 * tokens * width + chosen + slots * size, flops, elements, planned_backward),
    )


def stored_case(tokens: int, width: int, inner: int, experts: int, top_k: int) -> Case:
    return Case(
        "moe_experts",
        f"gpt_oss, MXFP4, {tokens} tokens, {top_k} of {experts}",
        lambda n: _stored_inputs(n, tokens, width, inner, experts, top_k),
        lambda v, backend: ops.moe_experts(**v, activation="gpt_oss", layout="interleaved", backend=backend),
        ("hidden", "weights", *BIASES),
        lambda v: plain(_expanded(v), "gpt_oss", "interleaved"),
        _stored_cost,
        graph=True,
    )


def _as_lists(v: Inputs) -> Inputs:
    gate, up = v.pop("gate_up").chunk(2, 1)
    return {**v, "gate": list(gate.contiguous()), "up": list(up.contiguous()), "down": list(v["down"])}


def _stacked(v: Inputs) -> Inputs:
    gate_up = torch.cat([torch.stack(v["gate"]), torch.stack(v["up"])], 1)
    return {**v, "gate_up": gate_up, "down": torch.stack(v["down"])}


def cases(large: bool) -> Iterator[Case]:
    sizes = (256, 2048, 768, 32, 8) if large else (13, 48, 40, 6, 2)
    tokens, *_, experts, k = sizes
    for gpt_oss in (False, True):
        yield case(*sizes, gpt_oss)
    yield few_case(1, *sizes[1:])
    yield stored_case(*((64, 2880, 2880, 8, 4) if large else (13, 64, 96, 6, 2)))
    yield Case(
        "moe_experts_list",
        f"one tensor a matrix, {tokens} tokens, {k} of {experts}",
        lambda n: _as_lists(inputs(n, *sizes, False, False)),
        lambda v, backend: ops.moe_experts_list(**v, backend=backend),
        ("hidden", "weights", "gate", "up", "down"),
        lambda v: plain(_stacked(v), "silu", "concatenated"),
        lambda v: cost(_stacked(v)),
    )


def _liger(v: Inputs) -> torch.Tensor:
    os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"  # its own single configuration
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(v["hidden"], v["gate_up"], v["down"], v["ids"].int(), v["weights"])


def _at(s: Shape) -> Case:
    gpt_oss = s.model.family == "gpt_oss"
    one = case(s.tokens, s.model.hidden, s.model.intermediate, s.model.experts, s.model.top_k, gpt_oss)
    eager = None if gpt_oss else one.plain
    peers: dict[str, Any] = {} if gpt_oss else {"liger": _liger}
    return Case(one.op, s.name, one.inputs, one.call, one.gradients, eager, one.cost, peers=peers)


def _liger_swiglu(s: Shape) -> Case:
    """Liger's SwiGLU alone, whose work our experts do in the epilogue of the first product."""

    def call(v: Inputs, backend: str) -> Any:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(v["gate"], v["up"])

    def make(n: Numbers) -> Inputs:
        return {name: n.normal(s.tokens * s.model.top_k, s.model.intermediate) for name in ("gate", "up")}

    def size(v: Inputs) -> tuple[Cost, Cost]:
        return Cost(3 * v["gate"].nbytes, 0, v["gate"].numel()), Cost(5 * v["gate"].nbytes, 0, v["gate"].numel())

    return Case("moe_experts", s.name, make, call, ("gate", "up"), lambda v: functional.silu(v["gate"]) * v["up"], size)


_WIDTHS = dict(hidden=256, intermediate=128, experts=16, top_k=4)
_SMALL = (
    scaled("InternVL3.5-30B-A3B", 64, _WIDTHS),
    scaled("InternVL3.5-30B-A3B", 512, _WIDTHS),
    scaled("InternVL3.5-GPT-OSS-20B-A4B", 61, dict(hidden=200, intermediate=104, experts=6)),
)
SUBJECTS = {
    "moe_experts": Subject(
        _at,
        ("ours",),
        _SMALL,
        ("experts", "hidden", "intermediate", "top_k"),
        (1, 64, 1024, 4096),
        memory_bound=False,
    ),
    "liger swiglu": Subject(_liger_swiglu, ("liger",), _SMALL[:2], ("experts",), ()),
}
