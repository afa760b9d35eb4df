"""Everything between the vision transformer and the language model, against the shipped Flash path."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from bench.measure import Case, Work, device
from ivl_kernels.flash import FlashParts, LanguageParts, Projector, VisionParts, flash_inputs
from ivl_kernels.nn.router import TileRouter
from ivl_kernels.testing import MODELS, ModelShape
from ivl_kernels.testing.cases.token_packing import CONTEXT, TEXT, prompt
from ivl_kernels.testing.shipped import ShippedFlash

VOCABULARY = CONTEXT + 1


def parts_of_shipped(stage: ShippedFlash) -> FlashParts:
    """The same weights, as a patched model hands them to our path."""
    mlp1, mlp2 = stage.mlp1, stage.mlp2
    router = TileRouter.from_modules(stage.router.pooling_before_gating, stage.router.gating)
    return FlashParts(
        VisionParts(
            tokens_of=lambda pixels: pixels,
            full=Projector(mlp1, 2),
            small=Projector(mlp2, 4),
            router=router,
            relative_threshold=stage.thresholds[0],
            absolute_threshold=stage.thresholds[1],
            tokens=256,
            order="v2",
        ),
        LanguageParts(stage.embedding, causal=lambda **_: None, token_id=CONTEXT, tokens=256),
    )


@torch.no_grad()
def make(shape: ModelShape, tiles: int) -> Work:
    torch.manual_seed(0)
    # A threshold between the two middle scores: half the tiles are compressed, and rounding does not decide.
    stage = ShippedFlash(shape.vision, shape.hidden, VOCABULARY, (0.45, 0.0), CONTEXT).eval().to(device())
    parts = parts_of_shipped(stage)
    # An offset a tile keeps the scores apart, so that rounding does not decide.
    vit = torch.randn(tiles, 1025, shape.vision, device=device()) + torch.randn(tiles, 1, shape.vision, device=device())
    ids = prompt(tiles, device=device())
    mask = torch.ones_like(ids)

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return flash_inputs(parts, ids, vit, attention_mask=mask).embeds

    @torch.no_grad()
    def eager() -> torch.Tensor:
        return stage(vit, ids, mask)[0]

    @torch.no_grad()
    def truth() -> torch.Tensor:
        stage.double()
        wide = stage(vit.double(), ids, mask)[0]
        stage.float()
        return wide

    return Work({"ours": ours, "eager": eager}, truth=truth)


def cases(quick: bool) -> Iterator[Case]:
    for model in ("InternVL3.5-1B",) if quick else ("InternVL3.5-1B", "InternVL3.5-8B"):
        shape = MODELS[model]
        for tiles in (5,) if quick else (5, 13):
            small = (tiles + 1) // 2
            rows = TEXT + 64 * small + 256 * (tiles - small)
            weights = (4 + 4 + 4 * 8) * shape.vision**2  # the router's, then both projectors'
            weights += sum(a * b for r in (2, 4) for a, b in itertools.pairwise(shape.projector(r)))
            full_flops, small_flops = (
                2 * tokens * sum(a * b for a, b in zip(widths, widths[1:]))
                for tokens, widths in ((256, shape.projector(2)), (64, shape.projector(4)))
            )
            yield Case(
                "flash",
                f"{model} tiles={tiles} half compressed",
                {"model": model, "tiles": tiles, "text": TEXT},
                lambda shape=shape, tiles=tiles: make(shape, tiles),
                bytes=4 * (tiles * 1025 * shape.vision + weights + rows * shape.hidden),
                flops=(tiles - small) * full_flops + small * small_flops,
                seconds=30 if shape.hidden > 2000 else 10,
            )
