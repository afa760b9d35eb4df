"""What a command is run on: a model, its tokenizer and a photograph."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._checks import KERNEL_DTYPES
from ..models.families import Family, family_of
from . import CommandError

PROMPT = "Please describe the image in detail."
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model is asked about which photograph."""
    add = parser.add_argument
    add("--image", metavar="PATH", help="JPEG, PNG, ...; default: the photograph that ships with the package")
    add("--model", metavar="PATH_OR_ID", help="checkpoint, transformers-native or remote code; default: a random model")
    add("--prompt", default=PROMPT, metavar="TEXT", help=f"default: {PROMPT!r}")
    add("--tiles", type=int, default=12, metavar="N", help="most tiles an image is cut into (default 12)")
    add("--dtype", choices=KERNEL_DTYPES, default="float32", help="default: float32")
    add("--device", default=None, help="default: cuda if there is a GPU, else cpu")
    add("--tokens", type=int, default=16, metavar="N", help="tokens to generate (default 16)")
    add("--rounds", type=int, default=3, metavar="N", help="timed rounds, plain and patched in turn (default 3)")
    add("--trust-remote-code", action="store_true", help="allow --model to run the code in its checkpoint")


def guarded(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command of this kind; what the user can put right becomes a `CommandError`."""
    for package in ("transformers", "PIL", "tokenizers", "tqdm"):
        try:
            __import__(package)
        except ImportError:
            raise CommandError(f"{package} is not installed; pip install 'ivl-kernels[hf]'") from None
    for name, least in (("tiles", 1), ("tokens", 1), ("rounds", 0)):
        if getattr(args, name) < least:
            raise CommandError(f"--{name}: got {getattr(args, name)}, expected at least {least}")
    import torch

    try:
        return command(args)
    except torch.OutOfMemoryError:
        raise CommandError("out of GPU memory: try fewer --tiles, --dtype bfloat16 or --device cpu") from None
    except MemoryError:
        raise CommandError("out of memory: try fewer --tiles or --dtype bfloat16") from None
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise CommandError("out of memory: try fewer --tiles or --dtype bfloat16") from None
        raise


def checked_device(name: str | None) -> str:
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return device


def opened_image(path: str | None) -> Any:
    from .. import imaging

    try:
        return imaging.load_image(path or sample_photo())
    except imaging.ImageError as error:
        raise CommandError(f"--image {error}") from None


def subject_of(args: argparse.Namespace) -> Subject:
    import torch

    dtype = getattr(torch, args.dtype)
    return load(args.model, args.trust_remote_code, dtype) if args.model else random_subject(dtype)


def sample_photo() -> Path:
    """The photograph that ships with the package (licence in data/README.md)."""
    return Path(__file__).parent.parent / "data" / "coffee.jpg"


@dataclass
class Subject:
    """A model with what is needed to ask it about tiles."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def family(self) -> Family:
        family = family_of(self.model)
        assert family is not None, type(self.model).__name__
        return family

    @property
    def flash(self) -> bool:
        """It has Flash modules, and routes with them once it is patched."""
        settings = self.family.flash_settings
        return self.family.flash_holder is not None and bool(getattr(settings, "flash_mode", False))

    def same_results(self) -> dict[str, Any]:
        """The features for `verify`: transformers' own model has no Flash of its own to compare with."""
        return {} if self.family.flash_holder is self.model else {"flash": False}

    def inputs(self, prompt: str, pixel_values: Any, device: str) -> dict[str, Any]:
        """The keyword arguments of `generate`."""
        image = "<img>" + "<IMG_CONTEXT>" * (len(pixel_values) * self.family.tokens_a_tile) + "</img>\n"
        text = f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"
        batch = self.tokenizer(text, return_tensors="pt")
        found = int((batch["input_ids"] == self.family.token_id).sum())
        if found != len(pixel_values) * self.family.tokens_a_tile:
            raise CommandError("--model: its tokenizer does not know <IMG_CONTEXT>, so there is no place for the image")
        return {
            "input_ids": batch["input_ids"].to(device),
            "attention_mask": batch["attention_mask"].to(device),
            "pixel_values": pixel_values.to(device),
        }

    def text(self, tokens: Any, count: int) -> str:
        return self.tokenizer.decode(tokens[0, -count:], skip_special_tokens=True).strip()


def random_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the documentation that comes with Python; needs no download."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[3:]),
    )


def random_subject(dtype: Any) -> Subject:
    """A small randomly initialised model with the shape of InternVL3.5: InternViT, projector, Qwen3; Flash attached."""
    import torch

    from ..nn import FlashVision
    from ..testing import tiny

    tokenizer = random_tokenizer()
    token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = tiny.native_config(
        vision=tiny.vision_config(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=1536,
            image_size=(448, 448),
            patch_size=(14, 14),
        ),
        text=tiny.text_config(
            "qwen3",
            hidden_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            intermediate_size=1536,
            vocab_size=len(tokenizer),
            max_position_embeddings=40960,
            rope_theta=1e6,
        ),
        image_token_id=token,
    )
    from transformers import InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration(config)
    flash = FlashVision(384, 512, relative_threshold=0.5, absolute_threshold=0.0)
    tiny.randomize(model)
    tiny.randomize(flash, seed=1)
    torch.nn.Module.to(flash, dtype)
    model = model.to(dtype)
    flash.attach(model)
    parameters = sum(p.numel() for p in model.parameters())
    name = f"a random InternVL3.5-shaped model, {parameters / 1e6:.0f} M parameters"
    return Subject(model, tokenizer, name)


def load(path: str, trust_remote_code: bool, dtype: Any) -> Subject:
    """A checkpoint folder (or hub id) of either family."""
    import transformers

    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise CommandError(f"--model {path}: no config.json in it, so it is not a checkpoint folder")
    try:
        if folder.is_dir():
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        else:
            kind = transformers.PretrainedConfig.get_config_dict(path)[0].get("model_type")
        if kind == "internvl":
            model = transformers.InternVLForConditionalGeneration.from_pretrained(path, dtype=dtype)
        elif kind == "internvl_chat":
            model = _load_chat(path, trust_remote_code, dtype)
        else:
            raise CommandError(f"--model {path}: model_type {kind!r}, expected 'internvl' or 'internvl_chat'")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"--model {path}: {str(error).strip().splitlines()[0]}") from None
    parameters = sum(p.numel() for p in model.parameters())
    if kind == "internvl_chat":
        model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return Subject(model, tokenizer, f"{type(model).__name__} from {path}, {parameters / 1e6:.0f} M parameters")


def _load_chat(path: str, trust_remote_code: bool, dtype: Any) -> Any:
    from ..integrations import enable_remote_code

    if not trust_remote_code:
        raise CommandError(f"--model {path}: the checkpoint brings its own code; pass --trust-remote-code to run it")
    return enable_remote_code(path).from_pretrained(path, dtype=dtype)  # type: ignore[attr-defined]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Remote code prints on every forward; the progress bar should survive it."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
