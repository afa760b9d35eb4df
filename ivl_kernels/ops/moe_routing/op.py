"""Schemas, fakes, backends, gradients and argument checks of mixture-of-experts routing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape
from ..._dispatch import Implementation
from ..._library import Op, differentiable
from ..._plan import planned

SCORINGS = ("softmax_then_topk", "topk_then_softmax")


class Routing(NamedTuple):
    logits: Tensor
    bias: Tensor | None
    top_k: int
    scoring: str
    renormalize: bool


class Routed(NamedTuple):
    ids: Tensor
    weights: Tensor


class RoutingBackward(NamedTuple):
    grad: Tensor
    logits: Tensor
    bias: Tensor | None
    ids: Tensor
    scoring: str
    renormalize: bool


class Sorting(NamedTuple):
    ids: Tensor
    num_experts: int
    tile: int


class Dispatch(NamedTuple):
    """The S * k slots (token t, choice j is slot t * k + j) sorted by expert.

    Attributes:
        permutation: [S * k] int32, the slot at each sorted row. Rows of one expert follow each other in the order of
            their slots; slots without an expert come last.
        inverse: [S * k] int32, the sorted row of each slot.
        counts: [E] int32, rows of each expert.
        offsets: [E + 1] int32, expert e has the sorted rows offsets[e] to offsets[e + 1].
        tiles: [S * k // tile + E, 2] int32, (expert, first sorted row) of every tile of `tile` rows, in order; the
            unused tail has expert E. [0, 2] without `tile`.
    """

    permutation: Tensor
    inverse: Tensor
    counts: Tensor
    offsets: Tensor
    tiles: Tensor


def empty_dispatch(a: Sorting) -> Dispatch:
    """The results of `moe_dispatch`, to be written."""
    slots = a.ids.shape[0] * a.ids.shape[1]
    tiles = slots // a.tile + a.num_experts if a.tile else 0
    sizes = ((slots,), (slots,), (a.num_experts,), (a.num_experts + 1,), (tiles, 2))
    return Dispatch(*(a.ids.new_empty(size, dtype=torch.int32) for size in sizes))


def empty_routed(a: Routing) -> Routed:
    """The results of `moe_routing`, to be written."""
    shape = a.logits.shape[0], a.top_k
    return Routed(a.logits.new_empty(shape, dtype=torch.int64), a.logits.new_empty(shape))


def _too_large(a: Routing | RoutingBackward) -> str | None:
    top_k = a.top_k if isinstance(a, Routing) else a.ids.shape[1]
    if a.logits.shape[1] > 512 or top_k > 32:
        return f"a warp holds 512 experts and 32 choices, not {a.logits.shape[1]} and {top_k}"
    return None


def _too_many(a: Sorting) -> str | None:
    # 44 bytes of shared memory for an expert, beside 24 KB of ids.
    return f"a block counts 512 experts, not {a.num_experts}" if a.num_experts > 512 else None


_BACKENDS = (
    Implementation("cpu", KERNEL_DTYPES),
    Implementation("cuda", KERNEL_DTYPES, _too_large),
    Implementation("triton", KERNEL_DTYPES),
    Implementation("reference"),
)

_routing = Op("moe_routing", Routing, Routed, key="logits", implementations=_BACKENDS, fake=empty_routed)

_routing_backward = Op(
    "moe_routing_backward",
    RoutingBackward,
    Tensor,
    key="logits",
    implementations=_BACKENDS,
    fake=lambda a: a.logits.new_empty(a.logits.shape),
)

_dispatch = Op(
    "moe_dispatch",
    Sorting,
    Dispatch,
    key="ids",
    implementations=(
        Implementation("cpu", ("int64", "int32")),
        Implementation("cuda", unless=_too_many),
        Implementation("triton"),
        Implementation("reference"),
    ),
    fake=empty_dispatch,
)


def _save(a: Routing, routed: Routed) -> RoutingBackward:
    return RoutingBackward(routed.weights, a.logits, a.bias, routed.ids, a.scoring, a.renormalize)


def _gradients(b: RoutingBackward, needs: Any, backend: str, _: None, grad: Tensor) -> dict[str, Tensor | None]:
    logits = _routing_backward(b._replace(grad=grad), backend)
    return {"logits": logits, "bias": logits.sum(0) if needs.bias else None}


_differentiable = differentiable(_routing, _save, _gradients)


@planned
def moe_routing(a: Routing, backend: str) -> Routed:
    check_shape("logits", a.logits, ("S", "E"))
    check_dtype("logits", a.logits, FLOATS)
    experts = a.logits.shape[1]
    if not 1 <= a.top_k <= experts:
        raise ValueError(f"top_k: got {a.top_k}, expected 1 to the number of experts, {experts}")
    if a.scoring not in SCORINGS:
        raise ValueError(f"scoring: got {a.scoring!r}, expected one of {', '.join(SCORINGS)}")
    if a.renormalize and a.scoring != "softmax_then_topk":
        raise ValueError(f"renormalize: got True with scoring {a.scoring!r}, expected 'softmax_then_topk'")
    if a.bias is not None:
        check_shape("bias", a.bias, (experts,))
        check_same("bias", a.bias, "logits", a.logits)
    return _differentiable(a, backend)


@planned
def moe_dispatch(a: Sorting, backend: str) -> Dispatch:
    check_shape("ids", a.ids, ("S", "k"))
    check_dtype("ids", a.ids, (torch.int64, torch.int32))
    if a.num_experts < 1:
        raise ValueError(f"num_experts: got {a.num_experts}, expected at least 1")
    if a.tile < 0:
        raise ValueError(f"tile: got {a.tile}, expected 0 or the rows of a tile")
    if a.ids.shape[0] * a.ids.shape[1] >= 2**31:
        raise ValueError(f"ids: got {list(a.ids.shape)}, expected fewer than 2^31 slots")
    return _dispatch(a, backend)
