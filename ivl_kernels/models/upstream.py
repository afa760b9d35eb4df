"""How upstream's code is entered.

Its own bodies run, whichever version is installed: on a stand-in of the module where parts of ours take part
(`StandIn`), with one of its module's names replaced (`renamed`), on values that stand for work not done yet
(`Deferred`). What a call was given is asked by what it is (`arguments`, `cache_of`), so that a renamed or added
argument changes nothing. State of a layer never lives in a replaced name; state of a call belongs to the call.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


class StandIn:
    """A module as its own upstream method sees it for one call, with some attributes replaced.

    `inner(StandIn(self, name=replacement), ...)` runs upstream's own body, whichever version, on a few parts of ours.
    """

    def __init__(self, module: Any, **replaced: Any) -> None:
        if type(module) is StandIn:  # what is found through one is not looked for through two
            replaced = {**vars(module), **replaced}
            module = replaced["_ivl_module"]
        self.__dict__.update(replaced, _ivl_module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_ivl_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ivl_module, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return entering(self._ivl_module)(*args, **kwargs)


_DERIVED = ("torch.distributed.", "torch.nn.utils.parametrize")


def class_of(module: Any) -> Any:
    """The class as upstream wrote it: below a stand-in, and below what torch derives for one instance.

    That is done by `fully_shard`, which puts a class of its own before it, and by parametrizations.
    """
    while type(module) is StandIn:
        module = module._ivl_module
    kinds = type(module).__mro__
    if not (kinds[1].__module__.startswith(_DERIVED[0]) or kinds[0].__module__ == _DERIVED[1]):
        return kinds[0]
    return next(kind for kind in kinds if not kind.__module__.startswith(_DERIVED))


class Deferred:
    """Stands for a tensor that upstream's body hands from one part to the next; for anything else it becomes one."""

    def tensor(self) -> torch.Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(made, (args, kwargs or {}))
        return func(*args, **kwargs)


def made(value: Any) -> Any:
    """The tensor that a `Deferred` stands for; any other value as it is."""
    return value.tensor() if isinstance(value, Deferred) else value


def entering(function: Any) -> Any:
    """`function` for callers that may hand it something deferred: it gets tensors."""
    return lambda *args, **kwargs: function(*map(made, args), **{name: made(value) for name, value in kwargs.items()})


def _operator(name: str) -> Any:
    return lambda self, *args: getattr(self.tensor(), name)(*map(made, args))


# Python looks operators up in the class, not through __getattr__.
for _name in ("add", "sub", "mul", "truediv", "matmul", "pow", "and", "or", "radd", "rsub", "rmul", "rtruediv"):
    setattr(Deferred, f"__{_name}__", _operator(f"__{_name}__"))
for _name in (
    "neg",
    "invert",
    "len",
    "getitem",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "iter",
    "bool",
    "float",
    "int",
    "setitem",
):
    setattr(Deferred, f"__{_name}__", _operator(f"__{_name}__"))


def code_of(function: Any) -> types.CodeType:
    """The code of a function below its decorators."""
    return inspect.unwrap(function).__code__


def uses(function: Any, name: str) -> bool:
    """Whether the body of `function` calls for this name of its module."""
    inside = inspect.unwrap(function)
    return name in inside.__code__.co_names and name in inside.__globals__


def renamed(function: Any, **names: Any) -> Any:
    """`function` with some of its module's names replaced: the same body under the same decorators.

    Make it once a class, outside compiled code, and keep state of a layer or a call out of `names`.

    Raises:
        ValueError: a decorator does not hold the function it wraps, so the body cannot be replaced in it.
    """
    inside = getattr(function, "__wrapped__", None)
    if inside is None:
        # Without a module's name torch.compile takes the names from this dictionary, not from that module.
        scope = {**function.__globals__, **names}
        scope.pop("__name__", None)
        copy = types.FunctionType(
            function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
        )
        used = [name for name in function.__code__.co_names if name in function.__globals__]
        copy.__dict__["_ivl_names"] = {name: function.__globals__[name] for name in used}
    else:
        cells = function.__closure__ or ()
        if not any(_holds(cell, inside) for cell in cells):
            raise ValueError(f"{function.__qualname__}: a decorator does not hold what it wraps")
        replaced = renamed(inside, **names)
        closure = tuple(types.CellType(replaced) if _holds(cell, inside) else cell for cell in cells)
        copy = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
        )
        copy.__wrapped__ = replaced  # type: ignore[attr-defined]
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy


def unchanged(copy: Any, function: Any) -> bool:
    """Whether the module of `function` still has, under the names its body uses, what it had when it was `renamed`."""
    if torch.compiler.is_compiling():
        return True
    now = inspect.unwrap(function).__globals__
    return all(now.get(name) is value for name, value in inspect.unwrap(copy).__dict__["_ivl_names"].items())


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


@functools.cache
def signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def arguments(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What a call `function(*args, **kwargs)` gives, by name; what lands in `**kwargs` stands beside the rest.

    Raises:
        TypeError: the call does not fit the function, as the call itself would.
    """
    if isinstance(function, types.MethodType):  # the cache of signatures holds no model
        function, args = function.__func__, (function.__self__, *args)
    bound = signature(function).bind(*args, **kwargs)
    given = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def is_cache(value: Any) -> bool:
    """Whether this is a cache of keys and values, whatever its class."""
    return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments or fields of an output, whatever it is called; None without one.

    Raises:
        TypeError: a cache of a kind that cannot be asked for its length (the tuples of old).
    """
    for name, value in given.items():
        if is_cache(value):
            return value
        if isinstance(value, tuple) and value and ("past" in name or "cache" in name):
            raise TypeError(f"{name}: got a tuple, expected a transformers Cache")
    return None


def filled(cache: Any) -> int:
    """Positions a cache holds; 0 without a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def keys_at(cache: Any, position: int) -> torch.Tensor | None:
    """Keys [B, heads, D] of a position in the last layer of a cache that keeps all of them; None without such a layer.

    They depend on everything up to that position, so that they tell one content of a cache from another.
    """
    for layer in reversed(getattr(cache, "layers", [])):
        keys = getattr(layer, "keys", None)
        if not isinstance(keys, torch.Tensor) or keys.dim() != 4 or getattr(layer, "is_sliding", False):
            continue
        if keys.shape[2] >= int(layer.get_seq_length()) > position:
            return keys[:, :, position]
    return None


def describe(value: Any) -> str:
    function = getattr(value, "func", value)  # a functools.partial
    function = getattr(function, "__func__", function)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(value).__name__)}"


def replaced_before(module: nn.Module, name: str) -> str:
    """Why upstream's own method `name` (`forward_name(module)` for a forward) cannot be reached here, or ""."""
    current = module.__dict__.get(name)
    function = getattr(current, "__func__", None)
    if current is None or "_ivl_dispatcher" in getattr(function, "__dict__", {}):
        return ""
    if function is not None and function is getattr(type(module), name.removeprefix("_old_"), None):
        return ""
    return f"{name} of this instance was replaced before by {describe(current)}"


def forward_name(module: nn.Module) -> str:
    """The method to wrap so that ours runs inside accelerate's hook, after it has moved what it moves."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def named_instances(model: nn.Module, *class_names: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module whose class, or a base of it, has one of these names, in whatever package."""
    for path, module in model.named_modules():
        if any(base.__name__ in class_names for base in type(module).__mro__):
            yield path, module
