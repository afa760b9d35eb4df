"""Linear layers of the vision and language models; the eager form is the BLAS.

IVL_CPU_ISA lowers ours and ONEDNN_MAX_CPU_ISA the BLAS's instructions; set both to see an older processor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as functional

from ... import ops
from . import Case, Cost, Numbers, Timed
from ._case import Inputs, dtype_name

# (K, N): q or o of InternViT-300M and Qwen3-0.6B, fc1, fc2, a gated MLP, Qwen3-8B's o, InternViT-6B's o, fc1 and fc2.
SHAPES = [(1024, 1024), (1024, 4096), (4096, 1024), (1024, 3072)]
SHAPES += [(4096, 4096), (3200, 3200), (3200, 12800), (12800, 3200)]
ROWS = (1025, 5125, 13325)  # patches and class token of 1, 5 and 13 tiles
FEW = (1, 4, 16, 64)


def case(rows: int, inputs: int, outputs: int) -> Case:
    def make(n: Numbers) -> Inputs:
        weight, bias = n.linear(outputs, inputs)
        return {"x": n.normal(rows, inputs), "weight": weight, "bias": bias}

    def cost(v: Inputs) -> tuple[Cost, Cost]:
        size, flops = v["x"].itemsize, 2 * rows * inputs * outputs
        weights = (inputs + 1) * outputs
        return (
            Cost(size * (rows * (inputs + outputs) + weights), flops, rows * outputs),
            Cost(size * (rows * (2 * inputs + outputs) + 2 * weights), 2 * flops, rows * inputs),
        )

    return Case(
        "linear",
        f"{rows} rows of {inputs} to {outputs}",
        make,
        lambda v, backend: ops.linear(**v, backend=backend),
        ("x", "weight", "bias"),
        lambda v: functional.linear(**v),
        cost,
    )


def cases(large: bool) -> Iterator[Case]:
    yield case(1025, 1024, 4096) if large else case(70, 48, 33)


def timed(quick: bool) -> Iterator[Timed]:
    shapes = [(r, *s) for s in SHAPES for r in ROWS + FEW if r * s[0] * s[1] <= 2**37]
    for rows, inputs, outputs in [(1025, 1024, 4096), (4, 4096, 4096)] if quick else shapes:
        for dtype in (torch.float32, torch.bfloat16):
            yield Timed(
                "linear",
                f"{rows} rows K={inputs} N={outputs} {dtype_name(dtype)}",
                case(rows, inputs, outputs),
                dtype,
                {"rows": rows, "inputs": inputs, "outputs": outputs},
                compile=False,
            )
