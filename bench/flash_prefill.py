"""Prefill of InternVL3.5-1B from pixels to the first logits: Flash patched, Flash as shipped, and the plain 1/4 model.

    python -m bench.flash_prefill --tiles 13 --rounds 2

Random weights at the released sizes, half of the tiles compressed. The vision transformer is the same in all three and
timed once a round. Prints a Markdown table of the stages, and checks that both Flash paths give the same first token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

import ivl_kernels
from bench.bench_flash import parts_of_shipped
from bench.measure import device
from ivl_kernels.flash import flash_inputs, route
from ivl_kernels.testing import MODELS
from ivl_kernels.testing.cases.token_packing import CONTEXT, prompt
from ivl_kernels.testing.shipped import ShippedFlash, shipped_decision, shipped_packing, shipped_shuffle

SHAPE = MODELS["InternVL3.5-1B"]
STAGES = ("vision transformer", "route", "project", "embed and pack", "language model")


def vision_transformer() -> torch.nn.Module:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(hidden_size=SHAPE.vision, num_hidden_layers=24, attn_implementation="sdpa")
    return InternVLVisionModel(config).eval().requires_grad_(False)


def language_model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=SHAPE.hidden, num_hidden_layers=SHAPE.layers, num_attention_heads=SHAPE.q_heads,
        num_key_value_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, intermediate_size=SHAPE.intermediate,
        vocab_size=CONTEXT + 1, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


class Clock:
    """Seconds by (variant, stage), one number a round."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)

    def __call__(self, variant: str, stage: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        self.seconds[variant, stage].append(time.perf_counter() - start)
        return result

    def median(self, variant: str, stage: str) -> float:
        return statistics.median(self.seconds.get((variant, stage), [0.0]))


def plain(stage: ShippedFlash, vit: torch.Tensor, ids: torch.Tensor, clock: Clock) -> torch.Tensor:
    """The 1/4 model: all tiles through mlp1, rows over the placeholders."""

    def project() -> torch.Tensor:
        grid = vit[:, 1:].reshape(vit.shape[0], 32, 32, -1)
        return stage.mlp1(shipped_shuffle(grid, 0.5).reshape(vit.shape[0], 256, -1))

    def embed() -> torch.Tensor:
        embeds = stage.embedding(ids)
        embeds[ids == CONTEXT] = rows.flatten(0, 1)
        return embeds

    rows = clock("plain 1/4", "project", project)
    return clock("plain 1/4", "embed and pack", embed)


def shipped(stage: ShippedFlash, vit: torch.Tensor, ids: torch.Tensor, clock: Clock) -> torch.Tensor:
    """Flash as released: the router and both projectors over all tiles, then the loop."""
    name = "Flash, shipped"

    def project() -> tuple[torch.Tensor, torch.Tensor]:
        grid = vit[:, 1:].reshape(vit.shape[0], 32, 32, -1)
        small = stage.mlp2(shipped_shuffle(grid, 0.25).reshape(vit.shape[0], 64, -1))
        return small, stage.mlp1(shipped_shuffle(grid, 0.5).reshape(vit.shape[0], 256, -1))

    def pack() -> torch.Tensor:
        compress = shipped_decision(gate, *stage.thresholds)
        return shipped_packing(stage.embedding(ids), ids, torch.ones_like(ids), small, full, compress, CONTEXT)[0]

    gate = clock(name, "route", lambda: stage.router(vit))
    small, full = clock(name, "project", project)
    return clock(name, "embed and pack", pack)


def patched(stage: ShippedFlash, vit: torch.Tensor, ids: torch.Tensor, clock: Clock) -> torch.Tensor:
    """Our path. Projecting writes into the packed embeddings, so the two are one number."""
    name = "Flash, patched"
    parts = parts_of_shipped(stage)
    decisions = clock(name, "route", lambda: route(vit, parts.vision))
    mask = torch.ones_like(ids)
    return clock(
        name, "project", lambda: flash_inputs(parts, ids, vit, attention_mask=mask, decisions=decisions).embeds
    )


VARIANTS = {"Flash, patched": patched, "Flash, shipped": shipped, "plain 1/4": plain}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    vision, language = vision_transformer(), language_model()
    # Parameters that require gradients, as a loaded model has: torch's attention takes another path without.
    stage = ShippedFlash(SHAPE.vision, SHAPE.hidden, CONTEXT + 1, (0.45, 0.0), CONTEXT).eval()
    stage.embedding = language.get_input_embeddings()
    ids = prompt(options.tiles, device=device())
    pixels = torch.randn(options.tiles, 3, 448, 448)
    clock, logits, tokens = Clock(), {}, {}
    for _ in range(options.rounds):
        vit = clock("all", "vision transformer", lambda: vision(pixels).last_hidden_state)
        # An offset a tile keeps the scores of random tiles apart, so that rounding does not decide.
        vit = vit + torch.randn(options.tiles, 1, SHAPE.vision, generator=torch.Generator().manual_seed(1))
        for name, variant in VARIANTS.items():
            embeds = variant(stage, vit, ids, clock)
            tokens[name] = embeds.shape[1]

            def prefill(embeds: torch.Tensor = embeds) -> torch.Tensor:
                return language(inputs_embeds=embeds, logits_to_keep=1, use_cache=True).logits

            if variant is patched:
                with ivl_kernels.patched(language):
                    logits[name] = clock(name, "language model", prefill)
            else:
                logits[name] = clock(name, "language model", prefill)
    ours, theirs = logits["Flash, patched"], logits["Flash, shipped"]
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1)), "the first token differs"
    total = {n: sum(clock.median(n, s) for s in STAGES) + clock.median("all", STAGES[0]) for n in VARIANTS}
    print(f"largest difference of the logits, patched to shipped: {float((ours - theirs).abs().max()):.1e}")
    print(
        f"| {options.tiles} tiles, {options.rounds} rounds | tokens | {' | '.join(STAGES)} | all | time over patched |"
    )
    print("|" + " --- |" * (len(STAGES) + 4))
    for name in VARIANTS:
        cells = [clock.median("all" if s == STAGES[0] else name, s) for s in STAGES]
        shares = " | ".join(f"{x:.2f} s ({x / total[name]:.1%})" if x else "" for x in cells)
        gain = total[name] / total["Flash, patched"]
        print(f"| {name} | {tokens[name]} | {shares} | {total[name]:.1f} s | {gain:.2f} |")


if __name__ == "__main__":
    main()
