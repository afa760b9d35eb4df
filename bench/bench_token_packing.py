"""Packing alone against the shipped loop, and visual rows in place against transformers' `masked_scatter` path."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.runner import Case, Work, device
from ivl_kernels.ops import pack_tokens, place_rows
from ivl_kernels.testing import MODELS
from ivl_kernels.testing.shipped import shipped_packing

TOKEN = 151671
TEXT = 64


def prompt(tiles: int, batch: int = 1) -> torch.Tensor:
    ids = torch.full((batch, TEXT + 256 * tiles), TOKEN, device=device())
    ids[:, :8] = ids[:, -(TEXT - 8) :] = 1
    return ids


@torch.no_grad()
def make_packing(width: int, tiles: int, batch: int, dtype: torch.dtype) -> Work:
    """From ids, decisions and both kinds of features to packed embeddings and mask, half the tiles compressed.

    The shipped code takes one sequence, so it runs once a row. Our model path has the projector write its rows in place
    (see bench_flash); here they are copied from the same features that the shipped loop gets.
    """
    ids = prompt(tiles, batch)
    mask = torch.ones_like(ids)
    # The rows of the table the loop reads: ids are 1 and TOKEN, one table row would do for either.
    table = torch.randn(2, width, device=device()).to(dtype)
    small = torch.randn(batch * tiles, 64, width, device=device()).to(dtype)
    full = torch.randn(batch * tiles, 256, width, device=device()).to(dtype)
    compress = (torch.arange(batch * tiles, device=device()) % 2 == 0).view(batch, tiles)
    flat = compress.flatten()
    steps = torch.arange(256, device=device())

    def shipped() -> list[tuple[torch.Tensor, torch.Tensor]]:
        rows = []
        for b in range(batch):
            embeds = torch.nn.functional.embedding((ids[b : b + 1] == TOKEN).long(), table)
            own = slice(b * tiles, (b + 1) * tiles)
            arguments = (ids[b : b + 1], mask[b : b + 1], small[own], full[own], compress[b], TOKEN)
            rows.append(shipped_packing(embeds, *arguments)[0])
        return rows

    def ours() -> list[torch.Tensor]:
        packed = pack_tokens(ids, flat, TOKEN, attention_mask=mask)
        embeds = torch.nn.functional.embedding((packed.ids == TOKEN).long(), table)
        rows = embeds.view(-1, width)
        order = flat.to(torch.uint8).argsort(stable=True)
        split = len(order) - packed.compressed_tiles
        for features, which in ((full, order[:split]), (small, order[split:])):
            index = (packed.tile_rows[which, None] + steps[: features.shape[1]]).flatten()
            rows.index_copy_(0, index, features[which].flatten(0, 1))
        return [embeds[b : b + 1] for b in range(batch)]

    return Work({"ours": ours, "eager": shipped})


def make_ids(tiles: int, batch: int) -> Work:
    """Ids, mask and positions only: what is left of packing when the projector writes into place."""
    ids = prompt(tiles, batch)
    mask = torch.ones_like(ids)
    flat = torch.arange(batch * tiles, device=device()) % 2 == 0
    embeds = torch.zeros(ids.shape[1], 1, device=device())
    features = torch.zeros(tiles, 256, 1, device=device())

    def shipped() -> torch.Tensor:
        rows = []
        for b in range(batch):
            own = flat[b * tiles : (b + 1) * tiles]
            arguments = (mask[b : b + 1], features[:, :64], features, own, TOKEN)
            rows.append(shipped_packing(embeds[None], ids[b : b + 1], *arguments)[1].long())
        return torch.cat(rows)

    return Work({"ours": lambda: pack_tokens(ids, flat, TOKEN, attention_mask=mask).attention_mask, "eager": shipped})


def make_rows(width: int, tiles: int, dtype: torch.dtype) -> Work:
    """In place, on a fresh output of the embedding, as the patched model does."""
    ids = prompt(tiles)
    embeds = torch.randn(1, ids.shape[1], width, device=device()).to(dtype)
    rows = torch.randn(tiles, 256, width, device=device()).to(dtype)

    def masked_scatter() -> torch.Tensor:
        mask = ids == TOKEN
        count = mask.sum()
        mask = mask.unsqueeze(-1)
        if count * embeds.shape[-1] != rows.numel():
            raise ValueError("counts differ")
        return embeds.masked_scatter(mask, rows)

    return Work({"ours": lambda: place_rows(embeds, ids, rows, TOKEN, inplace=True), "eager": masked_scatter})


def cases(quick: bool) -> Iterator[Case]:
    for model in ("InternVL3.5-1B",) if quick else ("InternVL3.5-1B", "InternVL3.5-8B"):
        width = MODELS[model].hidden
        for tiles in (5,) if quick else (5, 13):
            yield Case(
                "token_packing",
                f"rows in place {model} tiles={tiles}",
                {"model": model, "tiles": tiles},
                lambda width=width, tiles=tiles: make_rows(width, tiles, torch.float32),
                bytes=2 * 256 * tiles * width * 4,
            )
        for batch in (1,) if quick else (1, 8):
            tiles = 5 if quick else 13
            kept = TEXT + 64 * ((tiles + 1) // 2) + 256 * (tiles // 2)
            yield Case(
                "token_packing",
                f"packing with rows {model} tiles={tiles} batch={batch}",
                {"model": model, "tiles": tiles, "batch": batch},
                lambda width=width, tiles=tiles, batch=batch: make_packing(width, tiles, batch, torch.float32),
                bytes=2 * batch * kept * width * 4,
            )
    for batch in (1,) if quick else (1, 8):
        yield Case(
            "token_packing",
            f"packing, ids only tiles=13 batch={batch}",
            {"tiles": 13, "batch": batch},
            lambda batch=batch: make_ids(13, batch),
            bytes=batch * (TEXT + 256 * 13) * 8 * 3,
        )
