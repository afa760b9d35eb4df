"""Packing alone against the shipped loop, and visual rows in place against transformers' `masked_scatter` path."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

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
def make_packing(width: int, tiles: int, batch: int, copying: bool) -> Work:
    """From ids and decisions (every second tile compressed) to packed embeddings and their mask.

    In our model path the projector writes its rows into the packed embeddings, so none are copied: packing alone is
    ids, mask, positions and the rows of the text. With `copying` the features are copied into place as well, from
    the tensors that the shipped loop reads. The shipped code takes one sequence, so it runs once a row.
    """
    ids = prompt(tiles, batch)
    mask = torch.ones_like(ids)
    table = torch.randn(TOKEN + 1, width, device=device())
    small = torch.randn(batch * tiles, 64, width, device=device())
    full = torch.randn(batch * tiles, 256, width, device=device())
    compress = torch.arange(tiles, device=device()) % 2 == 0
    every = compress.repeat(batch)
    steps = torch.arange(256, device=device())

    def shipped() -> list[torch.Tensor]:
        rows = []
        for b in range(batch):
            one, own = slice(b, b + 1), slice(b * tiles, (b + 1) * tiles)
            embeds = F.embedding(ids[one], table)
            rows.append(shipped_packing(embeds, ids[one], mask[one], small[own], full[own], compress, TOKEN)[0])
        return rows

    def ours(copying: bool = copying) -> torch.Tensor:
        packed = pack_tokens(ids, every, TOKEN, attention_mask=mask, embedding=table)
        embeds = packed.embeds
        if copying:
            rows = embeds.view(-1, width)
            order = every.to(torch.uint8).argsort(stable=True)
            split = len(order) - packed.compressed_tiles
            for features, which in ((full, order[:split]), (small, order[split:])):
                index = (packed.tile_rows[which, None] + steps[: features.shape[1]]).flatten()
                rows.index_copy_(0, index, features[which].flatten(0, 1))
        return embeds

    assert torch.equal(ours(True), torch.cat(shipped()))
    # The rows of the images are not written yet when packing alone is done.
    return Work(
        {"ours": ours, "eager": lambda: torch.cat(shipped()) if batch > 1 else shipped()[0]},
        same_dtype="eager",
        unchecked=() if copying else ("ours",),
    )


@torch.no_grad()
def make_rows(width: int, tiles: int) -> Work:
    """In place, on a fresh output of the embedding, as the patched model does."""
    ids = prompt(tiles)
    embeds = torch.randn(1, ids.shape[1], width, device=device())
    rows = torch.randn(tiles, 256, width, device=device())

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
                lambda width=width, tiles=tiles: make_rows(width, tiles),
                bytes=2 * 256 * tiles * width * 4,
            )
        for batch in (1,) if quick else (1, 8):
            tiles = 5 if quick else 13
            kept = 64 * ((tiles + 1) // 2) + 256 * (tiles // 2)
            for copying in (False, True):
                yield Case(
                    "token_packing",
                    f"packing{' and copying features' if copying else ''} {model} tiles={tiles} batch={batch}",
                    {"model": model, "tiles": tiles, "batch": batch, "copying": copying},
                    lambda width=width, tiles=tiles, batch=batch, copying=copying: make_packing(
                        width, tiles, batch, copying
                    ),
                    bytes=2 * batch * (TEXT + (kept if copying else 0)) * width * 4,
                )
