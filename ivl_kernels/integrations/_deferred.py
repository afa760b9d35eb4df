"""What stands in upstream's bodies for work that one op does later: the shuffled tiles, the mask, the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import ops
from ..models.plain import LinearStack
from ..models.upstream import Deferred, made


@dataclass(eq=False)  # so that what casts or watches the tensors of dataclasses (fully_shard) reaches x
class DeferredShuffle(Deferred):
    """Stands for the shuffled tiles between upstream's pixel shuffle and its projector, which then does both at once.

    x: [T, h, w, C] patch tokens; order: of the result's tokens, "v1" or "v2"; flat: rows and columns are one axis;
    source: where x was before it was moved.
    """

    x: torch.Tensor
    scale_factor: float
    shuffle: Callable[..., torch.Tensor]
    order: str
    flat: bool = False
    source: torch.device | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        tiles, height, width, channels = self.x.shape
        scale = self.scale_factor
        rows, columns = int(height * scale), int(width * scale)
        return (tiles, *((rows * columns,) if self.flat else (rows, columns)), int(channels / (scale * scale)))

    def tensor(self) -> torch.Tensor:
        shuffled = self.shuffle(self.x, self.scale_factor)
        return shuffled.flatten(1, 2) if self.flat else shuffled

    def reshape(self, *sizes: int) -> Any:
        tiles, *cells, width = self.shape
        if sizes in ((tiles, -1, width), (tiles, torch.Size(cells).numel(), width)):
            return replace(self, flat=True)
        return self.tensor().reshape(*sizes)

    def to(self, *args: Any, **kwargs: Any) -> DeferredShuffle:
        """Before the shuffle, which is the same: accelerate moves so what goes into a layer."""
        return replace(self, x=self.x.to(*args, **kwargs), source=self.source or self.x.device)

    def project(self, stack: LinearStack, backend: str) -> torch.Tensor:
        """[T, h * w * scale_factor ** 2, H]"""
        tiles, height, width, channels = self.x.shape
        return ops.pixel_shuffle_mlp(
            self.x.reshape(tiles, height * width, channels),
            stack.norm.weight,
            stack.norm.bias,
            [linear.weight for linear in stack.linears],
            [linear.bias for linear in stack.linears],
            merge=round(1 / self.scale_factor),
            grid=(height, width),
            order=self.order,
            eps=stack.norm.eps,
            backend=backend,
        )


class DeferredMask(Deferred):
    """Stands for upstream's placeholder mask until `masked_scatter` takes it.

    write: gets embeddings and rows of one dtype on one device, and returns what the scatter would.
    """

    def __init__(
        self, mask: Callable[[], torch.Tensor], write: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        self._mask, self._write = mask, write

    def tensor(self) -> torch.Tensor:
        return self._mask()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.masked_scatter and len(args) == 3 and isinstance(args[1], cls) and not kwargs:
            embeds, mask, rows = args
            if rows.dtype == embeds.dtype and rows.device == embeds.device:
                return mask._write(embeds, rows)
        return super().__torch_function__(func, types, args, kwargs)


class DeferredEmbeddings(Deferred):
    """Stands for the text's embeddings while upstream's body writes visual rows over a mask of them.

    `embeds[mask] = rows` and `embeds[mask] = embeds[mask] * 0.0 + rows`, on embeddings [N, H], are one op then.

    ours: nobody else holds this memory; copied: upstream has asked for a copy, which the write makes.
    """

    def __init__(self, value: torch.Tensor, ours: bool, token: Any, backend: str, copied: bool = False) -> None:
        self._value, self._ours, self._copied = value, ours, copied
        self._token, self._backend = token, backend

    @property
    def shape(self) -> torch.Size:
        return self._value.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._value.dtype

    @property
    def device(self) -> torch.device:
        return self._value.device

    def tensor(self) -> torch.Tensor:
        if self._copied:
            self._value, self._ours, self._copied = self._value.clone(), True, False
        return self._value

    def clone(self) -> DeferredEmbeddings:
        return DeferredEmbeddings(self._value, False, self._token, self._backend, copied=True)

    def reshape(self, *sizes: int) -> Any:
        if len(sizes) != 2:
            return self.tensor().reshape(*sizes)
        value = self._value.reshape(*sizes)
        return DeferredEmbeddings(value, self._ours, self._token, self._backend, self._copied)

    def __getitem__(self, key: Any) -> Any:
        return _Selected(self, key) if self._is_mask(key) else self.tensor()[made(key)]

    def __setitem__(self, key: Any, rows: Any) -> None:
        rows = made(rows)
        if self._is_mask(key) and _is_rows(rows, self) and rows.dtype == self.dtype:
            ids = torch.where(key, self._token, -1)
            placed = place(self._value[None], ids[None], rows, self._token, self._backend, ours=self._ours)
            self._value, self._ours, self._copied = placed[0], True, False
            return
        if not self._ours:  # upstream would write into what somebody may hold
            self._value, self._ours, self._copied = self._value.clone(), True, False
        self._value[made(key)] = rows

    def _is_mask(self, key: Any) -> bool:
        known = isinstance(key, torch.Tensor) and key.dtype == torch.bool and len(self.shape) == 2
        return known and key.shape == self.shape[:1] and key.device == self.device and self._token is not None


class _Selected(Deferred):
    """`embeds[mask]`, and that times zero: what rows are added to is the rows."""

    def __init__(self, embeds: DeferredEmbeddings, mask: torch.Tensor, zero: bool = False) -> None:
        self._embeds, self._mask, self._zero = embeds, mask, zero

    def tensor(self) -> torch.Tensor:
        selected = self._embeds.tensor()[self._mask]
        return selected * 0.0 if self._zero else selected

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, (int, float)) and other == 0:
            return _Selected(self._embeds, self._mask, zero=True)
        return self.tensor() * made(other)

    def __add__(self, rows: Any) -> torch.Tensor:
        rows, dtype = made(rows), self._embeds.dtype
        alike = self._zero and _is_rows(rows, self._embeds) and torch.promote_types(rows.dtype, dtype) == dtype
        if alike and rows.shape[0] == int(self._mask.sum()):
            return rows.to(dtype)
        return self.tensor() + rows


def _is_rows(rows: Any, embeds: DeferredEmbeddings) -> bool:
    known = isinstance(rows, torch.Tensor) and rows.dim() == 2
    return known and rows.shape[1] == embeds.shape[1] and rows.device == embeds.device


def place(
    embeds: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, token: int, backend: str, *, ours: bool
) -> torch.Tensor:
    """The visual rows in `embeds` [B, N, H], in place where that memory is `ours` and autograd does not keep it."""
    inference = embeds.is_inference() and not torch.is_inference_mode_enabled()
    inplace = ours and not embeds.requires_grad and not inference
    return ops.place_rows(embeds, ids.to(embeds.device, torch.int64), rows, token, inplace=inplace, backend=backend)
