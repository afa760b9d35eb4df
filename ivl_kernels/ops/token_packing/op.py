"""Schemas, fakes, backends, gradients and argument checks of token packing."""

from __future__ import annotations

from typing import Any

import torch

from ..._checks import FLOAT_NAMES, FLOATS, check_dtype, check_same, check_shape
from ..._positional import Implementation, Op
from .packed import PADDINGS, STATUS, PackedTokens, Pieces

_place_rows = Op(
    "place_rows_(Tensor(a!) embeds, Tensor input_ids, Tensor rows, int token_id, str backend) -> ()",
    package=__package__,
    key="embeds",
    reads_host=True,
    implementations=(
        Implementation("native", "native:place_rows_", ("cpu",), FLOAT_NAMES),
        Implementation("cuda", "cuda:place_rows_", ("cuda",), FLOAT_NAMES),
        Implementation("triton", "triton:place_rows_", ("cuda", "hip"), FLOAT_NAMES),
        Implementation("reference", "reference:place_rows_"),
    ),
    fake=lambda embeds, input_ids, rows, token_id, backend: None,
)

_take_rows = Op(
    "take_rows(Tensor embeds, Tensor input_ids, SymInt count, int token_id, str backend) -> Tensor",
    package=__package__,
    key="embeds",
    reads_host=True,
    implementations=(
        Implementation("native", "native:take_rows", ("cpu",), FLOAT_NAMES),
        Implementation("cuda", "cuda:take_rows", ("cuda",), FLOAT_NAMES),
        Implementation("triton", "triton:take_rows", ("cuda", "hip"), FLOAT_NAMES),
        Implementation("reference", "reference:take_rows"),
    ),
    fake=lambda embeds, input_ids, count, token_id, backend: embeds.new_empty(count, embeds.shape[2]),
)


def _fake_pack(
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    compress: torch.Tensor,
    labels: torch.Tensor | None,
    weights: torch.Tensor | None,
    table: torch.Tensor | None,
    token_id: int,
    full: int,
    small: int,
    vocabulary: int,
    padding: str,
    capacity: bool,
    pad_id: int,
    backend: str,
) -> Pieces:
    batch, columns = input_ids.shape
    none = padding == "none"
    width = (batch * columns if none else columns) if capacity else torch.library.get_ctx().new_dynamic_size()
    shape = (1, width) if none else (batch, width)
    integers = input_ids.new_empty(4 if labels is None else 5, *shape)
    new_weights = input_ids.new_empty(0 if weights is None else shape, dtype=torch.float32)
    keep = torch.empty_like(input_ids, dtype=torch.bool, memory_format=torch.contiguous_format)
    status, tile_rows = input_ids.new_empty(batch, STATUS), input_ids.new_empty(compress.shape[0])
    report_shape = (0,) if input_ids.device.type == "cpu" else (batch, STATUS)
    report = torch.empty(report_shape, dtype=torch.int64, device="cpu")
    embeds = new_weights.new_empty(0) if table is None else table.new_empty(*shape, table.shape[1])
    return integers, new_weights, embeds, keep, status, tile_rows, report


def _too_long(input_ids: torch.Tensor, *rest: Any) -> str | None:
    columns = input_ids.shape[1]
    # 12 bytes of shared memory for 32 tokens, beside the kernel's own.
    return f"a block holds rows of up to 128,000 tokens, not {columns}" if columns > 128_000 else None


_pack_tokens = Op(
    "pack_tokens(Tensor input_ids, Tensor? mask, Tensor compress, Tensor? labels, Tensor? loss_weights, Tensor? table, "
    "int token_id, int tokens_per_tile, int compressed_tokens, int vocabulary, str padding, bool capacity, int pad_id, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    package=__package__,
    key="input_ids",
    reads_host=True,
    implementations=(
        Implementation("native", "native:pack_tokens", ("cpu",)),
        Implementation("cuda", "cuda:pack_tokens", ("cuda",), unless=_too_long),
        Implementation("reference", "reference:pack_tokens"),
    ),
    fake=_fake_pack,
)


_embed_text = Op(
    "embed_text(Tensor ids, Tensor table, int token_id, str backend) -> Tensor",
    package=__package__,
    key="table",
    implementations=(
        Implementation("native", "native:embed_text", ("cpu",), FLOAT_NAMES),
        Implementation("cuda", "cuda:embed_text", ("cuda",), FLOAT_NAMES),
        Implementation("reference", "reference:embed_text"),
    ),
    fake=lambda ids, table, token_id, backend: table.new_empty(*ids.shape, table.shape[1]),
)


