"""`ivl-kernels demo`: a photograph through an InternVL model, plain and patched, with proof that nothing changed."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cli import CommandError

PROMPT = "Please describe the image in detail."
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--image", metavar="PATH", help="JPEG, PNG, ...; default: the photograph that ships with the package")
    add("--model", metavar="PATH_OR_ID", help="checkpoint, transformers-native or remote code; default: a random model")
    add("--prompt", default=PROMPT, metavar="TEXT", help=f"default: {PROMPT!r}")
    add("--tiles", type=int, default=12, metavar="N", help="most tiles an image is cut into (default 12)")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--device", default=None, help="default: cuda if there is a GPU, else cpu")
    add("--tokens", type=int, default=16, metavar="N", help="tokens to generate (default 16)")
    add("--rounds", type=int, default=3, metavar="N", help="timed rounds, plain and patched in turn (default 3)")
    add("--flash", action="store_true", help="route the tiles as InternVL3.5-Flash does, and draw the routing")
    add("--trust-remote-code", action="store_true", help="allow --model to run the code in its checkpoint")
    add("--out", default="out", metavar="DIR", help="where the picture of the tiles and the report go (default out)")


def run(args: argparse.Namespace) -> int:
    return guarded(_run, args)


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


def _run(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from . import imaging, verify

    warnings.filterwarnings("ignore", message=".*(ps_version|deprecated).*")
    device = checked_device(args.device)
    dtype = getattr(torch, args.dtype)
    image = opened_image(args.image)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out {args.out}: {error.strerror}") from None

    bar = tqdm(total=9 + 2 * args.rounds, bar_format="{desc:<28} {bar} {n_fmt}/{total_fmt} {elapsed}", leave=False)

    def step(text: str) -> None:
        bar.set_description_str(text)
        bar.update(bar.n < bar.total)

    with bar:
        step("loading the model" if args.model else "building a random model")
        subject = subject_of(args)
        subject.model.to(device).eval()
        tiling = imaging.tile_image(image, max_tiles=args.tiles, tile=subject.pixels)
        inputs = subject.inputs(args.prompt, tiling.pixel_values(dtype), device)
        flash = subject.flash if args.model else args.flash
        if args.flash and not flash and not subject.native:
            raise CommandError("--flash: this checkpoint has no Flash modules, or its flash_mode is off")
        with quiet():
            report = verify(
                subject.model,
                inputs,
                max_new_tokens=args.tokens,
                rounds=args.rounds,
                progress=step,
                **subject.same_results(),
            )
        routed = None
        if args.flash or (flash and not subject.native):
            step("routing the tiles")
            routed = _flash_run(subject, inputs, args.tokens, device)
    bar.close()

    count = len(tiling.tiles)
    print(f"{args.image or 'the photograph that ships with the package'}: {image.width} x {image.height} pixels,")
    print(f"  {tiling.columns} x {tiling.rows} tiles{' and a thumbnail' if tiling.thumbnail else ''}, ", end="")
    print(f"{count * subject.tokens_per_tile} visual tokens of {inputs['input_ids'].shape[1]}")
    print(f"{subject.name}, {args.dtype} on {device}\n")
    print(f"Q: {args.prompt}")
    for label, tokens in (("plain:  ", report.plain_tokens), ("patched:", report.patched_tokens)):
        print(f"A, {label} {subject.text(tokens, args.tokens)!r}")
    if not args.model:
        print("(The weights are random, so the words mean nothing. Pass --model for a trained model.)")
    print(f"\n{report}\n")
    drawing: dict[str, Any] = {}
    if routed is not None:
        drawing = {"compressed": routed["compressed"], "scores": routed["scores"]}
        print(_flash_text(routed))
    picture = out / "tiles.png"
    imaging.draw_tiles(tiling, **drawing).save(picture)
    (out / "demo.json").write_text(json.dumps({**report.to_dict(), "flash": routed}, indent=1))
    print(f"wrote {picture} and {out / 'demo.json'}")
    return 0 if report.passed else 1


def checked_device(name: str | None) -> str:
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return device


def opened_image(path: str | None) -> Any:
    from . import imaging

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
    return Path(__file__).parent / "data" / "coffee.jpg"


@dataclass
class Subject:
    """A model with what is needed to ask it about tiles."""

    model: Any
    tokenizer: Any
    name: str
    native: bool
    pixels: int
    tokens_per_tile: int
    flash: bool

    def same_results(self) -> dict[str, Any]:
        """The features for `verify`: a native model has no Flash of its own to compare with."""
        return {"flash": False} if self.native else {}

    def inputs(self, prompt: str, pixel_values: Any, device: str) -> dict[str, Any]:
        """The keyword arguments of `generate`."""
        image = "<img>" + "<IMG_CONTEXT>" * (len(pixel_values) * self.tokens_per_tile) + "</img>\n"
        text = f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"
        batch = self.tokenizer(text, return_tensors="pt")
        token = self.model.config.image_token_id if self.native else self.model.img_context_token_id
        found = int((batch["input_ids"] == token).sum())
        if found != len(pixel_values) * self.tokens_per_tile:
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

    from .nn import FlashVision
    from .testing import tiny

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
    return Subject(model, tokenizer, name, True, 448, 256, True)


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
    native = kind == "internvl"
    if not native:
        model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    pixels = model.config.vision_config.image_size
    pixels = pixels[0] if isinstance(pixels, (list, tuple)) else pixels
    pixels = pixels if native else (getattr(model.config, "force_image_size", None) or pixels)
    tokens = model.config.image_seq_length if native else model.num_image_token
    flash = hasattr(model, "flash") if native else bool(getattr(model, "flash_mode", False))
    name = f"{type(model).__name__} from {path}, {parameters / 1e6:.0f} M parameters"
    return Subject(model, tokenizer, name, native, pixels, tokens, flash)


def _load_chat(path: str, trust_remote_code: bool, dtype: Any) -> Any:
    from .integrations import enable_remote_code

    if not trust_remote_code:
        raise CommandError(f"--model {path}: the checkpoint brings its own code; pass --trust-remote-code to run it")
    return enable_remote_code(path).from_pretrained(path, dtype=dtype)  # type: ignore[attr-defined]


def _flash_run(subject: Subject, inputs: dict[str, Any], tokens: int, device: str) -> dict[str, Any]:
    """One generation at 256 tokens a tile and one routed, both patched; what was routed and what it saved."""
    import torch

    from . import patched

    if not subject.flash:
        raise CommandError("--flash: this model has no Flash modules; attach an nn.FlashVision to it")
    options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    lengths: list[int] = []

    def generate() -> tuple[Any, float]:
        with torch.no_grad(), _prefill_length(_language_model(subject), lengths):
            start = time.perf_counter()
            made = subject.model.generate(**inputs, **options)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            return made, time.perf_counter() - start

    times: dict[bool, float] = {}
    answer, routing = None, None
    for on in (False, True, False, True):  # the second of each is kept
        with _flash_mode(subject, on), patched(subject.model) as handle:
            answer, times[on] = generate()
            routing = handle.last_routing() if on else routing
    images = [] if routing is None else routing.images
    return {
        "answer": subject.text(answer, tokens),
        "seconds": [times[False], times[True]],
        "tokens": lengths[-2:],
        "compressed": [bool(flag) for image in images for flag in image.compressed],
        "scores": [float(score) for image in images for score in image.scores] or None,
    }


def _flash_text(routed: dict[str, Any]) -> str:
    (before, after), (plain, flash) = routed["tokens"], routed["seconds"]
    small = sum(routed["compressed"])
    return (
        f"Flash: {small} of {len(routed['compressed'])} tiles compressed to 64 tokens, "
        f"prompt {before} -> {after} tokens, generation {plain:.2f} s -> {flash:.2f} s\n"
        f"A, Flash:   {routed['answer']!r}\n"
    )


def _language_model(subject: Subject) -> Any:
    return subject.model.model.language_model if subject.native else subject.model.language_model


@contextmanager
def _flash_mode(subject: Subject, on: bool) -> Iterator[None]:
    holder = subject.model.config if subject.native else subject.model
    before = holder.flash_mode
    holder.flash_mode = on
    try:
        yield
    finally:
        holder.flash_mode = before


@contextmanager
def _prefill_length(language_model: Any, lengths: list[int]) -> Iterator[None]:
    seen: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids") if given is None else given
        if given is not None:
            seen.append(given.shape[1])

    hook = language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        lengths.append(max(seen, default=0))


@contextmanager
def quiet() -> Iterator[None]:
    """Remote code prints on every forward; the progress bar should survive it."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        yield
