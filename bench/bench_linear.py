"""Linear layers of the vision and language models against the BLAS (`torch.nn.functional.linear`).

IVL_CPU_ISA lowers ours and ONEDNN_MAX_CPU_ISA the BLAS's instructions; set both to see an older processor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.runner import Case, Work, device
from ivl_kernels.ops import linear

# (K, N): q or o of InternViT-300M and Qwen3-0.6B, fc1, fc2, a gated MLP, Qwen3-8B's o, InternViT-6B's o, fc1 and fc2.
SHAPES = [(1024, 1024), (1024, 4096), (4096, 1024), (1024, 3072)]
SHAPES += [(4096, 4096), (3200, 3200), (3200, 12800), (12800, 3200)]
ROWS = [1025, 5125, 13325]  # patches and class token of 1, 5 and 13 tiles
FEW = [1, 4, 16, 64]


@torch.no_grad()
def make(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Work:
    x = torch.randn(rows, inputs, device=device(), dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device(), dtype=dtype) / inputs**0.5
    bias = torch.randn(outputs, device=device(), dtype=dtype)
    variants = {"ours": lambda: linear(x, weight, bias), "eager": lambda: F.linear(x, weight, bias)}
    return Work(
        {name: torch.no_grad()(f) for name, f in variants.items()},
        truth=lambda: F.linear(x.double(), weight.double(), bias.double()),
    )


def cases(quick: bool) -> Iterator[Case]:
    shapes = [(r, *s) for s in SHAPES for r in ROWS + FEW if r * s[0] * s[1] <= 2**37]
    if quick:
        shapes = [(1025, 1024, 4096), (4, 4096, 4096)]
    for rows, inputs, outputs in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(
                "linear",
                f"{rows} rows K={inputs} N={outputs} {str(dtype).removeprefix('torch.')}",
                {"rows": rows, "inputs": inputs, "outputs": outputs},
                lambda v=(rows, inputs, outputs, dtype): make(*v),
                bytes=dtype.itemsize * (rows * (inputs + outputs) + inputs * outputs),
                flops=2 * rows * inputs * outputs,
                dtype=dtype,
            )