class _PlaceRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeds: torch.Tensor,
        input_ids: torch.Tensor,
        rows: torch.Tensor,
        token_id: int,
        inplace: bool,
        backend: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(input_ids)
        ctx.count, ctx.token_id, ctx.backend = rows.shape[0], token_id, backend
        if inplace:
            ctx.mark_dirty(embeds)
            out = embeds
        else:
            out = embeds.clone()
        _place_rows(out, input_ids, rows, token_id, backend)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        (input_ids,) = ctx.saved_tensors
        grad_embeds = grad_rows = None
        if ctx.needs_input_grad[2]:
            grad_rows = _take_rows(grad, input_ids, ctx.count, ctx.token_id, ctx.backend)
        if ctx.needs_input_grad[0]:
            grad_embeds = grad.masked_fill((input_ids == ctx.token_id).unsqueeze(-1), 0)
        return grad_embeds, None, grad_rows, None, None, None


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
    if torch.is_grad_enabled() and (embeds.requires_grad or rows.requires_grad):
        return _PlaceRows.apply(embeds, input_ids, rows, token_id, inplace, backend)
    out = embeds if inplace else embeds.clone()
    _place_rows(out, input_ids, rows, token_id, backend)
    return out


def _checked_table(name: str, table: torch.Tensor, ids: torch.Tensor, other: str) -> torch.Tensor:
    check_shape(name, table, ("V", "H"))
    check_dtype(name, table, FLOATS)
    check_same(name, table, other, ids, dtype=False)
    if table.shape[0] == 0 and ids.numel():
        raise ValueError(f"{name}: got no rows, expected one for each id")
    return (table.detach() if table.requires_grad else table).contiguous()


def embed_text(ids: torch.Tensor, table: torch.Tensor, token_id: int, backend: str) -> torch.Tensor:
    check_shape("ids", ids, ("B", "N"))
    check_dtype("ids", ids, (torch.int64,))
    return _embed_text(ids, _checked_table("table", table, ids, "ids"), token_id, backend)


def pack_tokens(
    input_ids: torch.Tensor,
    compress: torch.Tensor,
    token_id: int,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    loss_weights: torch.Tensor | None,
    embedding: torch.Tensor | None,
    padding: str,
    capacity: bool,
    pad_id: int,
    vocabulary: int | None,
    tokens_per_tile: int,
    compressed_tokens: int,
    backend: str,
) -> PackedTokens:
    check_shape("input_ids", input_ids, ("B", "N"))
    check_dtype("input_ids", input_ids, (torch.int64,))
    check_shape("compress", compress, ("T",))
    check_dtype("compress", compress, (torch.bool,))
    check_same("compress", compress, "input_ids", input_ids, dtype=False)
    for name, tensor, dtype in (
        ("attention_mask", attention_mask, None),
        ("labels", labels, torch.int64),
        ("loss_weights", loss_weights, torch.float32),
    ):
        if tensor is not None:
            check_shape(name, tensor, input_ids.shape)
            check_same(name, tensor, "input_ids", input_ids, dtype=False)
            if dtype is not None:
                check_dtype(name, tensor, (dtype,))
    if padding not in PADDINGS:
        raise ValueError(f"padding: got {padding!r}, expected one of {', '.join(PADDINGS)}")
    if not 0 < compressed_tokens <= tokens_per_tile:
        raise ValueError(
            f"compressed_tokens: got {compressed_tokens}, expected 1 to {tokens_per_tile} (tokens_per_tile)"
        )
    table = None
    if embedding is not None:
        table = _checked_table("embedding", embedding, input_ids, "input_ids")
        vocabulary = table.shape[0] if vocabulary is None else min(vocabulary, table.shape[0])
        if input_ids.numel() and not 0 <= pad_id < table.shape[0]:
            raise ValueError(f"pad_id: got {pad_id}, expected 0 to {table.shape[0] - 1} (rows of embedding)")
    mask = None
    if attention_mask is not None:
        plain = attention_mask.dtype in (torch.bool, torch.int64)
        mask = (attention_mask if plain else attention_mask != 0).contiguous()
    vocabulary = 2**62 if vocabulary is None else vocabulary
    integers, new_weights, embeds, keep, status, tile_rows, report = _pack_tokens(
        input_ids.contiguous(),
        mask,
        compress.contiguous(),
        None if labels is None else labels.contiguous(),
        None if loss_weights is None else loss_weights.contiguous(),
        table,
        token_id,
        tokens_per_tile,
        compressed_tokens,
        vocabulary,
        padding,
        capacity,
        pad_id,
        backend,
    )
    ids, new_mask, positions, kept, *new_labels = integers.unbind(0)
    return PackedTokens(
        ids=ids,
        attention_mask=new_mask,
        position_ids=positions,
        kept=kept,
        keep=keep,
        tile_rows=tile_rows,
        labels=new_labels[0] if new_labels else None,
        loss_weights=None if loss_weights is None else new_weights,
        embeds=None if table is None else embeds,
        max_length=input_ids.shape[1] if padding == "none" else ids.shape[1],
        tokens_per_tile=tokens_per_tile,
        compressed_tokens=compressed_tokens,
        _report=report,
        _inputs=(status, input_ids, mask, compress.shape[0], token_id, tokens_per_tile, vocabulary),
    )
