"""The projector against plain torch, torch.compile, and its GEMMs alone in warm buffers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.runner import Case, Work, backward, compiled, device
from ivl_kernels.ops import pixel_shuffle_mlp
from ivl_kernels.testing import MODELS

SIDE = 32


def plain(x, norm_weight, norm_bias, weights, biases, merge):
    """CLS dropped, pixel shuffle as transformers does it, then the projector's modules."""
    tiles, _, channels = x.shape
    y = x[:, 1:].reshape(tiles, SIDE, SIDE, channels)
    y = y.view(tiles, SIDE, SIDE // merge, channels * merge).permute(0, 2, 1, 3).contiguous()
    y = y.view(tiles, SIDE // merge, SIDE // merge, channels * merge**2).permute(0, 2, 1, 3).contiguous()
    y = F.layer_norm(y.view(tiles, -1, channels * merge**2), norm_weight.shape, norm_weight, norm_bias)
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        y = F.linear(F.gelu(y) if i else y, weight, bias)
    return y


def inputs(model: str, merge: int, tiles: int, dtype: torch.dtype, grad: bool = False) -> list:
    shape = MODELS[model]
    widths = shape.projector(merge)

    def rand(*size: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(size, device=device()) * scale + shift).to(dtype).requires_grad_(grad)

    weights = [rand(b, a, scale=a**-0.5) for a, b in zip(widths, widths[1:])]
    norm = rand(widths[0], scale=0.1, shift=1.0), rand(widths[0], scale=0.1)
    return [rand(tiles, 1 + SIDE * SIDE, shape.vision), *norm, weights, [rand(b, scale=0.1) for b in widths[1:]]]


def flat(args: list) -> list[torch.Tensor]:
    return [*args[:3], *args[3], *args[4]]


def wide(args: list) -> list:
    return [[t.detach().double() for t in a] if isinstance(a, list) else a.detach().double() for a in args]


def make(model: str, merge: int, tiles: int, dtype: torch.dtype) -> Work:
    args = inputs(model, merge, tiles, dtype)
    rows, weights = tiles * (SIDE // merge) ** 2, args[3]
    buffers = [torch.randn(rows, weights[0].shape[1], device=device()).to(dtype)]
    buffers += [torch.zeros(rows, w.shape[0], device=device(), dtype=dtype) for w in weights]

    def products() -> torch.Tensor:
        for before, weight, after in zip(buffers, weights, buffers[1:]):
            torch.mm(before, weight.t(), out=after)
        return buffers[-1]

    return Work(
        {
            "ours": lambda: pixel_shuffle_mlp(*args, merge=merge, skip=1),
            "eager": lambda: plain(*args, merge),
            "compile": compiled(plain, *args, merge),
            "gemms": products,
        },
        truth=lambda: plain(*wide(args), merge),
        unchecked=("gemms",),
    )


def make_training(model: str, merge: int, tiles: int, dtype: torch.dtype) -> Work:
    args = inputs(model, merge, tiles, dtype, grad=True)
    upstream = torch.randn(tiles, (SIDE // merge) ** 2, MODELS[model].hidden, device=device()).to(dtype)

    def truth() -> tuple[torch.Tensor, ...]:
        exact = [[t.requires_grad_() for t in a] if isinstance(a, list) else a.requires_grad_() for a in wide(args)]
        return backward(plain(*exact, merge), flat(exact), upstream.double())

    return Work(
        {
            "ours": lambda: backward(pixel_shuffle_mlp(*args, merge=merge, skip=1), flat(args), upstream),
            "eager": lambda: backward(plain(*args, merge), flat(args), upstream),
        },
        truth=truth,
    )


def cases(quick: bool) -> Iterator[Case]:
    runs = [("InternVL3.5-1B", 2, 5)] if quick else []
    if not quick:
        runs = [("InternVL3.5-1B", merge, tiles) for merge in (2, 4) for tiles in (1, 5, 13)]
        runs += [("InternVL3.5-8B", merge, tiles) for merge in (2, 4) for tiles in (1, 5)]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for model, merge, tiles in runs:
            widths = MODELS[model].projector(merge)
            rows, size = tiles * (SIDE // merge) ** 2, torch.tensor([], dtype=dtype).element_size()
            weights = sum(a * b for a, b in zip(widths, widths[1:]))
            label = f"{model} 1/{merge**2} tiles={tiles} {name}"
            params = {"model": model, "merge": merge, "tiles": tiles, "dtype": name}
            values = (model, merge, tiles, dtype)
            least = (rows * (widths[0] + widths[-1]) + weights) * size
            yield Case(
                "pixel_shuffle_mlp", label, params, lambda v=values: make(*v), bytes=least, flops=2 * rows * weights,
                dtype=dtype,
            )  # fmt: skip
            if model == "InternVL3.5-1B" and tiles < 13:
                yield Case(
                    "pixel_shuffle_mlp", f"forward + backward {label}", params | {"training": True},
                    lambda v=values: make_training(*v), bytes=3 * least, flops=6 * rows * weights, dtype=dtype,
                )  # fmt: skip
