"""Norms after residual add and layer scale, as the vision and the language layers have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from bench.runner import Case, Work, backward, compiled, device
from ivl_kernels.ops import layer_norm, rms_norm


def make(kind: str, rows: int, width: int, dtype: torch.dtype, training: bool) -> Work:
    """`kind`: "layer norm" (with layer scale) or "rms norm", both after a residual add."""

    def rand(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, device=device()) * scale + shift).to(dtype).requires_grad_(training)

    args = [rand(rows, width), rand(rows, width), rand(width, scale=0.1, shift=1.0)]
    if kind == "layer norm":
        args += [rand(width, scale=0.1), rand(width, scale=0.1, shift=0.1)]
    grads = [torch.randn(rows, width, device=device()).to(dtype) for _ in range(2)]
    module = Qwen3RMSNorm(width).to(device(), dtype)

    def fused(x: Any, residual: Any, weight: Any, bias: Any = None, scale: Any = None) -> Any:
        if kind == "layer norm":
            return layer_norm(x, weight, bias, residual=residual, layer_scale=scale)
        return rms_norm(x, weight, residual=residual)

    def plain(x: Any, residual: Any, weight: Any, bias: Any = None, scale: Any = None) -> Any:
        s = residual + (x if scale is None else scale * x)
        if kind == "layer norm":
            return F.layer_norm(s, (width,), weight, bias, 1e-6), s
        return torch.func.functional_call(module, {"weight": weight}, s), s

    def exact(x: Any, residual: Any, weight: Any, bias: Any = None, scale: Any = None) -> Any:
        s = residual + (x if scale is None else scale * x)
        if kind == "layer norm":
            return F.layer_norm(s, (width,), weight, bias, 1e-6), s
        return weight * s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-6), s

    def run(function: Any, args: Any = args, grads: Any = grads) -> Any:
        out = function(*args)
        return backward(out, args, grads) if training else out

    def truth() -> Any:
        wide = [t.detach().double().requires_grad_(training) for t in args]
        return run(exact, wide, [g.double() for g in grads])

    fast = torch.compile(plain, dynamic=False)
    variants = {
        "ours": lambda: run(fused),
        "eager": lambda: run(plain),
        "compile": (lambda: run(fast)) if training else compiled(plain, *args),
    }
    return Work(variants, truth=truth)


def cases(quick: bool) -> Iterator[Case]:
    shapes = [("layer norm", 5 * 1025, 1024), ("rms norm", 1344, 1024)]
    if not quick:
        shapes += [("layer norm", 1025, 1024)]
        shapes += [("rms norm", 3392, 1024), ("rms norm", 1344, 4096), ("rms norm", 1, 1024)]
    for kind, rows, width in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for training in (False, True) if rows > 1 else (False,):
                name = str(dtype).removeprefix("torch.")
                passes = 4 if not training else 8 + (1 if kind == "layer norm" else 0)
                yield Case(
                    "norm", f"{'forward + backward ' if training else ''}{kind} {rows} x {width} {name}",
                    dict(kind=kind, rows=rows, width=width, dtype=name, training=training),
                    lambda v=(kind, rows, width, dtype, training): make(*v),
                    bytes=passes * rows * width * dtype.itemsize, dtype=dtype, seconds=2.0,
                )  # fmt: skip
