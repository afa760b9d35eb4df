"""What a user waits for: InternVL3.5-1B from pixels to the first token, a token after that, a training step.

    python -m bench.whole_model prefill --tiles 1 5 13 --dtype float32 --rounds 3
    python -m bench.whole_model decode --past 1344 3392 --compile
    python -m bench.whole_model training --tiles 2 --frozen
    python -m bench.whole_model flash --tiles 13

Random weights at the released sizes. Plain and patched (with --compile, also the plain model under `torch.compile`) run
in turns in one process; a row is printed only if the answers are close (of Flash, which is another model, none is
compared). Prints Markdown tables: medians, and ratios
over the patched model with their range. `--memory` measures bytes at their peak over the loaded model instead of time:
`resident` of the process, `living` in torch's tensors.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch

import ivl_kernels
from bench.runner import environment
from ivl_kernels.flash import FlashVision
from ivl_kernels.integrations import _stages
from ivl_kernels.integrations._stages import stage_times
from ivl_kernels.testing import MODELS, tiny

SHAPE = MODELS["InternVL3.5-1B"]
VISION = dict(
    hidden_size=SHAPE.vision, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
    image_size=(448, 448), patch_size=(14, 14),
)  # fmt: skip
VOCABULARY = 151_936
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # root mean square, relative
FEATURES = {"flash": False}
CPU = torch.device("cpu")

Seconds = dict[str, list[float]]


def build(dtype: torch.dtype) -> Any:
    from transformers import InternVLForConditionalGeneration

    text = tiny.text_config(
        "qwen3", hidden_size=SHAPE.hidden, num_hidden_layers=SHAPE.layers, num_attention_heads=SHAPE.q_heads,
        num_key_value_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, intermediate_size=SHAPE.intermediate,
        vocab_size=VOCABULARY, max_position_embeddings=40960, rope_theta=1e6,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(tiny.native_config(vision=tiny.vision_config(**VISION), text=text))
    return tiny.randomize(model).to(dtype).eval().requires_grad_(False)


def prompt(tiles: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    batch = tiny.inputs(((tiles,),), tokens=256, pixels=448, dtype=dtype)
    text = torch.randint(1, 280, (1, 50), generator=torch.Generator().manual_seed(1))
    batch["input_ids"] = torch.cat((batch["input_ids"], text), 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def differs(ours: torch.Tensor, plain: torch.Tensor) -> str:
    """What differs between logits [..., V] of the plain and the patched model, or ""."""
    error = float((ours.float() - plain.float()).norm() / plain.float().norm())
    same = bool((ours.argmax(-1) == plain.argmax(-1)).all())
    limit = TOLERANCE[plain.dtype]
    return "" if error <= limit and (same or plain.dtype != torch.float32) else f"error {error:.1e}, same {same}"


def in_turns(
    model: Any, rounds: int, names: tuple[str, ...], run: Callable[[str], Any], features: Mapping[str, Any] = FEATURES
) -> Iterator[tuple[str, Any]]:
    """(name, what `run` gives) of every variant, every round in another order; `patched` with the model patched."""
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            gc.collect()
            handle = ivl_kernels.patch(model, **features) if name == "patched" else None
            yield name, run(name)
            if handle is not None:
                handle.undo()


def peak(run: Callable[[], None], what: str) -> float:
    """Bytes by which the resident set, or the living tensors, grew at most."""
    if what == "resident":
        before = _stages._reset_peak(False)
        run()
        return _stages._peak(False) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


def compiled(model: Any) -> Any:
    """A copy of the plain model whose vision and language model are compiled."""
    twin = copy.deepcopy(model)
    for name in ("vision_tower", "language_model"):
        setattr(twin.model, name, torch.compile(getattr(twin.model, name)))
    return twin


@torch.no_grad()
def prefill(model: Any, tiles: int, dtype: torch.dtype, args: argparse.Namespace) -> str:
    """Pixels and prompt to the logits of the first token."""
    batch = prompt(tiles, dtype)
    names = ("plain", "patched", "compiled") if args.compile else ("plain", "patched")
    twin = compiled(model) if args.compile else None
    logits = {}

    def run(name: str) -> float:
        subject = twin if name == "compiled" else model

        def forward() -> None:
            logits[name] = subject(**batch, logits_to_keep=1, use_cache=True).logits

        if args.memory:
            return peak(forward, args.memory)
        stages = stage_times(subject, forward, CPU)
        print(f"<!-- {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in stages.items()) + " -->", flush=True)
        return sum(stages.values())

    if twin is not None:
        run("compiled")  # compiles, as called below
    found: Seconds = {name: [] for name in names}
    for name, value in in_turns(model, args.rounds, names, run):
        found[name].append(value)
    label = f"{tiles} tiles, {batch['input_ids'].shape[1]} tokens"
    wrong = differs(logits["patched"], logits["plain"])
    if wrong:
        return f"| {label} | answers differ: {wrong} |"
    if args.memory:
        return row(f"{args.memory} memory, {label}", found, " MB", 2**-20)
    return row(f"first token, {label}", found, " s", 1.0)


@torch.no_grad()
def decode(model: Any, past: int, dtype: torch.dtype, args: argparse.Namespace) -> str:
    """A token after `past` others, whose keys and values are random."""
    from transformers import DynamicCache

    steps = 16
    names = ("plain", "patched", "compiled") if args.compile else ("plain", "patched")
    ids = torch.randint(1, 280, (steps, 1, 1))
    twin = compiled(model) if args.compile else None

    def run(name: str) -> tuple[float, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        cache = DynamicCache(config=model.config.text_config)
        for layer in range(SHAPE.layers):
            kv = torch.randn(2, 1, SHAPE.kv_heads, past, SHAPE.head_dim, generator=generator).to(dtype)
            cache.update(kv[0], kv[1], layer)
        language = (twin if name == "compiled" else model).model.language_model
        seconds = []
        for token in ids:
            start = time.perf_counter()
            hidden = language(input_ids=token, past_key_values=cache, use_cache=True).last_hidden_state
            logits = model.lm_head(hidden)
            seconds.append(time.perf_counter() - start)
        return sum(seconds[1:]) / (steps - 1), logits  # the first also makes room in the cache

    if twin is not None:
        run("compiled")  # compiles, as called below
    logits: dict[str, torch.Tensor] = {}
    found: Seconds = {name: [] for name in names}
    for name, (seconds, last) in in_turns(model, args.rounds, names, run):
        found[name].append(seconds)
        logits[name] = last
    wrong = differs(logits["patched"], logits["plain"])
    if wrong:
        return f"| next token after {past} | answers differ: {wrong} |"
    return row(f"next token after {past}", found, " ms", 1e3)


@torch.no_grad()
def flash(model: Any, tiles: int, dtype: torch.dtype, args: argparse.Namespace) -> str:
    """Pixels and prompt to the first token of the plain model, and patched with Flash, about half of it compressed."""
    batch = prompt(tiles, dtype)
    # An offset a tile keeps the scores of random tiles apart.
    batch["pixel_values"] += torch.randn(tiles, 1, 1, 1, generator=torch.Generator().manual_seed(1)).to(dtype)
    FlashVision(SHAPE.vision, SHAPE.hidden, 0.45, 0.0, dtype=dtype).attach(model.requires_grad_(False))

    def run(name: str) -> float:
        start = time.perf_counter()
        model.generate(**batch, max_new_tokens=1, do_sample=False)
        return time.perf_counter() - start

    found: Seconds = {name: [] for name in ("plain", "patched")}
    for name, seconds in in_turns(model, args.rounds, ("plain", "patched"), run, {}):
        found[name].append(seconds)
    with ivl_kernels.patched(model) as handle:
        model.generate(**batch, max_new_tokens=1, do_sample=False)
        small = sum(int(flag) for image in handle.last_routing().images for flag in image.compressed)
    return row(f"Flash, {small} of {tiles} tiles compressed, first token", found, " s", 1.0)


def training(model: Any, tiles: int, dtype: torch.dtype, args: argparse.Namespace) -> str:
    """Forward and backward of the loss, dropout off."""
    batch = prompt(tiles, dtype)
    batch["labels"] = batch["input_ids"].clone()
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(not args.frozen)

    gradients = {}
    layer = model.model.language_model.layers[0]
    watched = (layer.mlp.up_proj.weight, layer.self_attn.q_proj.weight)

    def consume(parameter: torch.nn.Parameter) -> None:
        if args.consumed and not any(parameter is w for w in watched):
            parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(consume) for p in model.parameters() if p.requires_grad]

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()

    def run(name: str) -> float:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        value = peak(step, args.memory) if args.memory else step() or time.perf_counter() - start
        gradients[name] = torch.cat([w.grad.flatten() for w in watched])
        return value

    found: Seconds = {name: [] for name in ("plain", "patched")}
    for name, value in in_turns(model, args.rounds, ("plain", "patched"), run):
        found[name].append(value)
    for hook in hooks:
        hook.remove()
    error = float((gradients["patched"] - gradients["plain"]).norm() / gradients["plain"].norm())
    label = f"training step, {tiles} tiles" + ", vision frozen" * args.frozen + ", gradients consumed" * args.consumed
    if error > 10 * TOLERANCE[dtype]:
        return f"| {label} | gradients differ: {error:.1e} |"
    return row(f"{label}, {args.memory} memory", found, " MB", 2**-20) if args.memory else row(label, found, " s", 1.0)


def row(label: str, found: Seconds, unit: str, scale: float) -> str:
    cells = [label]
    for name, values in found.items():
        middle = scale * median(values)
        cells.append(f"{middle:,.0f}{unit}" if middle >= 100 else f"{middle:.3g}{unit}")
        if name == "patched":
            for other in found:
                if other != name:
                    ratios = sorted(a / b for a, b in zip(found[other], values))
                    cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
    return "| " + " | ".join(cells) + " |"


PARTS = {"prefill": prefill, "decode": decode, "training": training, "flash": flash}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1])
    parser.add_argument("--past", type=int, nargs="+", default=[320, 1344, 3392])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also the plain model under torch.compile")
    parser.add_argument("--memory", choices=["resident", "living"], help="bytes at their peak over the loaded model")
    parser.add_argument("--frozen", action="store_true", help="training: the vision transformer is frozen")
    parser.add_argument("--consumed", action="store_true", help="training: a gradient is freed as soon as it is there")
    args = parser.parse_args(argv)
    found = environment()
    print(
        ", ".join(f"{key} {found[key]}" for key in ("device", "threads", "torch", "transformers", "allocator")) + "\n"
    )
    others = " | compiled/patched |" if args.compile else " |"
    print(f"| {args.part} | plain | patched | plain/patched{others}{' compiled |' if args.compile else ''}")
    print("| --- " * (6 if args.compile else 4) + "|")
    for name in args.dtype:
        dtype = getattr(torch, name)
        model = build(dtype)
        for size in args.past if args.part == "decode" else args.tiles:
            print(PARTS[args.part](model, size, dtype, args))


if __name__ == "__main__":
    main()
