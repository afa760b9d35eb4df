"""InternVL3.5-Flash: route the tiles, project each one once at its ratio, pack what is left of the sequence."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..imaging import choose_grid
from .router import TileRouter

__all__ = ["FlashInputs", "FlashParts", "FlashVision", "ImageRouting", "Routing", "ViCO", "flash_inputs", "parts_of"]

MERGES = (2, 4)  # of the full and of the compressed projector


@dataclass(frozen=True)
class ImageRouting:
    """How the tiles of one image were routed.

    Attributes:
        grid: rows and columns of tiles, without the thumbnail; None when there are several and the sizes of the
            photographs were not given: the model only sees how many there are.
        thumbnail: the last tile is the thumbnail of the whole image, as the InternVL tiling makes it.
        scores: of each tile, the probability that compressing it is harmless; empty when the decision was given.
        compressed: whether each tile got 64 tokens instead of 256.
    """

    grid: tuple[int, int] | None
    thumbnail: bool
    scores: list[float]
    compressed: list[bool]


class Routing:
    """The decisions of one call, image by image. Nothing is read from the device before `images` is asked for."""

    def __init__(
        self, images: list[ImageRouting] | None = None, *, later: Callable[[], Any] | None = None, tile: int = 448
    ) -> None:
        self._images, self._later, self._tile = images or [], later, tile

    @property
    def images(self) -> list[ImageRouting]:
        if self._later is not None:
            self._images, self._later = self._later(), None
        return self._images

    @classmethod
    def of(cls, inputs: FlashInputs, input_ids: torch.Tensor, mask: torch.Tensor | None, parts: FlashParts) -> Routing:
        token_id, tokens, compress, scores = parts.token_id, parts.tokens, inputs.compress, inputs.scores

        def images() -> list[ImageRouting]:
            owners = image_of_tile(input_ids, mask, token_id, tokens).tolist()
            made: list[ImageRouting] = []
            values: list[float] = [] if scores is None else scores.tolist()
            for tile, (owner, small) in enumerate(zip(owners, compress.tolist())):
                if tile == 0 or owner != owners[tile - 1]:
                    many = owners.count(owner) > 1
                    made.append(ImageRouting(None if many else (1, 1), many, [], []))
                made[-1].compressed.append(small)
                if values:
                    made[-1].scores.append(values[tile])
            return made

        return cls(later=images, tile=parts.tile)

    def with_grids(self, image_sizes: Sequence[tuple[int, int]]) -> Routing:
        """The same decisions with every image's grid; see `PatchHandle.last_routing`."""
        if len(image_sizes) != len(self.images):
            raise ValueError(f"image_sizes: got {len(image_sizes)}, expected {len(self.images)}: one an image")
        made = []
        for i, (image, (height, width)) in enumerate(zip(self.images, image_sizes)):
            tiles = len(image.compressed)
            # A grid of `limit` tiles that the rule chooses under a larger limit is its choice under this one too.
            limit = tiles - image.thumbnail
            columns, rows = choose_grid(width, height, max_tiles=limit, tile=self._tile)
            count = columns * rows
            if count + (count > 1) != tiles:
                raise ValueError(
                    f"image_sizes: image {i} has {tiles} tiles, which height {height}, width {width} does not give: of "
                    f"up to {limit} tiles besides the thumbnail the rule chooses {rows} rows x {columns} columns"
                )
            made.append(replace(image, grid=(rows, columns)))
        return Routing(made, tile=self._tile)

    def __repr__(self) -> str:
        return f"Routing(images={self.images})"

    def __str__(self) -> str:
        tiles = sum(len(image.compressed) for image in self.images)
        return f"{sum(sum(image.compressed) for image in self.images)} of {tiles} tiles compressed"


class Projector(NamedTuple):
    """A projector of a model: the module, and the layers of it whose parameters the kernel reads."""

    module: nn.Module
    norm: nn.Module
    linears: tuple[nn.Module, ...]
    merge: int

    def problem(self) -> str:
        """Why the module must be called instead of reading its parameters, or ""."""
        from ..integrations._patch import not_plain

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


def _visual(input_ids: torch.Tensor, mask: torch.Tensor | None, token_id: int) -> torch.Tensor:
    visual = input_ids == token_id
    return visual if mask is None else visual & (mask != 0)


