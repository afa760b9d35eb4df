"""`ivl-kernels verify`: a model plain and patched on a photograph, layer by layer; exit code 1 when they differ."""

from __future__ import annotations

import argparse
import json

from . import subject as subjects


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    return subjects.guarded(_run, args)


def _run(args: argparse.Namespace) -> int:
    import torch

    from .. import imaging, verify

    device = subjects.checked_device(args.device)
    subject = subjects.subject_of(args)
    subject.model.to(device).eval()
    image = subjects.opened_image(args.image)
    tiling = imaging.tile_image(image, max_tiles=args.tiles, tile=subject.family.tile_pixels)
    inputs = subject.inputs(args.prompt, tiling.pixel_values(getattr(torch, args.dtype)), device)
    with subjects.quiet():
        report = verify(subject.model, inputs, max_new_tokens=args.tokens, rounds=args.rounds, **subject.same_results())
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)
    return 0 if report.passed else 1
