"""A long document of photos and text at δ = 1, 1/4, 1/16, 1/64: position span, token counts, speed of the prefill.

    python -m bench.v2pe_context --photos 6 --layers 4

The language model has the widths of InternVL3.5-1B and random weights, so nothing is said about answers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import ivl_kernels

IMAGE = 151671


def model(layers: int) -> Any:
    import transformers

    text = transformers.Qwen3Config(
        hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=3072, vocab_size=151936, max_position_embeddings=40960,
    )  # fmt: skip
    vision = transformers.InternVLVisionConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return transformers.InternVLForConditionalGeneration(config).eval()


def document(photos: int, tiles: int, text: int) -> torch.Tensor:
    """Text, a photo, text, a photo, ... text."""
    rows = torch.randint(1000, 100000, (photos + 1, text)).tolist()
    ids = rows[0]
    for row in rows[1:]:
        ids += [151669, *[IMAGE] * (256 * tiles), 151670, *row]
    return torch.tensor([ids])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--tiles", type=int, default=3)
    parser.add_argument("--text", type=int, default=100)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    net = model(options.layers)
    ids = document(options.photos, options.tiles, options.text)
    # Projected features of the photos: what is measured is the language model.
    embeds = torch.randn(options.photos * options.tiles * 256, 1024) * 0.02
    features = type("Features", (), {"pooler_output": embeds})()
    handle = ivl_kernels.patch(net, v2pe=1.0)
    steps = ["1", "1/4", "1/16", "1/64"]
    times: dict[str, list[float]] = {step: [] for step in steps}
    reports = {}
    for _ in range(options.rounds + 1):
        for step in steps:
            begin = time.perf_counter()
            net(input_ids=ids, mm_encoder_outputs={"image": features}, v2pe_delta=step, logits_to_keep=1)
            times[step].append(time.perf_counter() - begin)
            reports[step] = handle.note("v2pe").report
    stock = statistics.median(times["1"][1:])
    print("| δ | tokens | positions | of a 32768 context | prefill s (min-max) | against δ = 1 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for step in steps:
        taken, (tokens,), (span,) = times[step][1:], reports[step].tokens, reports[step].span
        print(
            f"| {step} | {tokens} | {span:g} | {span / 32768:.1%} | {statistics.median(taken):.2f} "
            f"({min(taken):.2f}-{max(taken):.2f}) | {statistics.median(taken) / stock:.2f} |"
        )


if __name__ == "__main__":
    main()
