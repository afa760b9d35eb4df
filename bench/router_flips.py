"""How often folding the router's attentions changes a decision: folded against shipped arithmetic, by dtype.

    python -m bench.router_flips [--photos FOLDER] [--tiles 96] [--photo-tiles 48] [--only random | photos]

The router has random weights; its gate is scaled so that the scores of the tiles spread (standard deviation of the
logit difference 2, as a trained gate's must to be of use) or are crowded (0.1). Tiles are random tokens, or photographs
cut into 448 x 448 tiles and passed through a vision transformer with random weights.
Prints a Markdown table: decisions that differ from float64, for the shipped and for the folded arithmetic, and from
the shipped ones, for the folded and the unfolded arithmetic (`folded=False`).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch

from ivl_kernels.nn import TileRouter
from ivl_kernels.ops import select_tiles
from ivl_kernels.testing.shipped import ShippedRouter, shipped_decision

WIDTH = 1024
RELATIVE, ABSOLUTE = 0.5, 0.5


def photographs(folder: Path | None) -> list[torch.Tensor]:
    """The images of a folder as [3, H, W] in 0..1; without one, matplotlib's sample photograph."""
    from PIL import Image

    if folder is None:
        from matplotlib import get_data_path

        folder = Path(get_data_path()) / "sample_data"
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg"))
    found = [torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1) / 255 for p in paths]
    return [image for image in found if min(image.shape[1:]) >= 160]


def photo_tokens(images: list[torch.Tensor], count: int, layers: int, seed: int = 0) -> torch.Tensor:
    """[count, 1025, 1024] outputs of a random vision transformer for 448 x 448 crops of the photographs."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    generator = torch.Generator().manual_seed(seed)
    config = InternVLVisionConfig(hidden_size=WIDTH, num_hidden_layers=layers, attn_implementation="sdpa")
    model = InternVLVisionModel(config).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    out = []
    with torch.no_grad():
        for i in range(count):
            image = images[i % len(images)]
            side = int(torch.randint(160, min(image.shape[1:]) + 1, (), generator=generator))
            top = int(torch.randint(0, image.shape[1] - side + 1, (), generator=generator))
            left = int(torch.randint(0, image.shape[2] - side + 1, (), generator=generator))
            crop = image[None, :, top : top + side, left : left + side].float()
            tile = torch.nn.functional.interpolate(crop, (448, 448), mode="bilinear", antialias=True)
            tile = (tile - mean[:, None, None]) / std[:, None, None]
            out.append(model(tile).last_hidden_state)
    return torch.cat(out)


def exact_scores(router: ShippedRouter, vit: torch.Tensor) -> torch.Tensor:
    """[T, 2] gate probabilities in float64, where folding changes nothing."""
    exact = copy.deepcopy(router).double()
    truth = TileRouter.from_modules(exact.pooling_before_gating, exact.gating)
    return torch.cat([truth(part.double(), skip=1) for part in vit.split(8)])


def calibrate(router: ShippedRouter, vit: torch.Tensor, spread: float) -> None:
    """Scale and shift the gate so that the logit differences of these tiles have mean 0 and this deviation."""
    gate = router.gating.gate[1]
    gate.weight[1].zero_()
    gate.bias.zero_()
    p = exact_scores(router, vit)
    difference = (p[:, 0] / p[:, 1]).log()
    gain = spread / difference.std()
    gate.weight.mul_(gain)
    gate.bias[0] = -(difference * gain).mean()


def flips(router: ShippedRouter, vit: torch.Tensor, dtype: torch.dtype) -> list[int]:
    """How many decisions, over calls of 8 tiles, differ between the arithmetics; in the order of the table."""
    router, vit = copy.deepcopy(router).to(dtype), vit.to(dtype)
    ways = {
        "shipped": router,
        "folded": TileRouter.from_modules(router.pooling_before_gating, router.gating),
        "unfolded": TileRouter.from_modules(router.pooling_before_gating, router.gating, folded=False),
    }
    scores = {name: torch.cat([way(part, skip=1) for part in vit.split(8)]) for name, way in ways.items()}
    scores["exact"] = exact_scores(router, vit)
    decided = {}
    for name, p in scores.items():
        if name == "shipped":
            chosen = [shipped_decision(part, RELATIVE, ABSOLUTE) for part in p.split(8)]
        else:
            limits = {"relative_threshold": RELATIVE, "absolute_threshold": ABSOLUTE}
            chosen = [select_tiles(part[:, 0], **limits) for part in p.split(8)]
        decided[name] = torch.cat(chosen)
    pairs = (("shipped", "exact"), ("folded", "exact"), ("folded", "shipped"), ("unfolded", "shipped"))
    return [int((decided[a] != decided[b]).sum()) for a, b in pairs]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiles", type=int, default=96)
    parser.add_argument("--photo-tiles", type=int, default=48)
    parser.add_argument("--photos", type=Path, help="folder of images; default: matplotlib's sample")
    parser.add_argument("--layers", type=int, default=4, help="of the random vision transformer")
    parser.add_argument("--only", choices=["random", "photos"])
    args = parser.parse_args()
    torch.manual_seed(0)
    print(
        "| tiles | spread | dtype | decisions | shipped off float64 | folded off float64 | folded off shipped |", end=""
    )
    print(" unfolded off shipped |\n|" + " --- |" * 8)
    for kind in ("random", "photos") if args.only is None else (args.only,):
        if kind == "random":
            what, vit = "random tokens", torch.randn(args.tiles // 8 * 8, 1025, WIDTH)
        else:
            images = photographs(args.photos)
            what, vit = (
                f"crops of {len(images)} photographs",
                photo_tokens(images, args.photo_tiles // 8 * 8, args.layers),
            )
        for spread in (2.0, 0.1):
            torch.manual_seed(1)
            # Its parameters require gradients: without, torch computes the shipped attention three times slower.
            router = ShippedRouter(WIDTH).eval()
            calibrate(router, vit, spread)
            for dtype in (torch.float32, torch.bfloat16):
                name = str(dtype).removeprefix("torch.")
                counts = " | ".join(f"{n} ({100 * n / len(vit):.1f}%)" for n in flips(router, vit, dtype))
                print(f"| {what} | {spread} | {name} | {len(vit)} | {counts} |", flush=True)


if __name__ == "__main__":
    main()
