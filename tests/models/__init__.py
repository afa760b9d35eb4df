"""Models for tests: tiny native InternVL (`ivl_kernels.testing.tiny`) and stand-ins of the remote-code chat model.

`chat_repo` stands in for the code of the OpenGVLab/InternVL repository, `chat_hub` for what InternVL3.5 and
InternVL3.5-Flash checkpoints carry. Both classes are called InternVLChatModel, as upstream.
"""

import torch

from ivl_kernels.testing import tiny
from ivl_kernels.testing.tiny import FAMILIES, IMAGE_TOKEN, inputs, native_config, native_model, randomize, text_config

__all__ = [
    "CHAT_KINDS",
    "FAMILIES",
    "IMAGE_TOKEN",
    "chat_config",
    "chat_inputs",
    "chat_model",
    "inputs",
    "native_config",
    "native_model",
    "randomize",
    "text_config",
]

CHAT_KINDS = ("repo", "hub")
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def chat_config(kind="hub", family=None, *, flash=None, llm=None, vision=None, **changes):
    """Config of a tiny InternVLChatModel.

    kind: "repo" or "hub". flash: None, or (relative threshold, absolute threshold), which sets flash_mode and gives
    the vision transformer the 32 x 32 grid that Flash's literals 256 and 64 need (64 pixels, patches of 2).
    """
    from .configuration import InternVLChatConfig

    family = family or ("qwen2" if kind == "repo" else "qwen3")
    text = tiny.text_config(family, **(llm or {})).to_dict()
    text["architectures"] = [_ARCHITECTURES[family]]
    # Flash's pooling has 16 heads, whatever the width.
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, qkv_bias=True,
        patch_size=8 if flash is None else 2, drop_path_rate=0.0,
    )  # fmt: skip
    extra = {}
    if flash is not None:
        extra = dict(flash_mode=True, flash_relative_threshold=flash[0], flash_absolute_threshold=flash[1])
    return InternVLChatConfig(
        vision_config={**sizes, **(vision or {})},
        llm_config=text,
        **{
            **dict(force_image_size=64, ps_version="v2", downsample_ratio=0.5, template="internvl2_5"),
            **extra,
            **changes,
        },
    )


def chat_model(kind="hub", family=None, *, seed=0, dtype=torch.float32, token_id=IMAGE_TOKEN, **changes):
    """A tiny InternVLChatModel in eval mode with `img_context_token_id` set; `changes` go to `chat_config`."""
    from . import chat_hub, chat_repo

    module = {"repo": chat_repo, "hub": chat_hub}[kind]
    model = module.InternVLChatModel(chat_config(kind, family, **changes))
    model = randomize(model, seed).to(dtype).eval()
    model.img_context_token_id = token_id
    model.language_model.generation_config.eos_token_id = None
    return model


def chat_inputs(model, tiles=((2,),), *, flags=False, **options):
    """`inputs` for this model's grid; `flags` adds the image_flags that its `forward` needs."""
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    batch = inputs(tiles, tokens=(grid // 2) ** 2, pixels=model.config.vision_config.image_size, **options)
    if flags and "pixel_values" in batch:
        batch["image_flags"] = torch.ones(len(batch["pixel_values"]), 1, dtype=torch.int64)
    return batch
