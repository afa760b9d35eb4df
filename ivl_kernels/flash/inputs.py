"""From the output of the vision transformer to the input of the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..models.plain import not_plain
from ..nn.router import TileRouter
from .tiles import row_of_tile, shuffled


class Projector(NamedTuple):
    """A projector of a model: the module, and the layers of it whose parameters the kernel reads."""

    module: nn.Module
    norm: nn.Module
    linears: tuple[nn.Module, ...]
    merge: int

    def problem(self) -> str:
        """Why the module must be called instead of reading its parameters, or ""."""
        for layer in self.module.modules():
            if isinstance(layer, nn.Dropout) and layer.training and layer.p > 0:
                return "its dropout is live"
        problems = [not_plain(self.norm, nn.LayerNorm, "norm")]
        problems += [not_plain(linear, nn.Linear, "linear") for linear in self.linears]
        return "; ".join(problem for problem in problems if problem)


@dataclass(frozen=True)
class FlashParts:
    """What routing and packing need of a Flash model, read from it for one call.

    Attributes:
        vision: pixel values -> [T, 1 + N, C], the class token still in place.
        embedding: the token embedding.
        full, small: the projectors at 1/4 and 1/16.
        router: the tile router, over the model's own modules.
        relative_threshold, absolute_threshold: of the released decision rule.
        token_id: the placeholder.
        tokens: placeholders a tile.
        order: of the pixel shuffle, "v2" or "v1".
        language: (inputs_embeds, attention_mask, position_ids, **options) -> output of the language model.
        backend: forced backend of the ops, or "".
        tile: pixels of a tile's side.
    """

    vision: Callable[[torch.Tensor], torch.Tensor]
    embedding: nn.Module
    full: Projector
    small: Projector
    router: TileRouter
    relative_threshold: float
    absolute_threshold: float
    token_id: int
    tokens: int
    order: str
    language: Callable[..., Any]
    backend: str = ""
    tile: int = 448


@dataclass(frozen=True)
class FlashInputs:
    """What goes into the language model.

    Attributes:
        embeds: [B, N', H] embeddings with every tile's rows in place.
        packed: ids, mask, positions, labels and the rest of the packed batch.
        compress: [T] bool decisions.
        scores: [T] probability that compressing is harmless, or None when the decisions were given.
        router_logits: [T, 2] float32, likewise.
    """

    embeds: torch.Tensor
    packed: ops.PackedTokens
    compress: torch.Tensor
    scores: torch.Tensor | None = None
    router_logits: torch.Tensor | None = None


def _table(parts: FlashParts) -> torch.Tensor | None:
    """The weight that packing can embed the text with; None: the module must be called, for its gradients or hooks."""
    module: Any = parts.embedding
    if not_plain(module, nn.Embedding, "embedding") or module.max_norm is not None:
        return None
    return None if torch.is_grad_enabled() and module.weight.requires_grad else module.weight


def _project(
    parts: FlashParts,
    projector: Projector,
    vit: torch.Tensor,
    tiles: torch.Tensor,
    rows: torch.Tensor,
    embeds: torch.Tensor,
) -> torch.Tensor:
    """`embeds` [M, H] with the features of `tiles` in the rows that start at `rows`; in place without gradients."""
    if tiles.shape[0] == 0:
        return embeds
    trained = (vit, embeds, *projector.module.parameters())
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    if projector.problem():
        patches = shuffled(vit.index_select(0, tiles)[:, 1:], projector.merge, parts.order)
        features = projector.module(patches)
    else:
        target = {} if differentiable else {"out": embeds, "out_rows": rows}
        features = ops.pixel_shuffle_mlp(
            vit,
            projector.norm.weight,
            projector.norm.bias,
            [linear.weight for linear in projector.linears],
            [linear.bias for linear in projector.linears],
            merge=projector.merge,
            skip=1,
            order=parts.order,
            eps=projector.norm.eps,
            tile_indices=tiles,
            backend=parts.backend,
            **target,
        )
        if target:
            return embeds
    index = (rows[:, None] + torch.arange(features.shape[1], device=rows.device)).flatten()
    features = features.flatten(0, 1)
    return embeds.index_copy(0, index, features) if differentiable else embeds.index_copy_(0, index, features)


def flash_inputs(
    parts: FlashParts,
    input_ids: torch.Tensor,
    vit: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
    compress: torch.Tensor | None = None,
    cached_tiles: int = 0,
    padding: str = "left",
    pad_id: int = 0,
) -> FlashInputs:
    """From the output of the vision transformer to the input of the language model.

    Routes the tiles (each batch row by itself, as if it were alone), packs the sequence, embeds what stays and lets
    each projector write the rows of its tiles into that buffer. One host read: the packed length.

    Args:
        parts: of the model, from `parts_of`.
        input_ids: [B, N].
        vit: [T, 1 + n, C] output of the vision transformer for the tiles of the batch, in order of appearance.
        attention_mask, labels, loss_weights, padding, pad_id: as in `ops.pack_tokens`.
        compress: [T] bool decisions; None: the router decides.
        cached_tiles: the first that many tiles are in a cache already: `vit` is without them, and what `embeds` holds
            in their rows is undefined. Needs `compress`.

    Raises:
        ValueError: the tiles do not fit the placeholders; nothing has been written.

    Differentiable in the projectors, the embedding, `vit` and, through `router_logits` and `scores`, the router.
    """
    scores = logits = None
    tokens, tiles = parts.tokens, vit.shape[0]
    if vit.shape[1] - 1 != 4 * tokens:
        raise ValueError(
            f"vit: got {vit.shape[1] - 1} patch tokens a tile, expected {4 * tokens}: {tokens} placeholders a tile"
        )
    if compress is None:
        probabilities, logits = parts.router(vit, skip=1, return_logits=True)
        scores = probabilities[:, 0]
        several = input_ids.shape[0] > 1
        compress = ops.select_tiles(
            scores.detach(),
            relative_threshold=parts.relative_threshold,
            absolute_threshold=parts.absolute_threshold,
            groups=row_of_tile(input_ids, attention_mask, parts.token_id, tokens, tiles) if several else None,
        )
    table = _table(parts)
    packed = ops.pack_tokens(
        input_ids,
        compress,
        parts.token_id,
        attention_mask=attention_mask,
        labels=labels,
        loss_weights=loss_weights,
        embedding=table,
        padding=padding,
        pad_id=pad_id,
        vocabulary=getattr(parts.embedding, "num_embeddings", None),
        tokens_per_tile=tokens,
        compressed_tokens=tokens // 4,
        backend=parts.backend,
    )
    embeds = packed.embeds
    if embeds is None:
        embeds = parts.embedding(packed.ids)
        # Hooks may have kept the output, and without gradients it is written to.
        embeds = embeds if embeds.requires_grad else embeds.clone()
    flat = embeds.flatten(0, 1)
    order, rows = compress[cached_tiles:].to(torch.uint8).argsort(stable=True), packed.tile_rows[cached_tiles:]
    small = packed.compressed_tiles - (int(compress[:cached_tiles].sum()) if cached_tiles else 0)
    for projector, which in ((parts.full, order[: tiles - small]), (parts.small, order[tiles - small :])):
        flat = _project(parts, projector, vit, which, rows[which], flat)
    return FlashInputs(flat.view(embeds.shape), packed, compress, scores, logits)
