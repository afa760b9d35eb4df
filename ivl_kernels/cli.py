"""`ivl-kernels demo | train-demo | verify | doctor | bench | gpu-check`, also `python -m ivl_kernels`.

Each command lives in a module of its own with `add_arguments(parser)` and `run(args) -> int`; only the one that was
asked for is imported. A command raises `CommandError` for what the user can put right: one line, exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .commands import CommandError

COMMANDS = {
    "demo": ("commands.demo", "run a model on a photograph, plain and patched, and compare"),
    "verify": ("commands.verify", "compare a model plain and patched, layer by layer, and time both"),
    "doctor": ("doctor", "what is installed, built and found, and which backend serves each op"),
    "train-demo": ("commands.train_demo", "train a small model five ways, plain and with this package, and compare"),
    "bench": ("commands.bench", "time the ops against eager, torch.compile and peers"),
    "gpu-check": ("commands.gpu_check", "prove every op on this machine's GPU and print the honest table"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("ivl-kernels", description="Fused kernels for InternVL3 and InternVL3.5.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if name == wanted:
            loaded = importlib.import_module(f".{module}", __package__)
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    if wanted == "bench":  # the runner of bench/ parses its own options
        args, rest = parser.parse_known_args(arguments)
        args.rest = rest
    else:
        args = parser.parse_args(arguments)
    if args.version:
        from . import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return int(args.run(args) or 0)
    except CommandError as error:
        print(f"ivl-kernels {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
