"""`ivl-kernels train-demo`: five ways of training a small InternVL3.5-Flash, plain torch against this package."""

from __future__ import annotations

import argparse
import ctypes
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from . import CommandError
from .subject import guarded, opened_image

PHASES = ("next token", "MPO", "ViCO 1", "ViCO 2", "GSPO")
STEPS = {"next token": 20, "MPO": 10, "ViCO 1": 10, "ViCO 2": 8, "GSPO": 8}
# Largest difference of two losses, over the size of the largest: float32 sums in another order, through some steps.
TOLERANCE = 2e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--image", metavar="PATH", help="JPEG, PNG, ...; default: the photograph that ships with the package")
    add("--out", default="out", metavar="DIR", help="where pictures, numbers and the checkpoint go (default out)")
    add("--scale", type=float, default=1.0, metavar="X", help="of the numbers of steps (default 1)")
    add("--until", choices=PHASES, default=PHASES[-1], help="stop after this one; --resume goes on")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.set_defaults(tiles=1, tokens=1, rounds=0)


def run(args: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CommandError("matplotlib is not installed; pip install 'ivl-kernels[bench]'") from None
    if args.scale <= 0:
        raise CommandError(f"--scale: got {args.scale}, expected more than 0")
    return guarded(_run, args)


class Memory:
    """Growth of the process's memory within a `with` block: `peak` in bytes; 0 where the system does not say."""

    def __enter__(self) -> Memory:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what is taken now
        self._start = self._most = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._most = max(self._most, _resident())

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = self._most - self._start


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


def _run(args: argparse.Namespace) -> int:
    import torch

    from . import training

    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out {args.out}: {error.strerror}") from None
    began = time.perf_counter()
    model, tokenizer = training.small_model()
    scenes = training.Scenes(opened_image(args.image), tokenizer, model.config.image_seq_length, 200)
    history, start = _resumed(out / "train.pt", model) if args.resume else ({}, None)
    steps = {name: max(1, round(count * args.scale)) for name, count in STEPS.items()}
    for name in PHASES:
        if name in history:
            continue
        torch.manual_seed(PHASES.index(name))
        if name == "ViCO 1":
            start = {key: value.clone() for key, value in model.state_dict().items()}
        phase = _phase(training, name, model, tokenizer, scenes, steps[name], start)
        history[name] = _trained(phase, model)
        torch.save({"model": model.state_dict(), "history": history, "start": start}, out / "train.pt")
        if name == args.until:
            break
    failed = _report(history)
    (out / "train.json").write_text(json.dumps(history, indent=1))
    _draw(history, out / "train.png")
    print(f"\nwrote {out / 'train.png'}, {out / 'train.json'} and {out / 'train.pt'} (--resume goes on from it)")
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, vocabulary {training.VOCABULARY}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads, {time.perf_counter() - began:.0f} s in all")
    return 1 if failed else 0


def _resumed(path: Path, model: Any) -> tuple[dict[str, Any], Any]:
    import torch

    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
    except FileNotFoundError:
        raise CommandError(f"--resume: no checkpoint {path}") from None
    except (KeyError, RuntimeError) as error:
        raise CommandError(f"--resume: {path} is no checkpoint of this demo ({str(error).splitlines()[0]})") from None
    return state["history"], state["start"]


def _phase(training: Any, name: str, model: Any, tokenizer: Any, scenes: Any, steps: int, start: Any) -> Any:
    if name == "next token":
        return training.next_token(model, scenes, steps)
    if name == "MPO":
        return training.mpo(model, scenes, steps)
    if name == "ViCO 1":
        return training.consistency(model, scenes, steps)
    if name == "ViCO 2":
        return training.router(model, scenes, steps, start)
    return training.gspo(model, tokenizer, scenes, steps)


@contextmanager
def _patched(models: list[Any]) -> Iterator[None]:
    from .. import patched
    from ..integrations._patch import features

    others = {name: False for name, feature in features().items() if not feature.option}
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(patched(model, **{**others, "loss": "square", "packed": True}))
        yield


def _trained(phase: Any, model: Any) -> dict[str, Any]:
    """Both writings from the same weights; the model keeps those of the package's."""
    import torch
    from tqdm import tqdm

    entry = {key: value.clone() for key, value in model.state_dict().items()}
    result: dict[str, Any] = {}
    for kind in ("plain", "fused"):
        model.load_state_dict(entry)
        optimizer = torch.optim.AdamW(model.parameters(), lr=phase.rate, weight_decay=0.0, fused=True)
        phase.fresh()
        losses, seconds, memory = [], [], []
        with ExitStack() as stack:
            if kind == "fused":
                stack.enter_context(_patched(phase.models))
            for batch in tqdm(phase.batches, f"{phase.name}, {kind}", leave=False):
                optimizer.zero_grad()
                clock = time.perf_counter()
                with Memory() as taken:
                    loss = phase.loss(batch, kind == "fused")
                    loss.backward()
                seconds.append(time.perf_counter() - clock)
                memory.append(taken.peak)
                losses.append(float(loss.detach()))
                optimizer.step()
        result[kind] = {"loss": losses, "seconds": seconds, "memory": memory}
    return result


def _difference(phase: dict[str, Any]) -> float:
    plain, fused = phase["plain"]["loss"], phase["fused"]["loss"]
    return max(abs(a - b) for a, b in zip(plain, fused)) / max(1.0, *map(abs, plain))


def _report(history: dict[str, Any]) -> list[str]:
    print(f"{'':<12}{'loss, first to last':>22}{'plain = fused to':>18}{'time':>8}{'memory of a step':>26}")
    failed = []
    for name, phase in history.items():
        plain, fused = phase["plain"], phase["fused"]
        away = _difference(phase)
        ratio = median(fused["seconds"]) / median(plain["seconds"])
        most = [max(kind["memory"]) / 1e6 for kind in (plain, fused)]
        curve = f"{fused['loss'][0]:.3f} to {fused['loss'][-1]:.3f}"
        print(f"{name:<12}{curve:>22}{away:>18.1e}{ratio:>7.2f}x{f'{most[0]:.0f} MB -> {most[1]:.0f} MB':>26}")
        if not away <= TOLERANCE:
            failed.append(name)
            print(f"  the two losses of {name} are not the same: more than {TOLERANCE:g} apart")
    return failed


def _draw(history: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    *curves, bars = axes.flat
    for axis, (name, phase) in zip(curves, history.items()):
        axis.plot(phase["plain"]["loss"], color="#c2410c", linewidth=6, alpha=0.35, label="plain torch, logits")
        axis.plot(phase["fused"]["loss"], color="#15803d", linewidth=1.6, marker=".", label="ivl_kernels, no logits")
        axis.set(title=f"{name} (the same to {_difference(phase):.0e})", xlabel="step", ylabel="loss")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    curves[0].legend()
    for axis in curves[len(history) :]:
        axis.axis("off")
    places = range(len(history))
    for kind, shift, color in (("plain", -0.2, "#c2410c"), ("fused", 0.2, "#15803d")):
        most = [max(phase[kind]["memory"]) / 1e6 for phase in history.values()]
        drawn = bars.bar([place + shift for place in places], most, 0.38, color=color, alpha=0.75)
        bars.bar_label(drawn, fmt="%.0f", fontsize=8)
    bars.set_xticks(list(places), list(history))
    bars.set(title="memory of a step", ylabel="MB, forward and backward")
    figure.suptitle("A small random InternVL3.5-Flash on parts of one photograph")
    figure.savefig(path, dpi=110)
    plt.close(figure)
