"""What the compiled GPU kernels cost, without a GPU: `python -m bench.inspect` (or `make inspect`).

Two views of every kernel that an op launches, forward and backward:

* counters of the PTX simulator at scaled-down shapes (widths of a model, few tokens): bytes requested, sectors,
  distinct bytes against the least possible, instructions an element, tensor-core FLOPs, bank conflicts. The same for
  Liger-Kernel's kernels, and for transformers' eager chain the PyTorch kernels with the bytes of their shapes.
* machine code for each target at the catalogue's shapes: registers, spills, shared memory, occupancy, access widths.

And the roofline time of the op at those shapes on known GPUs. Results merge into the JSON of earlier runs, so it can be
run op by op. `--check` compares with the committed baseline.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from .counters import counted_rows
from .machine import TARGETS, machine_rows
from .subjects import DTYPES, SUBJECTS, asked_shape, real_shapes
from .tables import BASELINE, KEYS, ROOT, Tables, check, markdown, merge, over_the_limits, roofline_row, write


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.inspect", description="What the compiled GPU kernels cost, without a GPU.")
    parser.add_argument("--op", action="append", default=[], help=f"first word of: {', '.join(SUBJECTS)}")
    parser.add_argument("--arch", action="append", default=[], help=f"of {', '.join(map(str, TARGETS))}; default all")
    parser.add_argument("--shape", action="append", default=[], help=" ".join((asked_shape.__doc__ or "").split()))
    parser.add_argument("--dtype", action="append", default=[], choices=list(DTYPES), help="default both")
    parser.add_argument("--only", choices=("counters", "machine"), help="one of the two views")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at work at once")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "inspect", help="folder of the reports")
    parser.add_argument("--check", action="store_true", help="exit 1 if worse than the committed baseline")
    parser.add_argument("--margin", type=float, default=0.05, help="what --check tolerates, as a share")
    parser.add_argument("--update", action="store_true", help="merge into the committed baseline instead of --out")
    args = parser.parse_args(argv)
    targets = [int(a) if a.isdigit() else a for a in args.arch] or TARGETS
    asked = [asked_shape(text) for text in args.shape]
    tables: Tables = {table: [] for table in KEYS}
    for name, subject in SUBJECTS.items():
        if args.op and name.split()[0] not in args.op:
            continue
        for dtype in args.dtype or DTYPES:
            if dtype not in subject.dtypes:
                continue
            fitting = [shape for shape in asked if all(getattr(shape.model, field) for field in subject.varies)]
            for shape in () if args.only == "machine" else fitting if asked else subject.small:
                print(f"{name}, {shape.name}, {dtype}", flush=True)
                tables["counters"] += counted_rows(name, shape, dtype)
            if args.only == "counters":
                continue
            print(f"{name}, {dtype}: machine code", flush=True)
            real = list(real_shapes(name, args.shape))
            tables["machine"] += machine_rows(name, dtype, real, targets, args.jobs)
            if dtype == "bf16":
                tables["roofline"] += [roofline_row(name, shape) for shape, _ in real]
    worse = check(tables, json.loads(BASELINE.read_text()), args.margin) if args.check else []
    folder = BASELINE.parent if args.update else args.out
    if (folder / "inspect.json").exists():
        write(merge(json.loads((folder / "inspect.json").read_text()), tables), folder)
    else:
        write(merge({}, tables), folder)
    print(markdown(tables))
    for over in over_the_limits(tables["counters"]):
        print("OVER:", *over)
    for line in worse:
        print(f"WORSE: {line}")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
