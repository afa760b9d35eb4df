"""Schemas, fakes, backends, gradients and argument checks of token packing."""

from __future__ import annotations

from typing import Any

import torch

from ..._checks import FLOAT_NAMES, FLOATS, check_dtype, check_same, check_shape
from ..._dispatch import Implementation
from ..._library import Op

_place_rows = Op(
    "place_rows_(Tensor(a!) embeds, Tensor positions, Tensor rows, str backend) -> ()",
    package=__package__,
    key="embeds",
    implementations=(
        Implementation("native", "native:place_rows_", ("cpu",), FLOAT_NAMES),
        Implementation("cuda", "cuda:place_rows_", ("cuda",), FLOAT_NAMES),
        Implementation("reference", "reference:place_rows_"),
    ),
    fake=lambda embeds, positions, rows, backend: None,
)

_take_rows = Op(
    "take_rows(Tensor embeds, Tensor positions, str backend) -> Tensor",
    package=__package__,
    key="embeds",
    implementations=(
        Implementation("native", "native:take_rows", ("cpu",), FLOAT_NAMES),
        Implementation("cuda", "cuda:take_rows", ("cuda",), FLOAT_NAMES),
        Implementation("reference", "reference:take_rows"),
    ),
    fake=lambda embeds, positions, backend: embeds.new_empty(positions.shape[0], embeds.shape[2]),
)


class _PlaceRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, inplace: bool, backend: str
    ) -> torch.Tensor:
        ctx.save_for_backward(positions)
        ctx.backend = backend
        if inplace:
            ctx.mark_dirty(embeds)
            out = embeds
        else:
            out = embeds.clone()
        _place_rows(out, positions, rows, backend)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        (positions,) = ctx.saved_tensors
        grad_embeds = grad_rows = None
        if ctx.needs_input_grad[2]:
            grad_rows = _take_rows(grad, positions, ctx.backend)
        if ctx.needs_input_grad[0]:
            grad_embeds = grad.clone()
            _place_rows(grad_embeds, positions, grad.new_zeros(positions.shape[0], grad.shape[2]), ctx.backend)
        return grad_embeds, None, grad_rows, None, None


def place_rows(
    embeds: torch.Tensor, input_ids: torch.Tensor, rows: torch.Tensor, token_id: int, inplace: bool, backend: str
) -> torch.Tensor:
    check_shape("embeds", embeds, ("B", "N", "H"))
    check_dtype("embeds", embeds, FLOATS)
    check_shape("input_ids", input_ids, embeds.shape[:2])
    check_dtype("input_ids", input_ids, (torch.int64,))
    check_same("input_ids", input_ids, "embeds", embeds, dtype=False)
    check_same("rows", rows, "embeds", embeds)
    width = embeds.shape[2]
    if rows.dim() < 2 or rows.shape[-1] != width:
        raise ValueError(f"rows: got shape {list(rows.shape)}, expected [..., {width}] as embeds")
    rows = rows.reshape(-1, width)
    positions = (input_ids.reshape(-1) == token_id).nonzero().squeeze(1)
    if positions.shape[0] != rows.shape[0]:
        raise ValueError(
            f"rows: got {rows.shape[0]} visual rows for {positions.shape[0]} placeholder tokens (id {token_id}) in "
            "input_ids; the counts must be equal"
        )
    return _PlaceRows.apply(embeds, positions, rows, inplace, backend)
