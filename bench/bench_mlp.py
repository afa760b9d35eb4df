"""MLPs of the vision and language models against their layers in torch.

IVL_CPU_ISA lowers ours and ONEDNN_MAX_CPU_ISA the BLAS's instructions; set both to see an older processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bench.runner import Case, Work, device
from ivl_kernels.ops import gated_mlp, mlp

# InternViT-300M's GELU MLP; SwiGLU of Qwen3-0.6B and Qwen3-8B. (gated, width, inner)
SHAPES = [(False, 1024, 4096), (True, 1024, 3072), (True, 4096, 12288)]
ROWS = {False: (1025, 5125, 13325), True: (320, 1344, 3392)}


def make(gated: bool, rows: int, width: int, inner: int, dtype: torch.dtype) -> Work:
    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device()) * shape[-1] ** -0.5).to(dtype)

    x, up, down = torch.randn(rows, width, device=device()).to(dtype), normal(inner, width), normal(width, inner)
    gate, bias, end = normal(inner, width), normal(inner), normal(width)

    def eager(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *biases: torch.Tensor) -> Any:
        if gated:
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return F.linear(F.gelu(F.linear(x, up, biases[0])), down, biases[1])

    def ours() -> torch.Tensor:
        return gated_mlp(x, gate, up, down) if gated else mlp(x, up, down, bias, end)

    tensors = (x, gate, up, down, bias, end)
    variants = {"ours": ours, "eager": lambda: eager(*tensors)}
    return Work(
        {name: torch.no_grad()(f) for name, f in variants.items()}, truth=lambda: eager(*(t.double() for t in tensors))
    )


def cases(quick: bool) -> Iterator[Case]:
    for gated, width, inner in SHAPES[: 2 if quick else 3]:
        for rows in ROWS[gated][: 1 if quick else 3]:
            for dtype in (torch.float32, torch.bfloat16):
                weights = (3 if gated else 2) * width * inner
                yield Case(
                    "mlp",
                    f"{'SwiGLU' if gated else 'GELU'} {rows} rows {width}-{inner} {str(dtype).removeprefix('torch.')}",
                    {"rows": rows, "width": width, "inner": inner, "gated": gated},
                    lambda v=(gated, rows, width, inner, dtype): make(*v),
                    bytes=dtype.itemsize * (2 * rows * width + weights),
                    flops=2 * rows * weights,
                    dtype=dtype,
                )
