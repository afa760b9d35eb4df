"""Changes of instances that can be taken back exactly.

Two kinds of change exist, never on a class or in a module's namespace: a method wrapped (`Editor.method`) and an
attribute set (`Editor.attribute`). What was changed is kept in the patched modules
themselves (`module.__dict__["_ivl"]`), so a deep copy of a patched model is patched on its own, no registry keeps a
model alive, and a pickled model loads unpatched.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models.upstream import class_of, describe

ATTACHMENT = "_ivl"
_REPLICATE = "_replicate_for_data_parallel"


class _Absent:
    """Marks an attribute that was not in the instance's `__dict__`. A class, so that copies keep its identity."""


@dataclass(eq=False)
class _Layer:
    key: tuple[str, str]  # (feature, adapter)
    function: Callable[..., Any]
    answers: bool = False


class _Seat:
    """A method of one instance with our wrappers around it, innermost first."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.name = name
        self.previous = owner.__dict__.get(name, _Absent)
        self.layers: list[_Layer] = []
        self.method = _dispatcher(name, getattr(owner, name))

    def rebuild(self, owner: nn.Module) -> None:
        previous = self.previous
        if isinstance(previous, types.MethodType) and previous.__self__ is owner:
            previous = previous.__func__
            entry = previous
        else:
            entry = _class_method(self.name) if previous is _Absent else _drop_self(previous)
        for layer in self.layers:
            entry = _wrap(layer.function, entry)
        self.entry = entry


def _dispatcher(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._ivl.seats[name].entry(self, *args, **kwargs)  # type: ignore[union-attr, operator]

    functools.update_wrapper(method, getattr(original, "__func__", original))
    # A bound method is pickled by its name: the copy gets the method of its class.
    method.__name__ = name.removeprefix("_old_")
    method.__dict__["_ivl_dispatcher"] = True
    return method


def _class_method(name: str) -> Callable[..., Any]:
    # Looked up at the call, so that a class patched by somebody else keeps that patch.
    return lambda self, *args, **kwargs: getattr(class_of(self), name)(self, *args, **kwargs)


def _drop_self(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(*args, **kwargs)


def _wrap(function: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(inner, self, *args, **kwargs)


def _place_of(owner: nn.Module, seat: _Seat) -> tuple[dict[str, Any], str] | None:
    """What holds our method now: accelerate moves a forward to `_old_forward` and back, and ours may sit on ours."""
    seats = owner.__dict__[ATTACHMENT].seats.values()
    for holder in (owner.__dict__, *(vars(other) for other in seats if other is not seat)):
        for name, value in holder.items():
            if isinstance(value, types.MethodType) and value.__func__ is seat.method:
                return holder, name
    return None


class _Attachment:
    """What patches leave in a module. Deep copies are independent; a pickled module loses it and loads unpatched."""

    def __init__(self) -> None:
        self.seats: dict[str, _Seat] = {}
        self.edits: dict[tuple[str, str], list[_Edit]] = {}
        self.notes: dict[str, Any] = {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _Attachment, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attachment:
        import copy

        new = memo[id(self)] = _Attachment()
        for name, value in vars(self).items():
            setattr(new, name, copy.deepcopy(value, memo) if name != "notes" else {})
        return new


def attachment(module: nn.Module) -> _Attachment | None:
    return module.__dict__.get(ATTACHMENT)


def attach(module: nn.Module) -> _Attachment:
    return module.__dict__.setdefault(ATTACHMENT, _Attachment())


def detach_if_empty(module: nn.Module) -> None:
    state = attachment(module)
    if state is not None and not state.seats and not state.edits:
        del module.__dict__[ATTACHMENT]


def note(module: nn.Module, name: str, value: Any) -> None:
    """Keep something about the last call for `PatchHandle.report` (its `str`) and `PatchHandle.note`."""
    state = attachment(module)
    if state is not None:
        state.notes[name] = value


def _no_replica(inner: Any, self: Any) -> Any:
    raise RuntimeError(
        "nn.DataParallel on a patched model: its replicas would run the methods of the original; undo the patch, "
        "or use DistributedDataParallel or fully_shard"
    )


class _Edit:
    def undo(self) -> str:
        """Take the change back; returns what had to be left, or ""."""
        raise NotImplementedError

    def covered(self) -> str:
        """Who sits on top of this change and may not call it, or ""."""
        return ""


@dataclass(eq=False)
class _MethodEdit(_Edit):
    owner: nn.Module
    name: str
    layer: _Layer

    def covered(self) -> str:
        state = attachment(self.owner)
        seat = state.seats.get(self.name) if state else None
        if seat is None or _place_of(self.owner, seat) is not None:
            return ""
        who = describe(self.owner.__dict__[self.name]) if self.name in self.owner.__dict__ else "its class"
        return f"only where {who}, now {self.name} of {type(self.owner).__name__}, calls what was there before"

    def undo(self) -> str:
        state = attachment(self.owner)
        seat = state.seats.get(self.name) if state else None
        if state is None or seat is None or self.layer not in seat.layers:
            return ""
        seat.layers.remove(self.layer)
        seat.rebuild(self.owner)
        if seat.layers:
            return ""
        where = _place_of(self.owner, seat)
        current = self.owner.__dict__.get(self.name)
        if where is None and current is not None:
            kind = type(self.owner).__name__
            return f"{self.name} of {kind} has another wrapper on top ({describe(current)}): ours does nothing below it"
        if where is not None:  # else somebody deleted ours
            holder, name = where
            if seat.previous is not _Absent:
                holder[name] = seat.previous
            elif name == self.name:
                del holder[name]
            else:
                holder[name] = types.MethodType(getattr(type(self.owner), self.name), self.owner)
        for other in state.seats.values():
            other.rebuild(self.owner)
        del state.seats[self.name]
        detach_if_empty(self.owner)
        return ""


@dataclass(eq=False)
class _AttributeEdit(_Edit):
    owner: Any
    name: str
    value: Any
    previous: Any

    def undo(self) -> str:
        if vars(self.owner).get(self.name, _Absent) is not self.value:
            return f"{self.name} of {type(self.owner).__name__} has been changed since and is left as it is"
        if self.previous is _Absent:
            del vars(self.owner)[self.name]
        else:
            vars(self.owner)[self.name] = self.previous
        return ""


class Editor:
    """The only way in which adapters change a model. Everything done through it can be undone exactly."""

    def __init__(self, key: tuple[str, str]) -> None:
        self._key = key
        self.edits: list[_Edit] = []

    def method(self, owner: nn.Module, name: str, function: Callable[..., Any], *, answers: bool = False) -> None:
        """Wrap the method `name` of this instance with `function(inner, self, *args, **kwargs)`.

        `inner(self, *args, **kwargs)` is the method as it was. `function` must not hold the model or its tensors: a
        deep copy of the model shares it.

        answers: it stays outside of our other wrappers, whenever they come: it may give something else than the method
        computes, which they compute in their own way.
        """
        self._wrap(owner, name, function, answers)
        self._wrap(owner, _REPLICATE, _no_replica)

    def _wrap(self, owner: nn.Module, name: str, function: Callable[..., Any], answers: bool = False) -> None:
        state = attachment(owner)
        seat = state.seats.get(name) if state else None
        if seat is None:
            seat = _Seat(owner, name)  # may raise: nothing has been changed then
            attach(owner).seats[name] = seat
        layer = _Layer(self._key, function, answers)
        seat.layers.append(layer)
        seat.layers.sort(key=lambda each: each.answers)
        seat.rebuild(owner)
        if seat.previous is owner.__dict__.get(name, _Absent):
            owner.__dict__[name] = types.MethodType(seat.method, owner)
        self.edits.append(_MethodEdit(owner, name, layer))

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set a plain attribute in the `__dict__` of an instance (a module, a config): no parameter, no submodule."""
        self.edits.append(_AttributeEdit(owner, name, value, vars(owner).get(name, _Absent)))
        vars(owner)[name] = value

    def roll_back(self) -> list[str]:
        left = [edit.undo() for edit in reversed(self.edits)]
        for edit in self.edits:
            if isinstance(edit, _MethodEdit):
                detach_if_empty(edit.owner)
        self.edits.clear()
        return [text for text in left if text]
