"""From the output of the vision transformer to the input of the language model, in three steps over plain data.

`route` and `project_into` know the vision side alone, `pack` the language side alone; what they hand to each other are
tensors. `flash_inputs` is the three in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from .._checks import autocast_dtype
from .._library import needs_grad
from ..models.plain import LinearStack, linear_stack, not_plain
from ..nn.router import TileRouter
from .router import probabilities_of
from .tiles import row_of_tile, shuffled


class Projector(NamedTuple):
    """A projector of a model, and how many patches along each side it merges."""

    module: nn.Module
    merge: int


@dataclass(frozen=True)
class VisionParts:
    """What routing and projecting need of a Flash model, read from it for one call.

    Attributes:
        tokens_of: pixel values -> [T, 1 + 4 * tokens, C], the class token still in place.
        full, small: the projectors at 1/4 and 1/16.
        router: the tile router, over the model's own modules.
        relative_threshold, absolute_threshold: of the released decision rule.
        tokens: placeholders a tile.
        order: of the pixel shuffle, "v2" or "v1".
        backend: forced backend of the ops, or "".
        tile: pixels of a tile's side.
    """

    tokens_of: Callable[[torch.Tensor], torch.Tensor]
    full: Projector
    small: Projector
    router: TileRouter
    relative_threshold: float
    absolute_threshold: float
    tokens: int
    order: str
    backend: str = ""
    tile: int = 448


@dataclass(frozen=True)
class LanguageParts:
    """What packing needs of a Flash model, read from it for one call.

    Attributes:
        embedding: the token embedding.
        causal: (inputs_embeds, attention_mask, position_ids, **options) -> output with logits.
        token_id: the placeholder.
        tokens: placeholders a tile.
        backend: forced backend of the ops, or "".
    """

    embedding: nn.Module
    causal: Callable[..., Any]
    token_id: int
    tokens: int
    backend: str = ""


class FlashParts(NamedTuple):
    """Both sides of a Flash model."""

    vision: VisionParts
    language: LanguageParts


@dataclass(frozen=True)
class Decisions:
    """Which tiles are compressed.

    Attributes:
        compress: [T] bool.
        scores: [T] probability that compressing is harmless, or None when the decisions were given.
        router_logits: [T, 2] float32, likewise.
    """

    compress: torch.Tensor
    scores: torch.Tensor | None = None
    router_logits: torch.Tensor | None = None


@dataclass(frozen=True)
class FlashInputs:
    """What goes into the language model.

    Attributes:
        embeds: [B, N', H] embeddings with every tile's rows in place.
        packed: ids, mask, positions, labels and the rest of the packed batch.
        decisions: which tiles are compressed.
    """

    embeds: torch.Tensor
    packed: ops.PackedTokens
    decisions: Decisions

    @property
    def compress(self) -> torch.Tensor:
        return self.decisions.compress


def route(vit: torch.Tensor, parts: VisionParts, *, groups: torch.Tensor | None = None) -> Decisions:
    """Which tiles of `vit` [T, 1 + n, C] are compressed.

    Args:
        groups: [T] the request of each tile (its row in the batch): each is routed as if it were alone. None: all
            tiles belong to one request.

    Differentiable in the router and `vit` through `scores` and `router_logits`.
    """
    probabilities, logits = probabilities_of(parts.router, vit)
    scores = probabilities[:, 0]
    compress = ops.select_tiles(
        scores.detach(),
        relative_threshold=parts.relative_threshold,
        absolute_threshold=parts.absolute_threshold,
        groups=groups,
    )
    return Decisions(compress, scores, logits)


def _table(module: Any) -> torch.Tensor | None:
    """The weight that packing can embed the text with; None: the module must be called, for its gradients or hooks."""
    if not_plain(module, nn.Embedding, "embedding") or module.max_norm is not None:
        return None
    return None if torch.is_grad_enabled() and module.weight.requires_grad else module.weight


def pack(
    input_ids: torch.Tensor,
    compress: torch.Tensor,
    parts: LanguageParts,
    *,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
    padding: str = "left",
    pad_id: int = 0,
) -> ops.PackedTokens:
    """The batch without what compressed tiles drop, its text embedded (`embeds`).

    Args:
        compress: [T] bool, the decisions for the tiles of the batch in order of appearance.
        attention_mask, labels, loss_weights, padding, pad_id: as in `ops.pack_tokens`.

    Raises:
        ValueError: the tiles do not fit the placeholders.

    The rows of placeholders in `embeds` are undefined; tile t belongs to the rows from `tile_rows[t]` on.
    """
    packed = ops.pack_tokens(
        input_ids,
        compress.to(input_ids.device),
        parts.token_id,
        attention_mask=attention_mask,
        labels=labels,
        loss_weights=loss_weights,
        embedding=_table(parts.embedding),
        padding=padding,
        pad_id=pad_id,
        vocabulary=getattr(parts.embedding, "num_embeddings", None),
        tokens_per_tile=parts.tokens,
        compressed_tokens=parts.tokens // 4,
        backend=parts.backend,
    )
    if packed.embeds is None:
        embeds = parts.embedding(packed.ids)
        # Hooks, or the layer itself, may have kept this: without gradients the visual rows are written into it.
        written = not (torch.is_grad_enabled() and embeds.requires_grad)
        packed = replace(packed, embeds=embeds.clone() if written else embeds)
    return packed


def project_into(
    rows: torch.Tensor,
    vit: torch.Tensor,
    compress: torch.Tensor,
    parts: VisionParts,
    *,
    starts: torch.Tensor | None = None,
    compressed: int | None = None,
) -> torch.Tensor:
    """`rows` [M, H] with the features of every tile from its own projector; in place where nothing needs gradients.

    Args:
        rows: packed embeddings of a batch, or a buffer for the features alone.
        vit: [T, 1 + n, C].
        compress: [T] bool.
        starts: [T] the first row of each tile (`PackedTokens.tile_rows`); None: one tile after the other.
        compressed: how many tiles are compressed, where the host knows: saves a read of the device.
    """
    compress = compress.to(vit.device)
    if starts is None:
        lengths = torch.where(compress, parts.tokens // 4, parts.tokens)
        starts = lengths.cumsum(0) - lengths
    compressed = int(compress.sum()) if compressed is None else compressed
    order, starts = compress.to(torch.uint8).argsort(stable=True), starts.to(vit.device)
    kept = len(order) - compressed
    for projector, which in ((parts.full, order[:kept]), (parts.small, order[kept:])):
        if len(which):
            rows = _project(rows, vit, which, starts[which], projector, parts)
    return rows


def _readable(projector: Projector, vit: torch.Tensor) -> LinearStack | None:
    """The layers of a projector, or None: the module must be called."""
    stack = linear_stack(projector.module)
    if isinstance(stack, str):
        return None
    weight = stack.norm.weight
    same = weight.dtype == vit.dtype or autocast_dtype(vit) is not None  # the op does what autocast would
    return stack if same and weight.device == vit.device else None


def _project(
    rows: torch.Tensor,
    vit: torch.Tensor,
    tiles: torch.Tensor,
    starts: torch.Tensor,
    projector: Projector,
    parts: VisionParts,
) -> torch.Tensor:
    differentiable = needs_grad((vit, rows, *projector.module.parameters()))
    stack = _readable(projector, vit)
    if stack is None:
        features = projector.module(shuffled(vit.index_select(0, tiles)[:, 1:], projector.merge, parts.order))
    else:
        fits = rows.dtype == (autocast_dtype(vit) or vit.dtype) and rows.device == vit.device
        target = {"out": rows, "out_rows": starts} if fits and not differentiable else {}
        features = ops.pixel_shuffle_mlp(
            vit,
            stack.norm.weight,
            stack.norm.bias,
            [linear.weight for linear in stack.linears],
            [linear.bias for linear in stack.linears],
            merge=projector.merge,
            skip=1,
            order=parts.order,
            eps=stack.norm.eps,
            tile_indices=tiles,
            backend=parts.backend,
            **target,
        )
        if target:
            return rows
    index = (starts[:, None] + torch.arange(features.shape[1], device=starts.device)).flatten().to(rows.device)
    features = features.flatten(0, 1).to(rows)
    return rows.index_copy(0, index, features) if differentiable else rows.index_copy_(0, index, features)


def flash_inputs(
    parts: FlashParts,
    input_ids: torch.Tensor,
    vit: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    decisions: Decisions | None = None,
    cached_tiles: int = 0,
    **options: Any,
) -> FlashInputs:
    """Routes the tiles (each batch row by itself, as if it were alone), packs, and projects every tile once.

    Args:
        parts: of the model, from `parts_of`.
        input_ids: [B, N].
        vit: [T, 1 + n, C] output of the vision transformer for the tiles of the batch, in order of appearance.
        decisions: None: the router decides.
        cached_tiles: the first that many tiles are in a cache already: `vit` is without them, and what `embeds` holds
            in their rows is undefined. Needs `decisions`.
        attention_mask, **options: as in `pack`.

    Raises:
        ValueError: the tiles do not fit the placeholders; nothing has been written.

    Differentiable in the projectors, the embedding, `vit` and, through the decisions' logits and scores, the router.
    One host read: the packed length.
    """
    vision, language = parts
    if vit.shape[1] - 1 != 4 * vision.tokens:
        raise ValueError(
            f"vit: got {vit.shape[1] - 1} patch tokens a tile, expected {4 * vision.tokens}: {vision.tokens} "
            "placeholders a tile"
        )
    if decisions is None:
        groups = None
        if input_ids.shape[0] > 1:
            groups = row_of_tile(input_ids, attention_mask, language.token_id, language.tokens, len(vit))
            groups = groups.to(vit.device)
        decisions = route(vit, vision, groups=groups)
    packed = pack(input_ids, decisions.compress, language, attention_mask=attention_mask, **options)
    assert packed.embeds is not None
    before = int(decisions.compress[:cached_tiles].sum()) if cached_tiles else 0
    rows = project_into(
        packed.embeds.flatten(0, 1),
        vit,
        decisions.compress[cached_tiles:],
        vision,
        starts=packed.tile_rows[cached_tiles:],
        compressed=packed.compressed_tiles - before,
    )
    return FlashInputs(rows.view(packed.embeds.shape), packed, decisions)
