"""Records, fakes, backends, gradients and argument checks of token packing."""

from __future__ import annotations

from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import FLOAT_NAMES, FLOATS, check_dtype, check_same, check_shape
from ..._dispatch import Implementation
from ..._library import Op, differentiable
from ..._plan import planned
from .packed import PADDINGS, STATUS, PackedTokens, Packing, Pieces


class PlaceRows(NamedTuple):
    embeds: Tensor
    input_ids: Tensor
    rows: Tensor
    token_id: int


class TakeRows(NamedTuple):
    embeds: Tensor
    input_ids: Tensor
    number: int  # of rows
    token_id: int


class EmbedText(NamedTuple):
    ids: Tensor
    table: Tensor
    token_id: int


_BACKENDS = tuple(Implementation(backend, FLOAT_NAMES) for backend in ("cpu", "cuda", "triton", "reference"))

_place_rows = Op(
    "place_rows_",
    PlaceRows,
    NoneType,
    key="embeds",
    reads_host=True,
    implementations=_BACKENDS,
    fake=lambda a: None,
    written=("embeds",),
)

_take_rows = Op(
    "take_rows",
    TakeRows,
    Tensor,
    key="embeds",
    reads_host=True,
    implementations=_BACKENDS,
    fake=lambda a: a.embeds.new_empty(a.number, a.embeds.shape[2]),
)


def _fake_pack(a: Packing) -> Pieces:
    batch, columns = a.input_ids.shape
    none = a.padding == "none"
    width = (batch * columns if none else columns) if a.capacity else torch.library.get_ctx().new_dynamic_size()
    shape = (1, width) if none else (batch, width)
    integers = a.input_ids.new_empty(4 if a.labels is None else 5, *shape)
    loss_weights = a.input_ids.new_empty(0 if a.loss_weights is None else shape, dtype=torch.float32)
    report_shape = (0,) if a.input_ids.device.type == "cpu" else (batch, STATUS)
    return Pieces(
        integers,
        loss_weights,
        loss_weights.new_empty(0) if a.table is None else a.table.new_empty(*shape, a.table.shape[1]),
        torch.empty_like(a.input_ids, dtype=torch.bool, memory_format=torch.contiguous_format),
        a.input_ids.new_empty(batch, STATUS),
        a.input_ids.new_empty(a.compress.shape[0]),
        torch.empty(report_shape, dtype=torch.int64, device="cpu"),
    )


def _too_long(a: Packing) -> str | None:
    columns = a.input_ids.shape[1]
    # 12 bytes of shared memory for 32 tokens, beside the kernel's own.
    return f"a block holds rows of up to 128,000 tokens, not {columns}" if columns > 128_000 else None


_pack_tokens = Op(
    "pack_tokens",
    Packing,
    Pieces,
    key="input_ids",
    reads_host=True,
    implementations=(
        Implementation("cpu"),
        Implementation("cuda", unless=_too_long),
        Implementation("triton"),
        Implementation("reference"),
    ),
    fake=_fake_pack,
)

_embed_text = Op(
    "embed_text",
    EmbedText,
    Tensor,
    key="table",
    implementations=_BACKENDS,
    fake=lambda a: a.table.new_empty(*a.ids.shape, a.table.shape[1]),
)


def _gradients(saved: tuple[Tensor, int, int], needs: Any, backend: str, grad: Tensor) -> dict[str, Tensor | None]:
    input_ids, count, token_id = saved
    rows = embeds = None
    if needs.rows:
        rows = _take_rows(TakeRows(grad, *saved), backend)
    if needs.embeds:
        embeds = grad.masked_fill((input_ids == token_id).unsqueeze(-1), 0)
    return {"embeds": embeds, "rows": rows}


_differentiable = differentiable(_place_rows, lambda a, _: (a.input_ids, a.rows.shape[0], a.token_id), _gradients)


def place_rows(embeds: Tensor, input_ids: Tensor, rows: Tensor, token_id: int, inplace: bool, backend: str) -> Tensor:
    check_shape("embeds", embeds, ("B", "N", "H"))
    check_dtype("embeds", embeds, FLOATS)
    check_shape("input_ids", input_ids, embeds.shape[:2])
    check_dtype("input_ids", input_ids, (torch.int64,))
    check_same("input_ids", input_ids, "embeds", embeds, dtype=False)
    check_same("rows", rows, "embeds", embeds)
    width = embeds.shape[2]
    if rows.dim() < 2 or rows.shape[-1] != width:
        raise ValueError(f"rows: got shape {list(rows.shape)}, expected [..., {width}] as embeds")
    out = embeds if inplace else embeds.clone()
    _differentiable(PlaceRows(out, input_ids, rows.reshape(-1, width), token_id), backend)
    return out


def _checked_table(name: str, table: Tensor, ids: Tensor, other: str) -> Tensor:
    check_shape(name, table, ("V", "H"))
    check_dtype(name, table, FLOATS)
    check_same(name, table, other, ids, dtype=False)
    if table.shape[0] == 0 and ids.numel():
        raise ValueError(f"{name}: got no rows, expected one for each id")
    return (table.detach() if table.requires_grad else table).contiguous()


@planned
def embed_text(ids: Tensor, table: Tensor, token_id: int, backend: str) -> Tensor:
    check_shape("ids", ids, ("B", "N"))
    check_dtype("ids", ids, (torch.int64,))
    return _embed_text(EmbedText(ids, _checked_table("table", table, ids, "ids"), token_id), backend)


def pack_tokens(
    input_ids: Tensor,
    compress: Tensor,
    token_id: int,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    loss_weights: Tensor | None,
    embedding: Tensor | None,
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
    a = Packing(
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
    )
    pieces = _pack_tokens(a, backend)
    ids, new_mask, positions, kept, *new_labels = pieces.integers.unbind(0)
    return PackedTokens(
        ids=ids,
        attention_mask=new_mask,
        position_ids=positions,
        kept=kept,
        keep=pieces.keep,
        tile_rows=pieces.tile_rows,
        labels=new_labels[0] if new_labels else None,
        loss_weights=None if loss_weights is None else pieces.loss_weights,
        embeds=None if table is None else pieces.embeds,
        max_length=input_ids.shape[1] if padding == "none" else ids.shape[1],
        tokens_per_tile=tokens_per_tile,
        compressed_tokens=compressed_tokens,
        _input=a._replace(labels=None, loss_weights=None, table=None),
        _status=pieces.status,
        _report=pieces.report,
    )
