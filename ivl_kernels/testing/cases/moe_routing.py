"""Choosing the experts of each token, and the lists of rows that the experts work through."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from ... import ops
from ..catalogue import MODELS
from . import Case, Cost, Numbers, Shape, Subject, Timed, scaled
from ._case import Inputs

MOE, OSS = "InternVL3.5-30B-A3B", "InternVL3.5-GPT-OSS-20B-A4B"


def eager(v: Inputs, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' Qwen3-MoE: softmax of all, then the largest, which sum to one."""
    values, ids = v["logits"].float().softmax(-1).topk(top_k, dim=-1)
    return (values / values.sum(-1, keepdim=True)).to(v["logits"].dtype), ids


def routing_cost(v: Inputs, top_k: int) -> tuple[Cost, Cost]:
    logits = v["logits"]
    chosen = logits.shape[0] * top_k * (8 + logits.itemsize)
    return Cost(logits.nbytes + chosen, 0, logits.numel()), Cost(2 * logits.nbytes + chosen, 0, logits.numel())


def dispatch_cost(v: Inputs, experts: int, tile: int) -> tuple[Cost, Cost]:
    from ...ops.moe_routing.cuda import SLOTS

    slots = v["ids"].numel()
    least = slots * (8 + 2 * 4) + 4 * (2 * experts + 1) + 8 * (slots // tile + experts)
    # Above what one block holds, ids are read twice: the first row of an expert depends on all of them.
    return Cost(least, 0, slots, least + (8 * slots if slots > SLOTS else 0)), Cost(0)


def cases(large: bool) -> Iterator[Case]:
    tokens = 700 if large else 13

    # The weights alone: which expert wins a near tie may depend on the rounding of the dtype.
    def route(v: Inputs, backend: str, top_k: int, **convention: Any) -> torch.Tensor:
        return ops.moe_routing(v["logits"], top_k, **convention, backend=backend)[1]

    for scoring, renormalize, experts, k in (("softmax_then_topk", True, 128, 8), ("topk_then_softmax", False, 32, 4)):
        yield Case(
            "moe_routing",
            f"{scoring}, {k} of {experts}",
            lambda n, experts=experts: {"logits": n.normal(tokens, experts, scale=2.0)},  # type: ignore[misc]
            functools.partial(route, top_k=k, scoring=scoring, renormalize=renormalize),
            ("logits",),
            cost=functools.partial(routing_cost, top_k=k),
            graph=True,
        )

        def ids(n: Numbers, experts: int = experts, k: int = k) -> Inputs:
            return {
                "ids": torch.randint(0, experts + 1, (tokens, k), generator=n.generator, device=n.device)
            }  # some beyond the last

        def dispatch(v: Inputs, backend: str, experts: int = experts) -> Any:
            return tuple(ops.moe_dispatch(v["ids"], experts, tile=16, backend=backend))

        yield Case(
            "moe_dispatch",
            f"{k} of {experts}",
            ids,
            dispatch,
            cost=functools.partial(dispatch_cost, experts=experts, tile=16),
            graph=True,
        )


def _both(tokens: int) -> Case:
    """Routing and dispatch, as far as the experts need them."""
    experts, top_k = MODELS[MOE].experts, MODELS[MOE].top_k

    def call(v: Inputs, backend: str) -> Any:
        ids, weights = ops.moe_routing(v["logits"], top_k, renormalize=True, backend=backend)
        return ops.moe_dispatch(ids, experts, backend=backend).offsets, weights

    def plain(v: Inputs) -> Any:
        weights, ids = torch.topk(v["logits"].softmax(-1, dtype=torch.float), top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        sorted_ids, order = torch.sort(ids.reshape(-1))
        counts = torch.histc(sorted_ids.float(), bins=experts, min=0, max=experts - 1)
        torch.empty_like(order)[order] = torch.arange(order.shape[0], device=order.device)
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(), weights

    name = f"routing and dispatch tokens={tokens}"
    cost = functools.partial(routing_cost, top_k=top_k)
    return Case("moe_routing", name, lambda n: {"logits": n.normal(tokens, experts)}, call, plain=plain, cost=cost)


def timed(quick: bool) -> Iterator[Timed]:
    for tokens in (320,) if quick else (1, 320, 3400):
        one = _both(tokens)
        yield Timed("moe_routing", one.name, one, torch.float32, {"tokens": tokens}, compile=False)


def _routing_at(s: Shape) -> Case:
    gpt_oss, top_k = s.model.family == "gpt_oss", s.model.top_k
    options: dict[str, Any] = {"scoring": "topk_then_softmax"} if gpt_oss else {"renormalize": True}
    return Case(
        "moe_routing",
        s.name,
        lambda n: {"logits": n.normal(s.tokens, s.model.experts)},
        lambda v, backend: ops.moe_routing(v["logits"], top_k, **options, backend=backend),
        ("logits",),
        lambda v: eager(v, top_k),
        functools.partial(routing_cost, top_k=top_k),
    )


def _dispatch_at(s: Shape) -> Case:
    from ...ops.moe_experts.op import tile_rows

    experts = s.model.experts
    tile = tile_rows(s.tokens * s.model.top_k, experts)
    return Case(
        "moe_dispatch",
        s.name,
        lambda n: {"ids": n.choices(s.tokens, experts, s.model.top_k)},
        lambda v, backend: ops.moe_dispatch(v["ids"], experts, tile=tile, backend=backend),
        cost=functools.partial(dispatch_cost, experts=experts, tile=tile),
    )


SUBJECTS = {
    "moe_routing": Subject(_routing_at, ("cuda", "triton"), (scaled(MOE, 64), scaled(OSS, 37)), ("experts", "top_k")),
    "moe_dispatch": Subject(
        _dispatch_at,
        ("cuda", "triton"),
        (scaled(MOE, 512), scaled(OSS, 37), scaled(MOE, 1030)),
        ("experts", "top_k"),
        (64, 3392),
        dtypes=("bf16",),
    ),
}
