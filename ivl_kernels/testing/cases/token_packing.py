"""Packing against the shipped loop, and visual rows in place against transformers' `masked_scatter`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional

from ... import ops
from ..catalogue import MODELS
from ..shipped import shipped_packing
from . import Case, Cost, Numbers, Shape, Subject, Timed, scaled
from ._case import Inputs

TOKEN = 7
CONTEXT, TEXT = 151671, 64  # <IMG_CONTEXT> of the released models, and tokens of text in a timed prompt


def prompt(tiles: int, batch: int = 1, device: str = "cpu", token: int = CONTEXT, text: int = TEXT) -> torch.Tensor:
    """[B, text + 256 tiles]: 8 tokens of text, the tiles, the rest of the text."""
    ids = torch.full((batch, text + 256 * tiles), token, device=device)
    ids[:, :8] = ids[:, -(text - 8) :] = 1
    return ids


def masked_scatter(v: Inputs) -> torch.Tensor:
    mask = v["input_ids"] == v.get("token_id", TOKEN)
    count = mask.sum()
    mask = mask.unsqueeze(-1)
    if count * v["embeds"].shape[-1] != v["rows"].numel():
        raise ValueError("counts differ")
    return v["embeds"].masked_scatter(mask, v["rows"])


def rows_cost(v: Inputs) -> tuple[Cost, Cost]:
    """In place: only the visual rows move."""
    least = 2 * v["rows"].nbytes + 8 * v["input_ids"].numel()
    return Cost(least, 0, v["rows"].numel()), Cost(least, 0, v["rows"].numel())


def copied_rows_cost(v: Inputs) -> tuple[Cost, Cost]:
    """Into new embeddings; backward, the gradient of what the rows replaced is zero."""
    moved, ids = v["embeds"].nbytes, 8 * v["input_ids"].numel()
    elements = v["embeds"].numel()
    return Cost(2 * moved + ids, 0, elements), Cost(2 * moved + ids, 0, elements)


def pack_cost(v: Inputs) -> tuple[Cost, Cost]:
    """Ids in; ids, mask, position ids and origin out, a byte a token for what stayed; a row for each tile."""
    ids, tiles = v["input_ids"], v["compress"].numel()
    kept = int(v["kept"]) if "kept" in v else ids.numel()
    least = ids.numel() * (8 + 4 * 8 + 1) + tiles * (1 + 8)
    # Ids that stay are read twice: where the first goes depends on the last, and a batch does not fit on the chip.
    return Cost(least, 0, ids.numel(), least + 8 * kept), Cost(0)


def text_cost(v: Inputs) -> tuple[Cost, Cost]:
    token = v.get("token_id", TOKEN)
    text = int((v["ids"] != token).sum())
    width = v["table"].shape[1]
    return Cost(2 * text * width * v["table"].itemsize + 8 * v["ids"].numel(), 0, text * width), Cost(0)


def _packed(v: Inputs, backend: str, **options: Any) -> tuple[torch.Tensor, ...]:
    packed = ops.pack_tokens(v["input_ids"], v["compress"], **options, backend=backend)
    return tuple(t for t in vars(packed).values() if isinstance(t, torch.Tensor))


def cases(large: bool) -> Iterator[Case]:
    block, small, width = (256, 64, 4096) if large else (8, 2, 24)

    def rows_of_text(n: Numbers) -> Inputs:
        image = [3] + [TOKEN] * (2 * block) + [4]
        rows = [[5] * 9 + image + [6], [5] * 2 + image + image, [5] * 11]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=n.device)
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=n.device)
        return {"input_ids": ids, "compress": n.uniform(6, dtype=torch.float64) < 0.5, "attention_mask": mask}

    def embeddings(n: Numbers) -> Inputs:
        ids = rows_of_text(n)["input_ids"]
        rows = n.normal(int((ids == TOKEN).sum()), width)
        return {"embeds": n.normal(*ids.shape, width), "input_ids": ids, "rows": rows}

    sizes = dict(token_id=TOKEN, tokens_per_tile=block, compressed_tokens=small)
    yield Case(
        "pack_tokens",
        "three rows, left padding",
        rows_of_text,
        lambda v, backend: _packed(v, backend, attention_mask=v["attention_mask"], **sizes),
        cost=pack_cost,
    )
    yield Case(
        "place_rows_",
        f"visual rows of width {width}",
        embeddings,
        lambda v, backend: ops.place_rows(**v, token_id=TOKEN, backend=backend),
        ("embeds", "rows"),
        masked_scatter,
        copied_rows_cost,
    )

    def embed(v: Inputs, backend: str) -> torch.Tensor:
        # Rows of placeholders are not initialised by contract: leave them out.
        return ops.embed_text(v["ids"], v["table"], TOKEN, backend=backend)[v["ids"] != TOKEN]

    yield Case(
        "embed_text",
        f"three rows, width {width}",
        lambda n: {"ids": rows_of_text(n)["input_ids"], "table": n.normal(TOKEN + 1, width)},
        embed,
        plain=lambda v: functional.embedding(v["ids"], v["table"])[v["ids"] != TOKEN],
        cost=text_cost,
    )


def in_place(width: int, tiles: int) -> Case:
    """On a fresh output of the embedding, as the patched model does."""

    def make(n: Numbers) -> Inputs:
        ids = prompt(tiles, device=n.device)
        return {"embeds": n.normal(1, ids.shape[1], width), "input_ids": ids, "rows": n.normal(tiles * 256, width)}

    return Case(
        "place_rows_",
        f"in place, {tiles} tiles",
        make,
        lambda v, backend: ops.place_rows(**v, token_id=CONTEXT, inplace=True, backend=backend),
        plain=lambda v: masked_scatter({**v, "token_id": CONTEXT}),
        cost=rows_cost,
    )


def packing(width: int, tiles: int, batch: int, copying: bool) -> Case:
    """From ids and decisions (every second tile compressed) to packed embeddings and their mask.

    In our model path the projector writes its rows into the packed embeddings, so none are copied: packing alone is
    ids, mask, positions and the rows of the text. With `copying` the features are copied into place as well, from
    the tensors that the shipped loop reads. The shipped code takes one sequence, so it runs once a row.
    """

    def make(n: Numbers) -> Inputs:
        ids = prompt(tiles, batch, n.device)
        return {
            "ids": ids,
            "mask": torch.ones_like(ids),
            "table": n.normal(CONTEXT + 1, width),
            "small": n.normal(batch * tiles, 64, width),
            "full": n.normal(batch * tiles, 256, width),
            "compress": torch.arange(tiles, device=n.device) % 2 == 0,
            "steps": torch.arange(256, device=n.device),
        }

    def shipped(v: Inputs) -> torch.Tensor:
        rows = []
        for b in range(batch):
            one, own = slice(b, b + 1), slice(b * tiles, (b + 1) * tiles)
            embeds = functional.embedding(v["ids"][one], v["table"])
            features = v["small"][own], v["full"][own]
            packed, _ = shipped_packing(embeds, v["ids"][one], v["mask"][one], *features, v["compress"], CONTEXT)
            rows.append(packed)
        return torch.cat(rows) if batch > 1 else rows[0]

    def ours(v: Inputs, backend: str) -> torch.Tensor:
        every = v["compress"].repeat(batch)
        packed = ops.pack_tokens(
            v["ids"], every, CONTEXT, attention_mask=v["mask"], embedding=v["table"], backend=backend
        )
        assert packed.embeds is not None
        if copying:
            rows = packed.embeds.view(-1, width)
            order = every.to(torch.uint8).argsort(stable=True)
            split = len(order) - packed.compressed_tiles
            for features, which in ((v["full"], order[:split]), (v["small"], order[split:])):
                index = (packed.tile_rows[which, None] + v["steps"][: features.shape[1]]).flatten()
                rows.index_copy_(0, index, features[which].flatten(0, 1))
        return packed.embeds

    def cost(v: Inputs) -> tuple[Cost, Cost]:
        compressed = int(v["compress"].sum())
        kept = 64 * compressed + 256 * (tiles - compressed)
        rows = batch * (TEXT + (kept if copying else 0))
        integers = pack_cost({"input_ids": v["ids"], "compress": v["compress"].repeat(batch)})[0]
        return Cost(2 * rows * width * v["table"].itemsize + integers.least, 0, rows * width), Cost(0)

    name = f"packing{' and copying features' if copying else ''}, {tiles} tiles, batch {batch}"
    return Case("pack_tokens", name, make, ours, plain=shipped, cost=cost)


def timed(quick: bool) -> Iterator[Timed]:
    def row(name: str, one: Case, params: dict[str, Any], **options: Any) -> Timed:
        return Timed("token_packing", name, one, torch.float32, params, compile=False, exact=True, **options)

    for model in ("InternVL3.5-1B",) if quick else ("InternVL3.5-1B", "InternVL3.5-8B"):
        width = MODELS[model].hidden
        for tiles in (5,) if quick else (5, 13):
            params = {"model": model, "tiles": tiles}
            yield row(f"rows in place {model} tiles={tiles}", in_place(width, tiles), params)
        for batch in (1,) if quick else (1, 8):
            tiles = 5 if quick else 13
            for copying in (False, True):
                # The rows of the images are not written yet when packing alone is done.
                yield row(
                    f"packing{' and copying features' if copying else ''} {model} tiles={tiles} batch={batch}",
                    packing(width, tiles, batch, copying),
                    {"model": model, "tiles": tiles, "batch": batch, "copying": copying},
                    unchecked=() if copying else ("ours",),
                )


def _place_at(s: Shape) -> Case:
    rows, width = s.tokens * 7 // 8, s.model.hidden

    def make(n: Numbers) -> Inputs:
        ids = torch.full((1, s.tokens), CONTEXT)
        ids[:, rows:] = 1
        return {"embeds": n.normal(1, s.tokens, width), "input_ids": ids, "rows": n.normal(rows, width)}

    def call(v: Inputs, backend: str) -> torch.Tensor:
        values = v | {"embeds": v["embeds"].detach()}
        return ops.place_rows(**values, token_id=CONTEXT, inplace=True, backend=backend)

    def plain(v: Inputs) -> torch.Tensor:
        mask = (v["input_ids"] == CONTEXT).unsqueeze(-1).expand_as(v["embeds"])
        return v["embeds"].masked_scatter(mask, v["rows"])

    return Case("place_rows_", s.name, make, call, ("rows",), plain, rows_cost)


def _embed_at(s: Shape) -> Case:
    def make(n: Numbers) -> Inputs:
        ids = torch.full((1, s.tokens), CONTEXT)
        ids[:, : s.tokens // 2] = torch.arange(s.tokens // 2)
        return {"ids": ids, "table": n.normal(s.tokens, s.model.hidden), "token_id": CONTEXT}

    return Case("embed_text", s.name, make, lambda v, backend: ops.embed_text(**v, backend=backend), cost=text_cost)


def _pack_at(s: Shape) -> Case:
    def make(n: Numbers) -> Inputs:
        text = s.tokens - 256 * s.tiles
        compress = torch.arange(s.batch * s.tiles) % 2 == 0
        kept = s.batch * text + int(torch.where(compress, 64, 256).sum())
        return {"input_ids": prompt(s.tiles, s.batch, text=text), "compress": compress, "kept": kept}

    def call(v: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
        return _packed(v, backend, token_id=CONTEXT, capacity=True)

    return Case("pack_tokens", s.name, make, call, cost=pack_cost)


_A8 = "InternVL3.5-8B"
_SMALL = (scaled(_A8, 64), scaled("InternVL3-1B", 61), scaled("InternVL3.5-GPT-OSS-20B-A4B", 40))
SUBJECTS = {
    "pack_tokens": Subject(
        _pack_at,
        ("cuda",),
        (scaled(_A8, 1600, tiles=6), scaled(_A8, 572, tiles=2, batch=3)),
        (),
        (3392, 12800),
        batch=8,
        dtypes=("bf16",),
    ),
    "place_rows": Subject(_place_at, ("cuda", "triton"), _SMALL, ("hidden",)),
    "embed_text": Subject(_embed_at, ("cuda",), _SMALL, ("hidden",)),
}
