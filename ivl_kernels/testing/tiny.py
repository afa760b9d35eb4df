"""Tiny randomly initialised InternVL models of the transformers-native kind, for tests, the demo and GPU checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss")
IMAGE_TOKEN = 290
VOCABULARY = 300


def text_config(family: str = "qwen3", **changes: Any) -> Any:
    """A language model of two layers with the family's quirks: heads * head_dim is not the width, grouped queries."""
    import transformers

    sizes: dict[str, Any] = dict(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=80,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    if family == "qwen2":
        sizes.pop("head_dim")
        kind = transformers.Qwen2Config
    elif family == "qwen3":
        kind = transformers.Qwen3Config
    elif family == "qwen3_moe":
        sizes.update(moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)
        kind = transformers.Qwen3MoeConfig
    elif family == "gpt_oss":
        sizes.update(intermediate_size=40, num_local_experts=4, num_experts_per_tok=2, sliding_window=32)
        sizes.update(layer_types=["sliding_attention", "full_attention"])
        kind = transformers.GptOssConfig
    else:
        raise ValueError(f"family: got '{family}', expected one of {', '.join(FAMILIES)}")
    return kind(**{**sizes, **changes})


def vision_config(**changes: Any) -> Any:
    """A vision transformer of two layers on 64-pixel tiles: an 8 x 8 grid, so 16 tokens a tile at 1/4 and 4 at 1/16."""
    from transformers import InternVLVisionConfig

    sizes: dict[str, Any] = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=(64, 64),
        patch_size=(8, 8),
        attention_bias=True,
    )
    return InternVLVisionConfig(**{**sizes, **changes})


def native_config(family: str = "qwen3", *, text: Any = None, vision: Any = None, **changes: Any) -> Any:
    from transformers import InternVLConfig

    vision = vision if vision is not None else vision_config()
    grid = vision.image_size[0] // vision.patch_size[0]
    sizes: dict[str, Any] = dict(
        vision_config=vision,
        text_config=text if text is not None else text_config(family),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=(grid // 2) ** 2,
        tie_word_embeddings=False,
    )
    return InternVLConfig(**{**sizes, **changes})


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a size that keeps activations near 1, so that tokens depend clearly on the image."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        kind = name.rsplit(".", 2)[-2:]
        if "embed_tokens" in kind or "sinks" in kind:
            scale, shift = 1.0, 0.0
        elif parameter.dim() < 2 and kind[-1] in ("weight", "ls1", "ls2", "lambda_1", "lambda_2"):
            scale, shift = 0.1, 1.0
        elif parameter.dim() < 2 or "position" in kind[-1] or "bias" in kind[-1]:
            scale, shift = 0.1, 0.0
        else:
            scale, shift = parameter[0].numel() ** -0.5 if parameter.dim() != 3 else parameter.shape[1] ** -0.5, 0.0
        parameter.copy_(values * scale + shift)
    return model


def native_model(family: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny `InternVLForConditionalGeneration` in eval mode; `changes` go to `native_config`."""
    from transformers import InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration(native_config(family, **changes))
    return randomize(model, seed).to(dtype).eval()


def image_run(tiles: int, tokens: int, token_id: int = IMAGE_TOKEN) -> list[int]:
    """The placeholders of an image between its start and end tokens (291 and 292)."""
    return [291, *[token_id] * (tiles * tokens), 292]


def inputs(
    tiles: tuple[tuple[int, ...], ...] = ((2,),),
    *,
    tokens: int = 16,
    pixels: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding: str = "left",
) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and pixel_values of a batch.

    Args:
        tiles: one tuple a row, with the number of tiles of each image in it; () is a row without images.
        tokens: placeholders a tile.
        pixels: side of a tile.
    """
    generator = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(1, 280, (count,), generator=generator).tolist()

    rows: list[list[int]] = []
    for images in tiles:
        row = text(5)
        for count in images:
            row += image_run(count, tokens) + text(4)
        rows.append(row + text(3 + len(rows)))
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if padding == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    count = sum(map(sum, tiles))
    if count:
        batch["pixel_values"] = torch.randn(count, 3, pixels, pixels, generator=generator).to(dtype)
    return batch
