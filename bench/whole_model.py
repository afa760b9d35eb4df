"""What a user waits for: InternVL3.5-1B from pixels to the first token, and a token after that, plain and patched.

    python -m bench.whole_model --tiles 1 5 13 --dtype float32 --rounds 3

Random weights at the released sizes. Plain and patched run in turns in one process; a row is printed only if the
patched model gave the same first token and its logits are close. Prints a Markdown table of medians with their range.
"""

from __future__ import annotations

import argparse
import gc
import platform
from pathlib import Path
from statistics import median
from typing import Any

import torch

import ivl_kernels
from ivl_kernels.integrations._stages import DECODE, stage_times
from ivl_kernels.testing import MODELS, tiny

SHAPE = MODELS["InternVL3.5-1B"]
VOCABULARY = 151_936
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # root mean square, relative
FEATURES = {"flash": False}
NEW = 8


def build(dtype: torch.dtype) -> Any:
    from transformers import InternVLForConditionalGeneration

    vision = tiny.vision_config(
        hidden_size=SHAPE.vision, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        image_size=(448, 448), patch_size=(14, 14),
    )  # fmt: skip
    text = tiny.text_config(
        "qwen3", hidden_size=SHAPE.hidden, num_hidden_layers=SHAPE.layers, num_attention_heads=SHAPE.q_heads,
        num_key_value_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, intermediate_size=SHAPE.intermediate,
        vocab_size=VOCABULARY, max_position_embeddings=40960, rope_theta=1e6,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(tiny.native_config(vision=vision, text=text))
    return tiny.randomize(model).to(dtype).eval().requires_grad_(False)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            return name + (", avx512_bf16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text() else "")
    return platform.processor()


def prompt(tiles: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    batch = tiny.inputs(((tiles,),), tokens=256, pixels=448, dtype=dtype)
    text = torch.randint(1, 280, (1, 50), generator=torch.Generator().manual_seed(1))
    batch["input_ids"] = torch.cat((batch["input_ids"], text), 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def close(model: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> str:
    """What differs between the plain and the patched model, or ""."""
    plain = model(**batch, logits_to_keep=1).logits.float()
    with ivl_kernels.patched(model, **FEATURES):
        ours = model(**batch, logits_to_keep=1).logits.float()
    error = float((ours - plain).norm() / plain.norm())
    same = bool((ours.argmax(-1) == plain.argmax(-1)).all())
    return "" if error <= TOLERANCE[dtype] and (same or dtype != torch.float32) else f"error {error:.1e}, same {same}"


@torch.no_grad()
def run(model: Any, tiles: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    batch, device = prompt(tiles, dtype), torch.device("cpu")
    wrong = close(model, batch, dtype)
    if wrong:
        return {"tiles": tiles, "failed": wrong}

    def generate() -> None:
        model.generate(**batch, max_new_tokens=NEW + 1, min_new_tokens=NEW + 1, do_sample=False)

    seconds: dict[str, list[tuple[float, float]]] = {"plain": [], "patched": []}
    for i in range(rounds):
        for name in ("plain", "patched") if i % 2 else ("patched", "plain"):
            gc.collect()
            handle = ivl_kernels.patch(model, **FEATURES) if name == "patched" else None
            times = stage_times(model, generate, device)
            decode = times.pop(DECODE)
            seconds[name].append((sum(times.values()), decode / NEW))
            if handle is not None:
                handle.undo()
    return {"tiles": tiles, "tokens": batch["input_ids"].shape[1], "seconds": seconds}


def row(found: dict[str, Any], dtype: str) -> str:
    if "failed" in found:
        return f"| {dtype} | {found['tiles']} | answers differ: {found['failed']} |"
    cells = [dtype, str(found["tiles"]), str(found["tokens"])]
    for part in range(2):
        plain, ours = ([value[part] for value in found["seconds"][name]] for name in ("plain", "patched"))
        ratios = sorted(a / b for a, b in zip(plain, ours))
        unit, scale = (" s", 1) if part == 0 else (" ms", 1e3)
        cells += [f"{scale * median(plain):.3g}{unit}", f"{scale * median(ours):.3g}{unit}"]
        cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 5, 13])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {FEATURES}\n")
    print("| dtype | tiles | prompt | first token, plain | patched | ratio | next token, plain | patched | ratio |")
    print("| --- " * 9 + "|")
    for name in args.dtype:
        dtype = getattr(torch, name)
        model = build(dtype)
        for tiles in args.tiles:
            print(row(run(model, tiles, dtype, args.rounds), name), flush=True)


if __name__ == "__main__":
    main()
