"""Schemas, fakes, backends, gradients and argument checks of mixture-of-experts routing."""

from __future__ import annotations

from typing import Any

import torch

from ..._checks import FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape
from ..._dispatch import Implementation
from ..._library import Op

SCORINGS = ("softmax_then_topk", "topk_then_softmax")


def _too_large(logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, *rest: Any) -> str | None:
    if logits.shape[1] > 512 or top_k > 32:
        return f"a warp holds 512 experts and 32 choices, not {logits.shape[1]} and {top_k}"
    return None


def _too_large_backward(
    grad: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, *rest: Any
) -> str | None:
    return _too_large(logits, bias, ids.shape[1])


def _too_many(ids: torch.Tensor, num_experts: int, tile: int) -> str | None:
    # 44 bytes of shared memory for an expert, beside 24 KB of ids.
    return f"a block counts 512 experts, not {num_experts}" if num_experts > 512 else None


def _fake_dispatch(ids: torch.Tensor, num_experts: int, tile: int, backend: str) -> tuple[torch.Tensor, ...]:
    slots = ids.shape[0] * ids.shape[1]
    sizes = ((slots,), (slots,), (num_experts,), (num_experts + 1,), (slots // tile + num_experts if tile else 0, 2))
    return tuple(ids.new_empty(size, dtype=torch.int32) for size in sizes)


_routing = Op(
    "moe_routing(Tensor logits, Tensor? bias, int top_k, str scoring, bool renormalize, str backend)"
    " -> (Tensor ids, Tensor weights)",
    package=__package__,
    key="logits",
    implementations=(
        Implementation("native", "native:moe_routing", ("cpu",), KERNEL_DTYPES),
        Implementation("cuda", "cuda:moe_routing", ("cuda",), KERNEL_DTYPES, _too_large),
        Implementation("triton", "triton:moe_routing", ("cuda", "hip"), KERNEL_DTYPES),
        Implementation("reference", "reference:moe_routing"),
    ),
    fake=lambda logits, bias, top_k, scoring, renormalize, backend: (
        logits.new_empty(logits.shape[0], top_k, dtype=torch.int64),
        logits.new_empty(logits.shape[0], top_k),
    ),
)

_routing_backward = Op(
    "moe_routing_backward(Tensor grad, Tensor logits, Tensor? bias, Tensor ids, str scoring, bool renormalize,"
    " str backend) -> Tensor",
    package=__package__,
    key="logits",
    implementations=(
        Implementation("native", "native:moe_routing_backward", ("cpu",), KERNEL_DTYPES),
        Implementation("cuda", "cuda:moe_routing_backward", ("cuda",), KERNEL_DTYPES, _too_large_backward),
        Implementation("triton", "triton:moe_routing_backward", ("cuda", "hip"), KERNEL_DTYPES),
        Implementation("reference", "reference:moe_routing_backward"),
    ),
    fake=lambda grad, logits, bias, ids, scoring, renormalize, backend: logits.new_empty(logits.shape),
)

_dispatch = Op(
    "moe_dispatch(Tensor ids, int num_experts, int tile, str backend)"
    " -> (Tensor permutation, Tensor inverse, Tensor counts, Tensor offsets, Tensor tiles)",
    package=__package__,
    key="ids",
    implementations=(
        Implementation("native", "native:moe_dispatch", ("cpu",), ("int64", "int32")),
        Implementation("cuda", "cuda:moe_dispatch", ("cuda",), unless=_too_many),
        Implementation("triton", "triton:moe_dispatch", ("cuda", "hip")),
        Implementation("reference", "reference:moe_dispatch"),
    ),
    fake=_fake_dispatch,
)


class _Routing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        top_k: int,
        scoring: str,
        renormalize: bool,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = _routing(logits, bias, top_k, scoring, renormalize, backend)
        ctx.save_for_backward(logits, bias, ids)
        ctx.options = scoring, renormalize, backend
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, bias, ids = ctx.saved_tensors
        grad = _routing_backward(grads[1], logits, bias, ids, *ctx.options)
        return grad, grad.sum(0) if ctx.needs_input_grad[1] else None, None, None, None, None


def moe_routing(
    logits: torch.Tensor, top_k: int, scoring: str, renormalize: bool, bias: torch.Tensor | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    check_shape("logits", logits, ("S", "E"))
    check_dtype("logits", logits, FLOATS)
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k: got {top_k}, expected 1 to the number of experts, {logits.shape[1]}")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring: got {scoring!r}, expected one of {', '.join(SCORINGS)}")
    if renormalize and scoring != "softmax_then_topk":
        raise ValueError(f"renormalize: got True with scoring {scoring!r}, expected 'softmax_then_topk'")
    if bias is not None:
        check_shape("bias", bias, (logits.shape[1],))
        check_same("bias", bias, "logits", logits)
    return _Routing.apply(logits, bias, top_k, scoring, renormalize, backend)


def moe_dispatch(ids: torch.Tensor, num_experts: int, tile: int, backend: str) -> tuple[torch.Tensor, ...]:
    check_shape("ids", ids, ("S", "k"))
    check_dtype("ids", ids, (torch.int64, torch.int32))
    if num_experts < 1:
        raise ValueError(f"num_experts: got {num_experts}, expected at least 1")
    if tile < 0:
        raise ValueError(f"tile: got {tile}, expected 0 or the rows of a tile")
    if ids.shape[0] * ids.shape[1] >= 2**31:
        raise ValueError(f"ids: got {list(ids.shape)}, expected fewer than 2^31 slots")
    return _dispatch(ids, num_experts, tile, backend)
