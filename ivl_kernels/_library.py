"""The one torch.library handle, and how an op declares its schema, fake and backends.

An op is registered once, for every device, with one Python function that picks the backend and calls it. Its schema
ends in `str backend`, so a forced backend is part of a compiled graph. Gradients come from an `autograd.Function`
around the op (in the op's own `op.py`): the raw `torch.ops.ivl.*` have none, so the public functions are the entry.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _dispatch
from ._dispatch import Implementation

NAMESPACE = "ivl"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# Every op that has been defined, by name: `doctor` and the tests go through it.
OPS: dict[str, Op] = {}


def transformed() -> bool:
    """Whether `torch.func` (grad, jvp, vmap, ...) or forward-mode autograd is at work: ops have gradients for neither.

    Who can run upstream's code instead asks this first.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _check_no_tangent(name: str, args: Sequence[Any]) -> None:
    """An op that torch knows no forward derivative of would give zeros without a word."""
    for value in args:
        if isinstance(value, (list, tuple)):
            _check_no_tangent(name, value)
        elif isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{name}: got an input with a tangent, and there is no forward-mode derivative")


class Op:
    """One operator `torch.ops.ivl.<name>` with its backends.

    Args:
        schema: torch schema without the namespace; its last argument must be `str backend`.
        package: `__package__` of the op, where "module:function" of the implementations is looked up. The functions
            take the schema's arguments without `backend`.
        implementations: best first; the last one is the reference.
        fake: shapes and dtypes of the result from fake tensors, with the schema's arguments.
        key: name of the tensor argument whose device and dtype decide the backend.
        reads_host: a GPU backend waits for a number from the device, so that no CUDA graph can capture it.
    """

    def __init__(
        self,
        schema: str,
        *,
        package: str,
        implementations: Sequence[Implementation],
        fake: Callable[..., Any],
        key: str,
        reads_host: bool = False,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.schema = schema
        self.implementations = tuple(implementations)
        self._package = package
        self._functions: dict[str, Callable[..., Any]] = {}
        # By dtype, what serves CPU tensors when nothing is forced: choosing again costs more than a small kernel.
        self._usual: dict[torch.dtype, Callable[..., Any]] = {}
        _library.define(schema, tags=(torch.Tag.cudagraph_unsafe,) if reads_host else ())
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        self._overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        arguments = [argument.name for argument in self._overload._schema.arguments]
        assert arguments[-1] == "backend", schema
        self._key = arguments.index(key)
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            _check_no_tangent(self.name, args)
        return self._overload(*args)

    def _run(self, *args: Any) -> Any:
        *values, forced = args
        tensor = values[self._key]
        function = None if forced or not _dispatch.unforced_cpu(tensor) else self._usual.get(tensor.dtype)
        if function is None:
            function = self._chosen(tensor, forced, values)
        elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
        if not elsewhere and not torch.is_autocast_enabled(tensor.device.type):
            return function(*values)
        with contextlib.ExitStack() as stack:
            if elsewhere:  # Triton launches on the current device
                stack.enter_context(torch.cuda.device(tensor.device))
            stack.enter_context(torch.autocast(tensor.device.type, enabled=False))  # an op chooses its dtypes itself
            return function(*values)

    def _chosen(self, tensor: torch.Tensor, forced: str, values: Sequence[Any]) -> Callable[..., Any]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        choice = _dispatch.choose(self.name, self.implementations, tensor.device, dtype, forced, values)
        function = self.function(choice.implementation)
        always = choice.backend == "native" and not choice.passed_over and choice.implementation.unless is None
        if always and not forced and _dispatch.unforced_cpu(tensor):
            self._usual[tensor.dtype] = function
        return function

    def function(self, implementation: Implementation) -> Callable[..., Any]:
        """The Python function behind an implementation; imports its module on first use."""
        path = implementation.function
        if path not in self._functions:
            module, name = path.split(":")
            self._functions[path] = getattr(importlib.import_module(f"{self._package}.{module}"), name)
        return self._functions[path]

    def explain(self, device: str, dtype: str) -> _dispatch.Choice:
        """Which backend would serve tensors of this device ("cpu", "cuda", "cuda:1") and dtype, shapes aside."""
        return _dispatch.choose(self.name, self.implementations, torch.device(device), dtype, warn=False)
