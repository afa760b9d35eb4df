"""What a host would wait for a GPU for, where tensors only seem to be on one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ivl_kernels._library import NAMESPACE, OPS

METHODS = ("item", "tolist", "numpy", "cpu", "to", "__bool__", "__int__", "__float__", "__index__", "__array__")
OPERATORS = (
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
)  # fmt: skip


class OnHost(torch.Tensor):
    """A tensor in the host's memory, while those of the GPU are plain ones on the CPU."""


def _sized_by_numbers(function: Any, args: Any, options: dict[str, Any]) -> bool:
    """Masks as indices, and repeats whose sum is not told."""
    if function is torch.ops.aten.repeat_interleave.Tensor:
        return options.get("output_size") is None
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    indexing = function._schema.name.removeprefix("aten::").startswith(("index", "_index_put"))
    return indexing and any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in indices)


class _Operators(TorchDispatchMode):
    def __init__(self, told: Callable[[str], Any]) -> None:
        super().__init__()
        self.told = told

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if function.namespace == NAMESPACE:
            with self:
                return OPS[function._opname]._run(*args)
        name = function._schema.name.removeprefix("aten::")
        if name in OPERATORS or _sized_by_numbers(function, args, options):
            self.told(name)
        return function(*args, **options)


@contextlib.contextmanager
def reads(told: Callable[[str], Any], aside: Iterable[tuple[Any, str]] = ()) -> Iterator[None]:
    """Inside, `told` is called with the name of what would wait, in this package's ops and outside.

    Methods of tensors, and operators that ask for a number or whose result's size depends on numbers.

    Args:
        aside: (module, name) of functions inside which nothing waits.
    """
    busy: list[str] = []

    def tell(name: str) -> None:
        if not busy:
            told(name)

    def quietly(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            busy.append(name)
            try:
                return function(*args, **options)
            finally:
                busy.pop()

        return run

    def method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        once = quietly(name, function)  # one method that calls another reads once

        def read(tensor: Any, *args: Any, **options: Any) -> Any:
            stays = name == "to" and "cpu" not in [p for p in (*args[:1], options.get("device")) if isinstance(p, str)]
            if stays:
                return function(tensor, *args, **options)
            if type(tensor) is not OnHost:
                tell(name)
            return once(tensor, *args, **options)

        return read

    with contextlib.ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, method(name, getattr(torch.Tensor, name))))
        for module, name in aside:
            stack.enter_context(mock.patch.object(module, name, quietly(name, getattr(module, name))))
        stack.enter_context(_Operators(tell))
        yield
