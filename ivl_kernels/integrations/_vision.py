"""What the adapters of the two InternVL families share: the deferred pixel shuffle, the projector, the placement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..models.plain import not_plain


class DeferredShuffle:
    """Stands for the shuffled tiles between upstream's pixel shuffle and its projector, which then does both at once.

    x: [T, h, w, C] patch tokens; order: of the result's tokens, "v1" or "v2". Anything but the reshape that upstream
    does in between makes it a real tensor.
    """

    def __init__(
        self, x: torch.Tensor, scale_factor: float, shuffle: Callable[..., torch.Tensor], order: str = "v2"
    ) -> None:
        tiles, height, width, channels = x.shape
        self.x, self.scale_factor, self.order, self._shuffle = x, scale_factor, order, shuffle
        self.shape = (
            tiles,
            int(height * scale_factor),
            int(width * scale_factor),
            int(channels / (scale_factor * scale_factor)),
        )

    def reshape(self, *sizes: int) -> Any:
        tiles, rows, columns, width = self.shape
        if sizes in ((tiles, -1, width), (tiles, rows * columns, width)):
            return self
        return self.tensor().reshape(*sizes)

    def tensor(self) -> torch.Tensor:
        return self._shuffle(self.x, scale_factor=self.scale_factor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def project(self, norm: nn.LayerNorm, linears: Sequence[nn.Linear], backend: str) -> torch.Tensor:
        """[T, h * w * scale_factor ** 2, H]"""
        tiles, height, width, channels = self.x.shape
        return ops.pixel_shuffle_mlp(
            self.x.reshape(tiles, height * width, channels),
            norm.weight,
            norm.bias,
            [linear.weight for linear in linears],
            [linear.bias for linear in linears],
            merge=round(1 / self.scale_factor),
            grid=(height, width),
            order=self.order,
            eps=norm.eps,
            backend=backend,
        )


class DeferredMask:
    """Stands for upstream's placeholder mask until `masked_scatter` takes it; for anything else it becomes the mask."""

    def __init__(
        self, mask: Callable[[], torch.Tensor], write: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        self._mask, self._write = mask, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mask(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.masked_scatter and len(args) == 3 and isinstance(args[1], cls):
            return args[1]._write(args[0], args[2])
        real = [a._mask() if isinstance(a, cls) else a for a in args]
        return func(*real, **{k: a._mask() if isinstance(a, cls) else a for k, a in kwargs.items()})


def projector_problem(container: nn.Module, layers: Sequence[tuple[str, type[nn.Module]]], width: int) -> str:
    """Why a LayerNorm, Linear, GELU, Linear, ... projector cannot be served by reading its parameters, or "".

    layers: the names of the layers in `container` and their classes, activations included; width: of the input.
    """
    if container._backward_hooks or container._backward_pre_hooks:
        return "the projector has backward hooks"
    for name, kind in layers:
        layer = getattr(container, name) if not name.isdigit() else container[int(name)]  # type: ignore[index]
        if kind is nn.GELU:
            # transformers wraps the exact GELU in a class of its own.
            wrapped = type(layer).__name__ == "GELUActivation" and layer.act is nn.functional.gelu
            if not wrapped and not (type(layer) is nn.GELU and layer.approximate == "none"):
                return f"{name} is {layer}, not the exact GELU"
            if layer._forward_hooks or layer._forward_pre_hooks:
                return f"{name} has hooks"
            continue
        problem = not_plain(layer, kind, name)
        if problem:
            return problem
        if isinstance(layer, nn.LayerNorm) and (layer.weight is None or layer.bias is None):
            return f"{name} has no weight or bias"
        if isinstance(layer, nn.LayerNorm) and layer.normalized_shape != (width,):
            return f"{name} normalises {layer.normalized_shape}, expected ({width},)"
        if isinstance(layer, nn.Linear) and layer.bias is None:
            return f"{name} has no bias"
    return ""


def place(
    embedding: nn.Module, embeds: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, token: int, backend: str
) -> torch.Tensor:
    """The visual rows in `embeds` [B, N, H], the output of `embedding`: in place where nobody can see it."""
    unseen = type(embedding) is nn.Embedding and not embedding._forward_hooks
    inplace = unseen and not embeds.requires_grad and not embeds.is_inference()
    return ops.place_rows(embeds, ids.long(), rows, token, inplace=inplace, backend=backend)
