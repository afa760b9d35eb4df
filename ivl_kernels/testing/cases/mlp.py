"""MLPs of the vision and language models; the eager form is their layers in torch.

IVL_CPU_ISA lowers ours and ONEDNN_MAX_CPU_ISA the BLAS's instructions; set both to see an older processor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as functional

from ... import ops
from . import Case, Cost, Numbers, Timed
from ._case import Inputs, dtype_name

# InternViT-300M's GELU MLP; SwiGLU of Qwen3-0.6B and Qwen3-8B. (gated, width, inner)
SHAPES = [(False, 1024, 4096), (True, 1024, 3072), (True, 4096, 12288)]
ROWS = {False: (1025, 5125, 13325), True: (320, 1344, 3392)}


def case(gated: bool, rows: int, width: int, inner: int, outputs: int) -> Case:
    def make(n: Numbers) -> Inputs:
        (up, up_bias), (down, down_bias) = n.linear(inner, width), n.linear(outputs, inner)
        more = {"gate": n.linear(inner, width)[0]} if gated else {"up_bias": up_bias, "down_bias": down_bias}
        return {"x": n.normal(rows, width), "up": up, "down": down, **more}

    def plain(v: Inputs) -> torch.Tensor:
        up = functional.linear(v["x"], v["up"], v.get("up_bias"))
        active = functional.silu(functional.linear(v["x"], v["gate"])) * up if gated else functional.gelu(up)
        return functional.linear(active, v["down"], v.get("down_bias"))

    def cost(v: Inputs) -> tuple[Cost, Cost]:
        size, products = v["x"].itemsize, inner * (width * (2 if gated else 1) + outputs)
        weights = products + (0 if gated else inner + outputs)
        pre = rows * inner * (2 if gated else 1)
        return (
            Cost(size * (rows * (width + outputs) + weights), 2 * rows * products, rows * inner),
            Cost(size * (rows * (2 * width + outputs) + 2 * weights + pre), 4 * rows * products, rows * inner),
        )

    names = ("x", "gate", "up", "down") if gated else ("x", "up", "down", "up_bias", "down_bias")
    return Case(
        "mlp",
        f"{'SwiGLU' if gated else 'GELU'}, {rows} rows, {width} to {inner} to {outputs}",
        make,
        lambda v, backend: (ops.gated_mlp if gated else ops.mlp)(**v, backend=backend),
        names,
        plain,
        cost,
    )


def cases(large: bool) -> Iterator[Case]:
    for gated in (False, True):
        yield case(gated, 1025, 1024, 4096, 1024) if large else case(gated, 70, 48, 33, 20)


def timed(quick: bool) -> Iterator[Timed]:
    for gated, width, inner in SHAPES[: 2 if quick else 3]:
        for rows in ROWS[gated][: 1 if quick else 3]:
            for dtype in (torch.float32, torch.bfloat16):
                yield Timed(
                    "mlp",
                    f"{'SwiGLU' if gated else 'GELU'} {rows} rows {width}-{inner} {dtype_name(dtype)}",
                    case(gated, rows, width, inner, width),
                    dtype,
                    {"rows": rows, "width": width, "inner": inner, "gated": gated},
                    compile=False,
                )
