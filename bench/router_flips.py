"""How often folding the router's attentions changes a decision: folded against shipped arithmetic, by dtype.

    python -m bench.router_flips [--photos FOLDER] [--tiles 256] [--layers 4]

The router has random weights; its gate is scaled so that the scores of the tiles spread (standard deviation of the
logit difference 2, as a trained gate's must to be of use) or are crowded (0.1). Tiles are random tokens, or photographs
cut into 448 x 448 tiles and passed through a vision transformer with random weights.
Prints a Markdown table: decisions that differ from float64, for the shipped and for the folded arithmetic, and from
each other.
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


def calibrate(router: ShippedRouter, vit: torch.Tensor, spread: float) -> None:
    """Scale and shift the gate so that the logit differences of these tiles have mean 0 and this deviation."""
    gate = router.gating.gate[1]
    with torch.no_grad():
        gate.weight[1].zero_()
        gate.bias.zero_()
        p = torch.cat([router(part) for part in vit.split(8)])
        difference = (p[:, 0] / p[:, 1]).log()
        gain = spread / difference.std()
        gate.weight.mul_(gain)
        gate.bias[0] = -(difference * gain).mean()


def flips(router: ShippedRouter, vit: torch.Tensor, dtype: torch.dtype, calls: torch.Tensor) -> dict[str, int]:
    """Decisions over calls of `calls` tiles each that differ between float64, shipped and folded arithmetic."""
    router = copy.deepcopy(router).to(dtype)
    vit = vit.to(dtype)
    exact = copy.deepcopy(router).double()
    folded = TileRouter.from_modules(router.pooling_before_gating, router.gating)
    truth = TileRouter.from_modules(exact.pooling_before_gating, exact.gating)
    with torch.no_grad():
        scores = {
            "float64": torch.cat([truth(part.double(), skip=1) for part in vit.split(8)]),
            "shipped": torch.cat([router(part) for part in vit.split(8)]),
            "folded": torch.cat([folded(part, skip=1) for part in vit.split(8)]),
        }
    decisions: dict[str, list[torch.Tensor]] = {name: [] for name in scores}
    for name, p in scores.items():
        for part in p.split(calls.tolist()):
            if name == "shipped":
                decisions[name].append(shipped_decision(part, RELATIVE, ABSOLUTE))
            else:
                chosen = select_tiles(part[:, 0], relative_threshold=RELATIVE, absolute_threshold=ABSOLUTE)
                decisions[name].append(chosen)
    d = {name: torch.cat(parts) for name, parts in decisions.items()}
    return {
        "shipped/float64": int((d["shipped"] != d["float64"]).sum()),
        "folded/float64": int((d["folded"] != d["float64"]).sum()),
        "folded/shipped": int((d["folded"] != d["shipped"]).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiles", type=int, default=256)
    parser.add_argument("--photo-tiles", type=int, default=64)
    parser.add_argument("--photos", type=Path, help="folder of images; default: matplotlib's sample")
    parser.add_argument("--layers", type=int, default=4, help="of the random vision transformer")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = photographs(args.photos)
    photos = photo_tokens(images, args.photo_tiles, args.layers)
    inputs = {"random tokens": torch.randn(args.tiles, 1025, WIDTH), f"crops of {len(images)} photographs": photos}
    print("| tiles | spread | dtype | decisions | shipped off float64 | folded off float64 | folded off shipped |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for what, vit in inputs.items():
        calls = torch.full((len(vit) // 8,), 8)  # seven tiles and a thumbnail
        vit = vit[: int(calls.sum())]
        for spread in (2.0, 0.1):
            router = ShippedRouter(WIDTH).eval().requires_grad_(False)
            calibrate(router, vit, spread)
            for dtype in (torch.float32, torch.bfloat16):
                row = flips(router, vit, dtype, calls)
                name = str(dtype).removeprefix("torch.")
                counts = " | ".join(f"{n} ({100 * n / len(vit):.1f}%)" for n in row.values())
                print(f"| {what} | {spread} | {name} | {len(vit)} | {counts} |", flush=True)


if __name__ == "__main__":
    main()