def row_of_tile(
    input_ids: torch.Tensor, mask: torch.Tensor | None, token_id: int, tokens: int, tiles: int
) -> torch.Tensor:
    """[T] the batch row of each tile, without reading from the device."""
    ends = (_visual(input_ids, mask, token_id).sum(1) // tokens).cumsum(0)
    which = torch.searchsorted(ends, torch.arange(tiles, device=ends.device), right=True)
    return which.clamp(max=max(0, len(ends) - 1))


def image_of_tile(input_ids: torch.Tensor, mask: torch.Tensor | None, token_id: int, tokens: int) -> torch.Tensor:
    """[T] the image (run of placeholders) of each tile, counted over the batch. Reads from the device."""
    visual = _visual(input_ids, mask, token_id)
    before = torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], 1)
    run = (visual & ~before).flatten().cumsum(0) - 1
    return run[visual.flatten()][::tokens]


def shuffled(vit: torch.Tensor, merge: int, order: str) -> torch.Tensor:
    """[T, n, C] patch tokens of a square grid -> [T, n / merge ** 2, merge ** 2 * C]"""
    tiles, count, width = vit.shape
    side = int(count**0.5)
    x = vit.reshape(tiles, side // merge, merge, side // merge, merge, width)
    x = x.permute(0, 1, 3, 2, 4, 5) if order == "v2" else x.permute(0, 3, 1, 2, 4, 5)
    return x.reshape(tiles, count // merge**2, merge**2 * width)


def _table(parts: FlashParts) -> torch.Tensor | None:
    """The weight that packing can embed the text with; None: the module must be called, for its gradients or hooks."""
    from ..integrations._patch import not_plain

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


def _sequential(module: nn.Module, merge: int, norm: int, *linears: int) -> Projector:
    assert isinstance(module, nn.Sequential)
    return Projector(module, module[norm], tuple(module[i] for i in linears), merge)


def is_chat_model(model: nn.Module) -> bool:
    """The remote code of a Flash checkpoint, by class name and structure."""
    named = any(base.__name__ == "InternVLChatModel" for base in type(model).__mro__)
    needed = ("vision_model", "language_model", "mlp1", "mlp2", "pooling_before_gating", "gating")
    return named and all(isinstance(getattr(model, name, None), nn.Module) for name in needed)


def is_native_model(model: nn.Module) -> bool:
    """A transformers-native model with a `FlashVision` attached."""
    named = any(base.__name__ == "InternVLForConditionalGeneration" for base in type(model).__mro__)
    return named and isinstance(getattr(model, "flash", None), FlashVision)


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def parts_of(model: nn.Module, backend: str = "", folded: bool = True) -> FlashParts:
    """The parts of a Flash model of either family, with the thresholds and ids it has now.

    Args:
        backend: force a backend of the ops.
        folded: False: the router computes as shipped, in plain torch whatever `backend` is.

    Raises:
        TypeError: neither an `InternVLChatModel` with Flash modules nor an `InternVLForConditionalGeneration` with a
            `FlashVision` attached.
        AttributeError: the model has no thresholds.
    """
    m: Any = model
    router = functools.partial(TileRouter.from_modules, folded=folded, backend=backend if folded else "")
    if is_chat_model(model):
        return FlashParts(
            vision=lambda pixels: (
                m.vision_model(pixel_values=pixels, output_hidden_states=False, return_dict=True).last_hidden_state
            ),
            embedding=m.language_model.get_input_embeddings(),
            full=_sequential(m.mlp1, 2, 0, 1, 3),
            small=_sequential(m.mlp2, 4, 0, 1, 4, 7),
            router=router(m.pooling_before_gating, m.gating),
            relative_threshold=m.flash_relative_threshold,
            absolute_threshold=m.flash_absolute_threshold,
            token_id=m.img_context_token_id,
            tokens=256,
            order=m.ps_version,
            language=m.language_model,
            backend=backend,
            tile=_side(getattr(m.config, "force_image_size", None) or m.config.vision_config.image_size),
        )
    if is_native_model(model):
        projector, config = m.model.multi_modal_projector, m.config
        return FlashParts(
            vision=lambda pixels: m.model.vision_tower(pixel_values=pixels.to(m.dtype)).last_hidden_state,
            embedding=m.get_input_embeddings(),
            full=Projector(projector, projector.layer_norm, (projector.linear_1, projector.linear_2), 2),
            small=_sequential(m.flash.mlp2, 4, 0, 1, 4, 7),
            router=router(m.flash.pooling_before_gating, m.flash.gating),
            relative_threshold=config.flash_relative_threshold,
            absolute_threshold=config.flash_absolute_threshold,
            token_id=config.image_token_id,
            tokens=config.image_seq_length,
            order="v2",
            language=m,
            backend=backend,
            tile=_side(config.vision_config.image_size),
        )
    raise TypeError(
        f"model: got {type(model).__name__}, expected an InternVLChatModel with Flash modules, or an "
        "InternVLForConditionalGeneration with a FlashVision attached"
    )


_GROUPS = ("mlp2", "pooling_before_gating", "gating")
_KEY = re.compile(rf"^(?:model\.)?(?:flash\.)?((?:{'|'.join(_GROUPS)})\..*)$")


def _renamed() -> dict[str, tuple[str, ...]]:
    blocks, attentions = (
        [f"{kind}{i}" for i in range(1, 5)] for kind in ("gating.block", "pooling_before_gating.attn")
    )
    table: dict[str, tuple[str, ...]] = {}
    for leaf in ("weight", "bias"):
        for layer, name in ((0, "norm"), (1, "dense1"), (4, "dense2"), (7, "dense3")):
            table[f"mlp2.{layer}.{leaf}"] = (f"mlp2.{name}.{leaf}",)
        for block in blocks:
            for layer, name in ((0, "dense_in"), (3, "dense_out"), (5, "norm")):
                table[f"{block}.{layer}.{leaf}"] = (f"{block}.{name}.{leaf}",)
        for layer, name in ((0, "gate_norm"), (1, "gate_proj")):
            table[f"gating.gate.{layer}.{leaf}"] = (f"gating.{name}.{leaf}",)
        for attention in attentions:
            table[f"{attention}.in_proj_{leaf}"] = tuple(
                f"{attention}.{name}.{leaf}" for name in ("query", "key", "value")
            )
    return table


# Released name: the names in the layout of transformers' pull request 42166; several are laid end to end in this order.
_RENAMED = _renamed()


class FlashVision(nn.Module):
    """The modules that Flash adds to an InternVL model, for transformers-native ones, which have no Flash of their own.

    Its parameters have the names of the released checkpoints: `mlp2.*`, `pooling_before_gating.*`, `gating.*`.

    Args:
        vision_width: hidden size C of the vision transformer.
        hidden: hidden size H of the language model.
        relative_threshold, absolute_threshold: of the decision rule; from the checkpoint's config.json. No defaults.
        heads: of the router's attentions.
        dropout: of `mlp2` and `gating` in train mode.
        device, dtype: of the parameters.

    Example:
        flash = FlashVision.from_pretrained("InternVL3_5-1B-Flash", dtype=model.dtype)
        flash.attach(model)
        handle = ivl_kernels.patch(model)
    """

    def __init__(
        self,
        vision_width: int,
        hidden: int,
        relative_threshold: float,
        absolute_threshold: float,
        *,
        heads: int = 16,
        dropout: float = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide, inner = vision_width * 16, 2 * hidden
        self.mlp2 = nn.Sequential(
            nn.LayerNorm(wide, **factory),
            nn.Linear(wide, inner, **factory),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(inner, inner, **factory),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(inner, hidden, **factory),
        )
        router = TileRouter(vision_width, heads, dropout, **factory)
        self.pooling_before_gating, self.gating = router.pooling_before_gating, router.gating
        self.relative_threshold, self.absolute_threshold = float(relative_threshold), float(absolute_threshold)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        relative_threshold: float | None = None,
        absolute_threshold: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> FlashVision:
        """Read the Flash modules out of a checkpoint folder (safetensors, in one file or sharded with an index).

        Takes a released Flash checkpoint (`mlp2.*`, ...), a native model saved with its `FlashVision` attached
        (`flash.mlp2.*` or `model.flash.mlp2.*`, ...), and either under the names of transformers' pull request 42166
        (`model.mlp2.dense1.*`, attentions as query, key and value). Only the tensors needed are read.

        Args:
            folder: the checkpoint.
            relative_threshold, absolute_threshold: instead of those of config.json.
            device, dtype: of the result; dtype None: as stored.

        Raises:
            ValueError: there are no thresholds, a tensor is missing, extra or of another shape, or the checkpoint's
                pixel shuffle is not the one native models compute. Nothing is guessed.
        """
        folder = os.fspath(folder)
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        thresholds = []
        for name, given in (("relative", relative_threshold), ("absolute", absolute_threshold)):
            value = given if given is not None else config.get(f"flash_{name}_threshold")
            if value is None:
                raise ValueError(
                    f"{name}_threshold: {folder}/config.json has no flash_{name}_threshold, and nothing is assumed: "
                    "pass it"
                )
            thresholds.append(value)
        if config.get("ps_version", "v2") != "v2":
            raise ValueError(
                f"ps_version: {folder}/config.json has {config['ps_version']!r}, native models compute 'v2'"
            )
        tensors = _read_tensors(folder)
        if not tensors:
            raise ValueError(f"folder: {folder} holds no Flash modules ({', '.join(g + '.*' for g in _GROUPS)})")
        names = cls(16, 1, *thresholds, device="meta").state_dict()
        layouts = [{name: table.get(name, (name,)) for name in names} for table in ({}, _RENAMED)]
        absent = [[part for parts in layout.values() for part in parts if part not in tensors] for layout in layouts]
        layout, missing = min(zip(layouts, absent), key=lambda both: len(both[1]))
        known = {part for parts in layout.values() for part in parts}
        problems = [f"{name} is missing" for name in missing]
        problems += [f"{name} is not expected" for name in tensors if name not in known]
        if not missing:
            last, gate = (tensors[layout[name][0]] for name in ("mlp2.7.weight", "gating.gate.1.weight"))
            dtype = dtype or last.dtype
            self = cls(gate.shape[1], last.shape[0], *thresholds, device="meta", dtype=dtype)
            for name, whole in self.state_dict().items():
                parts = layout[name]
                problems += [
                    f"{part} is {list(tensors[part].shape)}, expected {list(expected.shape)}"
                    for part, expected in zip(parts, whole.chunk(len(parts)))
                    if tensors[part].shape != expected.shape
                ]
        if problems:
            raise ValueError(f"folder: {folder} does not fit: {'; '.join(problems[:5])} ({len(problems)} in all)")
        values = {
            name: tensors[parts[0]] if len(parts) == 1 else torch.cat([tensors[part] for part in parts])
            for name, parts in layout.items()
        }
        self.load_state_dict({n: t.to(device=device, dtype=dtype) for n, t in values.items()}, assign=True)
        return self

    def attach(self, model: nn.Module) -> None:
        """Make this the model's submodule `flash`, so that it moves, saves and trains with it.

        Sets `flash_mode` and the thresholds in the model's config. The model behaves as before until it is patched.

        Raises:
            TypeError: not a transformers-native `InternVLForConditionalGeneration`.
            ValueError: the widths do not fit the model.
        """
        m: Any = model
        if not any(base.__name__ == "InternVLForConditionalGeneration" for base in type(model).__mro__):
            raise TypeError(f"model: got {type(model).__name__}, expected InternVLForConditionalGeneration")
        config = m.config
        wanted = (config.vision_config.hidden_size * 16, config.text_config.hidden_size)
        got = (self.mlp2[0].normalized_shape[0], self.mlp2[7].out_features)
        if got != wanted:
            raise ValueError(
                f"model: its mlp2 would take {wanted[0]} and give {wanted[1]}, this one {got[0]} and {got[1]}"
            )
        m.flash = self.train(m.training)
        config.flash_mode = True
        config.flash_relative_threshold = self.relative_threshold
        config.flash_absolute_threshold = self.absolute_threshold


def _read_tensors(folder: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    index = os.path.join(folder, "model.safetensors.index.json")
    single = os.path.join(folder, "model.safetensors")
    files: Mapping[str, list[str]] = {}
    if os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            located = json.load(file)["weight_map"]
        files = {name: [k for k, v in located.items() if v == name] for name in dict.fromkeys(located.values())}
    elif os.path.exists(single):
        with safe_open(single, "pt") as opened:
            files = {"model.safetensors": list(opened.keys())}
    else:
        raise ValueError(f"folder: {folder} has neither model.safetensors nor model.safetensors.index.json")
    tensors = {}
    for name, keys in files.items():
        wanted = [(key, match[1]) for key in keys if (match := _KEY.match(key))]
        if wanted:
            with safe_open(os.path.join(folder, name), "pt") as opened:
                tensors.update({short: opened.get_tensor(key) for key, short in wanted})
    return tensors


@dataclass(frozen=True)
class ViCOOutput:
    """One forward pass of ViCO training.

    Attributes:
        outputs: of the language model, over the packed sequence (`logits` [B, N', V], `loss` when labels were given).
        inputs: what went into it; `inputs.packed.labels` and `.loss_weights` fit the logits.
        router_logits: [T, 2] (column 0: compressing is harmless), differentiable in stage 2; None in stage 1.
    """

    outputs: Any
    inputs: FlashInputs
    router_logits: torch.Tensor | None


class ViCO:
    """The forward passes of ViCO, the two-stage training of Flash models; the losses are the caller's.

    Stage 1 (consistency): every image gets one ratio, 1/4 or 1/16 with equal odds, for all its tiles; gradients reach
    both projectors and whatever else requires them. Stage 2 (router): everything but the router is frozen, its logits
    come with gradients, and the language model runs without them, at the decisions given as `compress`.

    Args:
        model: a Flash model of either family; see `parts_of`.
        stage: 1 or 2.
        generator: of the sampled ratios, on the CPU; None: torch's default.
        backend: force a backend of the ops.

    Source: InternVL3.5 report, section 2.3. No training code was released; this is our reading of it.
    """

    def __init__(
        self, model: nn.Module, stage: int, *, generator: torch.Generator | None = None, backend: str = ""
    ) -> None:
        if stage not in (1, 2):
            raise ValueError(f"stage: got {stage}, expected 1 or 2")
        self.model, self.stage, self.generator, self.backend = model, stage, generator, backend
        self._required: dict[str, bool] = {}
        if stage == 2:
            parts = parts_of(model, backend)
            self._required = {name: p.requires_grad for name, p in model.named_parameters()}
            model.requires_grad_(False)
            parts.router.requires_grad_(True)

    def restore(self) -> None:
        """Make the parameters that stage 2 froze require gradients as before."""
        for name, parameter in self.model.named_parameters():
            if name in self._required:
                parameter.requires_grad_(self._required[name])

    def sample(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[T] bool: a ratio for each image of the batch, the same for all its tiles."""
        parts = parts_of(self.model, self.backend)
        owner = image_of_tile(input_ids, attention_mask, parts.token_id, parts.tokens)
        images = int(owner[-1]) + 1 if len(owner) else 0
        return (torch.rand(images, generator=self.generator) < 0.5).to(owner.device)[owner]

    def __call__(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        compress: torch.Tensor | None = None,
        **options: Any,
    ) -> ViCOOutput:
        """One pass; `compress` [T] bool overrides the sampled (stage 1) or the routed (stage 2) decisions."""
        parts = parts_of(self.model, self.backend)
        carried: dict[str, Any] = {
            "attention_mask": attention_mask,
            "labels": labels,
            "loss_weights": loss_weights,
            "padding": "right",
        }
        logits = None
        with torch.set_grad_enabled(self.stage == 1 and torch.is_grad_enabled()):
            vit = parts.vision(pixel_values)
        if self.stage == 1:
            compress = self.sample(input_ids, attention_mask) if compress is None else compress
        else:
            probabilities, logits = parts.router(vit, skip=1, return_logits=True)
            if compress is None:
                compress = ops.select_tiles(
                    probabilities[:, 0].detach(),
                    relative_threshold=parts.relative_threshold,
                    absolute_threshold=parts.absolute_threshold,
                    groups=row_of_tile(input_ids, attention_mask, parts.token_id, parts.tokens, len(vit)),
                )
        with torch.set_grad_enabled(self.stage == 1 and torch.is_grad_enabled()):
            inputs = flash_inputs(parts, input_ids, vit, compress=compress, **carried)
            packed = inputs.packed
            outputs = parts.language(
                inputs_embeds=inputs.embeds,
                attention_mask=packed.attention_mask,
                position_ids=packed.position_ids,
                labels=packed.labels,
                **options,
            )
        return ViCOOutput(outputs, inputs, logits)
