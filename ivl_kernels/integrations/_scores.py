"""Attention that a body of upstream spells out: softmax((q * scale) @ k^T) @ v, deferred until v is there.

The body runs on a stand-in whose `scale` is a `Scale`. Whatever else it does with what comes of that (a mask added,
dropout, a look at the weights) is done with the tensors that it would have had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..models.upstream import Deferred, made

# Attention of q, k and v [B, heads, N, d] and a scale, or None where it is not to be served.
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor | None]

_PRODUCTS = (torch.Tensor.mul, torch.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)


class Scale(Deferred):
    """Stands for the number that queries are multiplied by."""

    def __init__(self, value: float, attend: Attend) -> None:
        self.value, self.attend = value, attend

    def tensor(self) -> Any:
        return self.value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and not kwargs and len(args) == 2 and type(args[0]) is Tensor and type(args[1]) is cls:
            return _Queries(args[0], args[1])
        return super().__torch_function__(func, types, args, kwargs)


class _Queries(Deferred):
    """Stands for `q * scale`."""

    def __init__(self, q: Tensor, scale: Scale) -> None:
        self.q, self.scale = q, scale

    def tensor(self) -> Tensor:
        return self.q * self.scale.value

    def __matmul__(self, keys: Any) -> Any:
        return _Weights(self, keys) if type(keys) is Tensor else self.tensor() @ made(keys)


class _Weights(Deferred):
    """Stands for `(q * scale) @ keys`, and then for its softmax."""

    def __init__(self, queries: _Queries, keys: Tensor, normalised: bool = False) -> None:
        self.queries, self.keys, self.normalised = queries, keys, normalised

    def tensor(self) -> Tensor:
        scores = self.queries.tensor() @ self.keys
        return scores.softmax(-1) if self.normalised else scores

    def softmax(self, dim: int, *args: Any, **kwargs: Any) -> Any:
        if self.normalised or args or kwargs or dim not in (-1, self.keys.dim() - 1):
            return self.tensor().softmax(dim, *args, **kwargs)
        return _Weights(self.queries, self.keys, True)

    def __matmul__(self, values: Any) -> Any:
        values = made(values)
        if self.normalised and type(values) is Tensor:
            scale = self.queries.scale
            found = scale.attend(self.queries.q, self.keys.transpose(-1, -2), values, scale.value)
            if found is not None:
                return found
        return self.tensor() @ values

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is functional.dropout:
            rest = dict(zip(("p", "training", "inplace"), args[1:])) | (kwargs or {})
            if not rest.get("training", True) or rest.get("p", 0.5) == 0:
                return args[0]
        return super().__torch_function__(func, types, args, kwargs)
