"""Tiny checkpoint folders with Flash that vLLM loads, what the patched whole model answers, and the examples."""

import base64
import functools
import importlib.util
import io
import os
import shutil
import sys
from pathlib import Path

import numpy
import torch

import ivl_kernels
from ivl_kernels import LanguageSide
from ivl_kernels.nn import FlashVision
from ivl_kernels.testing import tiny

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("native", "chat")
PLACEHOLDER = {"native": "<IMG_CONTEXT>", "chat": "<image>"}  # what vLLM replaces by the visual tokens
TEMPLATE = "w1 w2 {images}{prompt}"
TOKENS = 12
# One head of 32: the smallest that vLLM's attention takes.
TEXT = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=96)
OPTIONS = dict(dtype="float32", max_model_len=4096, max_num_seqs=4, enforce_eager=True, enable_prefix_caching=False)

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)


def environment(**changes):
    """For a process that imports this package and its tests, however it was installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "examples" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokenizer():
    """Words with spaces between them; the marks have the ids of the tiny models."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    marks = ["<IMG_CONTEXT>", "<img>", "</img>", "<|im_end|>", "<image>", "<video>", "<unk>"]
    words = ["<pad>", *(f"w{i}" for i in range(1, tiny.IMAGE_TOKEN)), *marks]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
        additional_special_tokens=marks[:3] + marks[4:6],
        extra_special_tokens={"start_image_token": "<img>", "end_image_token": "</img>",
                              "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
    )  # fmt: skip


def _save_native(folder):
    import transformers

    vision = tiny.vision_config(hidden_size=64, intermediate_size=128)
    model = tiny.native_model(text=tiny.text_config(**TEXT), vision=vision)
    tiny.randomize(FlashVision(64, 64, 0.5, 0.0), 1).attach(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if importlib.util.find_spec("torchvision") is None:
        return  # no processor: only vLLM needs one
    size = {"height": 64, "width": 64}
    images = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6)
    videos = transformers.InternVLVideoProcessor(size=size)
    transformers.InternVLProcessor(
        image_processor=images, tokenizer=tokenizer(), video_processor=videos, image_seq_length=16
    ).save_pretrained(folder)


def _save_chat(folder):
    """With its own code beside it, as published ones."""
    from tests.models import chat_hub, chat_model

    vision = dict(hidden_size=64, intermediate_size=128)
    model = chat_model("hub", flash=(0.5, 0.0), llm=TEXT, vision=vision, max_dynamic_patch=6, min_dynamic_patch=1,
                       dynamic_image_size=True, use_thumbnail=True, architectures=["InternVLChatModel"])  # fmt: skip
    for kind, auto in ((type(model), "AutoModel"), (type(model.config), "AutoConfig")):
        kind.register_for_auto_class(auto)
    try:
        model.save_pretrained(folder)
    finally:
        for kind in (type(model), type(model.config)):
            kind._auto_class = None
    for name in ("chat_hub", "chat_common", "intern_vit", "configuration"):
        shutil.copy(Path(chat_hub.__file__).with_name(f"{name}.py"), folder)
    tokenizer().save_pretrained(folder)


def save(folder, family):
    {"native": _save_native, "chat": _save_chat}[family](folder)
    return folder


def family_of(folder):
    return "chat" if (Path(folder) / "chat_hub.py").exists() else "native"


@functools.cache
def model_of(folder, flash=True):
    """The whole model of a folder; with Flash it is patched."""
    import transformers

    if family_of(folder) == "chat":
        model = ivl_kernels.enable_remote_code(folder).from_pretrained(folder, dtype=torch.float32).eval()
        model.img_context_token_id = tiny.IMAGE_TOKEN
        model.flash_mode = flash
        model.language_model.generation_config.eos_token_id = None
    else:
        model = transformers.InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        if flash:
            FlashVision.from_pretrained(folder).eval().attach(model)
    if flash:
        ivl_kernels.patch(model)
    return model


@functools.cache
def pictures():
    """Of 1, 7 and 5 tiles."""
    from PIL import Image

    draw = numpy.random.default_rng(0)
    sizes = ((64, 64), (128, 192), (64, 256))
    return [Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=numpy.uint8)) for size in sizes]


def encoded(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def tiles_of(images):
    from ivl_kernels.imaging import tile_image

    return [tile_image(image, max_tiles=6, tile=64).pixel_values() for image in images]


def prompt_of(family, images, text="w3 w4"):
    """What vLLM is given."""
    return TEMPLATE.format(images=f"{PLACEHOLDER[family]} w5 " * len(images), prompt=text)


def tokens_a_tile(model):
    return LanguageSide(model, fingerprint=None).tokens_a_tile


def new_tokens(model, made, ids):
    """Without the prompt, which a native model returns too."""
    return made[ids.shape[1] if hasattr(model, "model") else 0 :].tolist()


def ids_of(model, images, text="w3 w4"):
    """What the whole model is given: every placeholder."""
    ids = [1, 2]
    for tiles in tiles_of(images):
        ids += [291, *[tiny.IMAGE_TOKEN] * (tokens_a_tile(model) * len(tiles)), 292, 5]
    return torch.tensor([[*ids, *(int(word[1:]) for word in text.split())]])


def answer_of(model, images, text="w3 w4", tokens=TOKENS, pixels=None):
    """The tokens that the whole model answers with. pixels: of all tiles, instead of this package's."""
    ids = ids_of(model, images, text)
    if images and pixels is None:
        pixels = torch.cat(tiles_of(images))
    given = {"pixel_values": pixels} if images else {}
    options = dict(max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    return new_tokens(model, model.generate(input_ids=ids, **given, **options)[0], ids)
