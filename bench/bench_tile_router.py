"""The tile router against the shipped one: eager, under torch.compile, and folded in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch

from bench.measure import Case, Work, compiled, device
from ivl_kernels.nn import TileRouter
from ivl_kernels.testing.cases import tile_router as cost
from ivl_kernels.testing.shipped import ShippedRouter

TOKENS = 1024


def routers(width: int, dtype: torch.dtype) -> tuple[ShippedRouter, TileRouter, TileRouter]:
    """The shipped one, ours, and ours in plain torch, over the same parameters.

    These require gradients, as those of a loaded model do: if not, torch multiplies the shipped router's keys (not
    contiguous) token by token, three times slower.
    """
    torch.manual_seed(0)
    shipped = ShippedRouter(width).eval().to(device(), dtype)
    modules = shipped.pooling_before_gating, shipped.gating
    return shipped, TileRouter.from_modules(*modules), TileRouter.from_modules(*modules, backend="reference")


def make(width: int, tiles: int, dtype: torch.dtype) -> Work:
    shipped, router, plain = routers(width, dtype)
    vit = torch.randn(tiles, TOKENS + 1, width, device=device()).to(dtype)

    def truth() -> torch.Tensor:
        # In float64 folding changes nothing; the wide router is too slow to run as shipped.
        exact = copy.deepcopy(shipped if width <= 1024 else plain).double()
        return exact(vit.double(), skip=1)

    variants: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: router(vit, skip=1),
        "eager": lambda: shipped(vit),
        "compile": compiled(shipped, vit),
        "folded torch": lambda: plain(vit, skip=1),
    }
    return Work({name: torch.no_grad()(f) for name, f in variants.items()}, truth=torch.no_grad()(truth))


def make_training(width: int, tiles: int, dtype: torch.dtype) -> Work:
    """Gradients of the router's parameters, from the tokens of a frozen vision transformer."""
    shipped, router, plain = routers(width, dtype)
    vit = torch.randn(tiles, TOKENS + 1, width, device=device()).to(dtype)
    grad = torch.randn(tiles, 2, device=device()).to(dtype)

    def gradients(module: torch.nn.Module, scale: torch.Tensor = grad) -> list[torch.Tensor]:
        module(vit.to(scale.dtype), skip=1).backward(scale)  # the shipped checkpointing refuses torch.autograd.grad
        found = [p.grad for p in module.parameters() if p.grad is not None]
        module.zero_grad()
        return found

    return Work(
        {
            "ours": lambda: gradients(router),
            "eager": lambda: gradients(shipped),
            "folded torch": lambda: gradients(plain),
        },
        truth=lambda: gradients(copy.deepcopy(shipped).double(), grad.double()),
    )


def cases(quick: bool) -> Iterator[Case]:
    shapes = [(1024, 5, torch.float32, False), (1024, 13, torch.float32, False)]
    if not quick:
        shapes += [(1024, 1, torch.float32, False), (1024, 5, torch.bfloat16, False), (1024, 13, torch.bfloat16, False)]
        shapes += [(1024, 5, torch.float32, True), (3200, 5, torch.float32, False)]
    for width, tiles, dtype, training in shapes:
        forward, backward = cost.least(tiles, TOKENS, width, dtype.itemsize)
        backward -= dtype.itemsize * tiles * TOKENS * width  # the tokens get no gradient
        yield Case(
            "tile_router",
            f"{'forward + backward ' if training else ''}C={width} tiles={tiles} {str(dtype).removeprefix('torch.')}",
            {"width": width, "tiles": tiles, "training": training},
            lambda v=(width, tiles, dtype, training): (make_training if v[3] else make)(*v[:3]),
            bytes=forward + (backward if training else 0),
            flops=cost.flops(tiles, TOKENS, width) * (3 if training else 1),
            dtype=torch.float32,
            seconds=25.0,
        )
