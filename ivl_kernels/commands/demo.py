"""`ivl-kernels demo`: a photograph through an InternVL model, plain and patched, with proof that nothing changed."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from . import CommandError
from . import subject as subjects
from .subject import Subject, checked_device, guarded, opened_image, quiet, subject_of

if TYPE_CHECKING:
    from ..integrations import VerifyReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects.add_arguments(parser)
    add = parser.add_argument
    add("--flash", action="store_true", help="route the tiles as InternVL3.5-Flash does, and draw the routing")
    add("--compare", choices=["compile"], help="also time the plain model under torch.compile, which takes minutes")
    add("--out", default="out", metavar="DIR", help="where the pictures and the report go (default out)")


def run(args: argparse.Namespace) -> int:
    return guarded(_run, args)


def _run(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from .. import imaging, verify
    from ..integrations._patch import PatchWarning
    from . import _compiled, _stage_chart

    warnings.filterwarnings("ignore", message=".*(ps_version|deprecated).*")
    warnings.simplefilter("ignore", PatchWarning)  # the report says what is not there
    device = checked_device(args.device)
    dtype = getattr(torch, args.dtype)
    image = opened_image(args.image)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out {args.out}: {error.strerror}") from None

    steps = 9 + bool(args.compare) + 2 * args.rounds
    bar = tqdm(total=steps, bar_format="{desc:<28} {bar} {n_fmt}/{total_fmt} {elapsed}", leave=False)

    def step(text: str) -> None:
        bar.set_description_str(text)
        bar.update(bar.n < bar.total)

    with bar:
        step("loading the model" if args.model else "building a random model")
        subject = subject_of(args)
        subject.model.to(device).eval()
        tiling = imaging.tile_image(image, max_tiles=args.tiles, tile=subject.family.tile_pixels)
        inputs = subject.inputs(args.prompt, tiling.pixel_values(dtype), device)
        own = not subject.same_results()  # its own code routes
        if args.flash and own and not subject.flash:
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
        compiled: dict[str, float] = {}
        if args.compare and report.stages:
            step("torch.compile of the plain model")
            with quiet():
                compiled = _compiled.stages(subject.model, inputs, args.tokens, args.rounds, device)
        routed = None
        if args.flash or (own and subject.flash):
            step("routing the tiles")
            routed = _flash_run(subject, inputs, args.tokens, device)
    bar.close()

    count = len(tiling)
    print(f"{args.image or 'the photograph that ships with the package'}: {image.width} x {image.height} pixels,")
    print(f"  {tiling.columns} x {tiling.rows} tiles{' and a thumbnail' if tiling.thumbnail else ''}, ", end="")
    print(f"{count * subject.family.tokens_a_tile} visual tokens of {inputs['input_ids'].shape[1]}")
    print(f"{subject.name}, {args.dtype} on {device}\n")
    print(f"Q: {args.prompt}")
    for label, tokens in (("plain:  ", report.plain_tokens), ("patched:", report.patched_tokens)):
        print(f"A, {label} {subject.text(tokens, args.tokens)!r}")
    if not args.model:
        print("(The weights are random, so the words mean nothing. Pass --model for a trained model.)")
    print(f"\n{report}\n")
    if compiled:
        print(_compiled.table(report, compiled) + "\n")
    drawing: dict[str, Any] = {}
    if routed is not None:
        drawing = {"compressed": routed["compressed"], "scores": routed["scores"]}
        print(_flash_text(routed))
    written = [out / "tiles.png", out / "demo.json"]
    imaging.draw_tiles(tiling, **drawing).save(written[0])
    written[1].write_text(json.dumps({**report.to_dict(), "compiled": compiled or None, "flash": routed}, indent=1))
    if report.stages and _stage_chart.drawn(report.stages, compiled, subject.name, out / "stages.png"):
        written.append(out / "stages.png")
    print(f"wrote {', '.join(map(str, written))}")
    if report.stages:
        print(_summary(subject.name, report, compiled))
    return 0 if report.passed else 1


def _summary(name: str, report: VerifyReport, compiled: dict[str, float]) -> str:
    import torch

    whole = report.stages[-1]
    plain, ours = (median(times) for times in (whole.plain, whole.patched))
    third = f" (plain under torch.compile {compiled[whole.name]:.2f} s)" if compiled else ""
    return (
        f"\nIn all, {name} on this machine, {torch.get_num_threads()} threads: plain {plain:.2f} s, "
        f"patched {ours:.2f} s, {whole.ratio:.2f}x{third}"
    )


def _flash_run(subject: Subject, inputs: dict[str, Any], tokens: int, device: str) -> dict[str, Any]:
    """One generation at 256 tokens a tile and one routed, both patched; what was routed and what it saved."""
    import torch

    from .. import patched

    if not subject.flash:
        raise CommandError("--flash: this model has no Flash modules; attach an nn.FlashVision to it")
    options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    lengths: list[int] = []

    def generate() -> tuple[Any, float]:
        with torch.no_grad(), _prefill_length(subject.family.language, lengths):
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


@contextmanager
def _flash_mode(subject: Subject, on: bool) -> Iterator[None]:
    holder = subject.family.flash_settings
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
