"""How upstream's code is entered: its own bodies run, on a stand-in of the module where parts of ours take part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class StandIn:
    """A module as its own upstream method sees it for one call, with some attributes replaced.

    `inner(StandIn(self, name=replacement), ...)` runs upstream's own body, whichever version, on a few parts of ours.
    """

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _ivl_module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_ivl_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ivl_module, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ivl_module(*args, **kwargs)


def class_of(module: Any) -> Any:
    while type(module) is StandIn:
        module = module._ivl_module
    return type(module)


def describe(value: Any) -> str:
    function = getattr(value, "func", value)  # a functools.partial
    function = getattr(function, "__func__", function)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(value).__name__)}"


def replaced_before(module: nn.Module, name: str) -> str:
    """Why upstream's own method `name` cannot be reached on this instance, or ""."""
    current = module.__dict__.get(name)
    function = getattr(current, "__func__", None)
    if current is None or "_ivl_dispatcher" in getattr(function, "__dict__", {}):
        return ""
    if function is not None and function is getattr(type(module), name, None):
        return ""
    return f"{name} of this instance was replaced before by {describe(current)}"


def named_instances(model: nn.Module, *class_names: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module whose class, or a base of it, has one of these names, in whatever package."""
    for path, module in model.named_modules():
        if any(base.__name__ in class_names for base in type(module).__mro__):
            yield path, module
