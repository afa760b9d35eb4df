"""Ops that still take long argument lists; goes when the last of them takes a record."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import _dispatch, _library


class Implementation(tuple):
    def __new__(cls, backend: str, function: str, devices: Any = (), dtypes: Any = (), unless: Any = None) -> Any:
        asked = None if unless is None else lambda values: unless(*values)
        return super().__new__(cls, (_dispatch.Implementation(backend, dtypes, asked), function))


class Op(_library.Op[Any, Any]):
    def __init__(
        self,
        schema: str,
        *,
        package: str,
        implementations: Sequence[Any],
        fake: Any,
        key: str,
        reads_host: bool = False,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.schema = schema
        self.implementations = tuple(i for i, _ in implementations)
        self._package, self._paths = package, {i.backend: path for i, path in implementations}
        self._functions, self._usual = {}, {}
        _library._library.define(schema, tags=(torch.Tag.cudagraph_unsafe,) if reads_host else ())
        _library._library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_library.NAMESPACE}::{self.name}", fake, lib=_library._library)
        self._overload = getattr(getattr(torch.ops, _library.NAMESPACE), self.name).default
        arguments = [argument.name for argument in self._overload._schema.arguments]
        self._key = arguments.index(key)
        _library.OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:  # type: ignore[override]
        if not torch.compiler.is_compiling() and _library.forward_ad._current_level >= 0:
            _library._check_no_tangent(self.name, args)
        return self._overload(*args)

    def _made(self, values: Any) -> Any:
        return values

    def function(self, implementation: _dispatch.Implementation) -> Callable[..., Any]:
        if implementation.backend not in self._functions:
            module, name = self._paths[implementation.backend].split(":")
            found = getattr(importlib.import_module(f"{self._package}.{module}"), name)
            self._functions[implementation.backend] = lambda values: found(*values)
        return self._functions[implementation.backend]
