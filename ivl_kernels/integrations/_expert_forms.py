"""How classes of experts compute, judged on a few numbers: which of them one op can serve."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..models.upstream import signature
from ..ops.moe_experts import moe_experts, moe_experts_list

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class _Bare:
    """Stands for an instance of a class with nothing but these attributes, to see what its methods compute."""

    def __init__(self, kind: type, **attributes: Any) -> None:
        self.__dict__.update(attributes, _kind=kind)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_kind"], name)
        return types.MethodType(value, self) if isinstance(value, types.FunctionType) else value


@dataclass(frozen=True)
class Form:
    """How a class of stacked experts computes.

    Attributes:
        kind: the class.
        names: of its forward's arguments: hidden states, expert ids, routing weights.
        activation, layout: as of `moe_experts`.
        tensors: attributes that hold gate_up, down, and their biases.
        dense: the routing weights are those of all experts, not of the chosen ones.
    """

    kind: type
    names: tuple[str, ...]
    activation: str
    layout: str
    tensors: tuple[str, ...]
    dense: bool

    @property
    def gpt_oss(self) -> bool:
        return self.activation == "gpt_oss"


WEIGHTS = ("gate_up_proj", "down_proj")
_BIASES = ("gate_up_proj_bias", "down_proj_bias")


def _numbers(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _probing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Once a class and its forward, on the CPU, without gradients and autocast."""

    @functools.cache
    def once(kinds: tuple[Any, ...], forwards: tuple[Any, ...]) -> Any:
        with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return function(*kinds)

    return lambda *kinds: once(kinds, tuple(kind.forward for kind in kinds))


@_probing
def computes_silu(kind: type) -> bool:
    x = _numbers(64, seed=0) * 4
    try:
        return torch.allclose(kind.forward(_Bare(kind, inplace=False), x), F.silu(x), rtol=0, atol=1e-12)  # type: ignore[attr-defined]
    except Exception:
        return False


@_probing
def form_of(kind: type) -> Form | str:
    """How this class of stacked experts computes, or why it is none as we know it."""
    tokens, experts, width, inner, alpha, limit = 5, 4, 6, 3, 1.3, 0.5
    names = tuple(signature(inspect.unwrap(kind.forward)).parameters)[1:4]  # type: ignore[attr-defined]
    hidden, scores = _numbers(tokens, width, seed=0), _numbers(tokens, experts, seed=1).sigmoid()
    ids = scores.topk(2).indices
    failed = f"{kind.__name__} computes something else"
    for activation, layout in (("silu", "concatenated"), ("gpt_oss", "interleaved")):
        transposed = layout == "interleaved"
        gate_up, down = _numbers(experts, 2 * inner, width, seed=2), _numbers(experts, width, inner, seed=3)
        if transposed:
            gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
        biases = (_numbers(experts, 2 * inner, seed=4), _numbers(experts, width, seed=5)) if transposed else ()
        tensors = dict(zip((*WEIGHTS, *_BIASES), (gate_up, down, *biases)))
        bare = _Bare(
            kind, **tensors, num_experts=experts, hidden_dim=width, hidden_size=width, intermediate_dim=inner,
            intermediate_size=inner, expert_dim=inner, act_fn=F.silu, alpha=alpha, limit=limit, training=False,
            config=types.SimpleNamespace(_experts_implementation="eager"), _is_expert_parallel=False,
        )  # fmt: skip
        expected = moe_experts(
            hidden, ids, scores.gather(1, ids), gate_up, down, **biases_of(tensors), activation=activation, alpha=alpha,
            limit=limit, layout=layout, backend="reference",
        )  # fmt: skip
        for dense in (False, True):
            try:
                got = kind.forward(bare, hidden, ids, scores if dense else scores.gather(1, ids))  # type: ignore[attr-defined]
                if torch.allclose(got.reshape(tokens, width), expected, rtol=0, atol=1e-10):
                    return Form(kind, names, activation, layout, tuple(tensors), dense)
            except Exception as error:
                failed = f"{kind.__name__} is not as we know it ({error})"
    return f"unknown structure: {failed}"


def biases_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    gate_up_bias, down_bias = (tensors.get(name) for name in _BIASES)
    return {"gate_up_bias": gate_up_bias, "down_bias": down_bias}


def route(block: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and float32 weights of a block with a list of experts."""
    weights, ids = logits.softmax(dim=1, dtype=torch.float).topk(block.top_k, dim=-1)
    return ids, weights / weights.sum(dim=-1, keepdim=True) if block.norm_topk_prob else weights


@_probing
def list_problem(kind: type, expert_kind: type) -> str:
    """Why this class of block, with a list of experts of that class, cannot be ours, or ""."""
    tokens, experts, width, inner = 5, 4, 6, 3
    hidden = _numbers(1, tokens, width, seed=0)
    router = _numbers(experts, width, seed=1)
    gate, up = _numbers(experts, inner, width, seed=2), _numbers(experts, inner, width, seed=3)
    down = _numbers(experts, width, inner, seed=4)

    def linear(weight: torch.Tensor) -> Callable[..., Any]:
        return functools.partial(F.linear, weight=weight)

    def expert(*weights: torch.Tensor) -> Callable[..., Any]:
        bare = _Bare(expert_kind, **dict(zip(PROJECTIONS, map(linear, weights))), act_fn=F.silu)
        return functools.partial(expert_kind.forward, bare)  # type: ignore[attr-defined]

    loop = list(map(expert, gate, up, down))
    for norm in (False, True):
        bare = _Bare(kind, gate=linear(router), experts=loop, num_experts=experts, top_k=2, norm_topk_prob=norm)
        try:
            got, logits = kind.forward(bare, hidden)  # type: ignore[attr-defined]
            ids, weights = route(bare, logits)
            lists = (list(gate), list(up), list(down))
            expected = moe_experts_list(hidden[0], ids, weights.double(), *lists, backend="reference")
            same = torch.equal(logits, hidden[0] @ router.T)
            if not same or not torch.allclose(got, expected.unsqueeze(0), rtol=0, atol=1e-10):
                return f"unknown structure: {kind.__name__} of {expert_kind.__name__} computes something else"
        except Exception as error:
            return f"unknown structure: {kind.__name__} is not as we know it ({error})"
    return ""
