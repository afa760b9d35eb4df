"""The patching framework: adapters say where and what, this module changes the model and takes the changes back.

Three kinds of change exist, all on instances, never on a class or in a module's namespace: a method wrapped
(`Editor.method`), an attribute set (`Editor.attribute`) and a hook attached (`Editor.hook`). What was changed is kept
in the patched modules themselves (`module.__dict__["_ivl"]`), so a deep copy of a patched model is patched on its
own, no registry keeps a model alive, and a pickled model loads unpatched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import _library

# The adapters, in the order in which they are applied: a later one wraps an earlier one. Each name is a module of
# this package with an `ADAPTER`.
ADAPTERS: tuple[str, ...] = ("native", "chat", "flash", "moe", "rope")

ATTACHMENT = "_ivl"


class PatchError(RuntimeError):
    """The model could not be patched as asked; it is exactly as it was."""


class PatchWarning(UserWarning):
    """A patch that changed nothing, or an undo that could not take everything back."""


@dataclass(frozen=True)
class Feature:
    """A keyword of `patch`.

    Attributes:
        default: the value when the keyword is left out or None. True: patch what is recognised, and report the rest.
        meaning: one line for the documentation and for error messages.
        parse: validates the caller's value and returns what the adapter gets; None accepts only True and False.
        option: the keyword only parametrizes other features: it has no sites of its own.
    """

    default: Any
    meaning: str
    parse: Callable[[Any], Any] | None = None
    option: bool = False


@dataclass
class Site:
    """A place in a model that a feature applies to.

    Attributes:
        feature: the keyword of `patch`.
        path: dotted name of the module in the model, "" for the model itself.
        module: the module.
        what: what will be replaced, in a few words.
        reason: why this place is refused; empty when it can be patched.
    """

    feature: str
    path: str
    module: nn.Module
    what: str
    reason: str = ""


class Adapter:
    """Base of the adapters: one model family, or one part that several families share."""

    features: Mapping[str, Feature] = {}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterable[Site]:
        """The sites of the wanted features, refused ones with their reason. Changes nothing."""
        raise NotImplementedError

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        """Patch one site, only through `edit`."""
        raise NotImplementedError

    def serving(self, site: Site) -> str:
        """Which backend will serve the site as the model is now, and why; asked when a report is made."""
        return ""


class _Absent:
    """Marks an attribute that was not in the instance's `__dict__`. A class, so that copies keep its identity."""


@dataclass(eq=False)
class _Layer:
    key: tuple[str, str]  # (feature, adapter)
    function: Callable[..., Any]


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
    method.__name__ = name  # a bound method is pickled by its name: the copy gets the method of its class
    method.__dict__["_ivl_dispatcher"] = True
    return method


def _class_method(name: str) -> Callable[..., Any]:
    # Looked up at the call, so that a class patched by somebody else keeps that patch.
    return lambda self, *args, **kwargs: getattr(class_of(self), name)(self, *args, **kwargs)


def _drop_self(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(*args, **kwargs)


def _wrap(function: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(inner, self, *args, **kwargs)


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


def _attach(module: nn.Module) -> _Attachment:
    return module.__dict__.setdefault(ATTACHMENT, _Attachment())


def _detach_if_empty(module: nn.Module) -> None:
    state = attachment(module)
    if state is not None and not state.seats and not state.edits:
        del module.__dict__[ATTACHMENT]


def note(module: nn.Module, name: str, value: Any) -> None:
    """Keep something about the last call for `PatchHandle.report` (its `str`) and `PatchHandle.note`."""
    state = attachment(module)
    if state is not None:
        state.notes[name] = value


class _Edit:
    def undo(self) -> str:
        """Take the change back; returns what had to be left, or ""."""
        raise NotImplementedError


@dataclass(eq=False)
class _MethodEdit(_Edit):
    owner: nn.Module
    name: str
    layer: _Layer

    def undo(self) -> str:
        state = attachment(self.owner)
        seat = state.seats.get(self.name) if state else None
        if state is None or seat is None or self.layer not in seat.layers:
            return ""
        seat.layers.remove(self.layer)
        seat.rebuild(self.owner)
        if seat.layers:
            return ""
        current = self.owner.__dict__.get(self.name)
        if not (isinstance(current, types.MethodType) and current.__func__ is seat.method):
            if current is None:  # somebody deleted ours
                del state.seats[self.name]
                _detach_if_empty(self.owner)
                return ""
            kind = type(self.owner).__name__
            return (
                f"{self.name} of {kind} has another wrapper on top ({_describe(current)}): ours does nothing below it"
            )
        if seat.previous is _Absent:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = seat.previous
        del state.seats[self.name]
        _detach_if_empty(self.owner)
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


@dataclass(eq=False)
class _HookEdit(_Edit):
    handle: torch.utils.hooks.RemovableHandle

    def undo(self) -> str:
        self.handle.remove()
        return ""


def _describe(value: Any) -> str:
    function = getattr(value, "func", value)  # a functools.partial
    function = getattr(function, "__func__", function)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(value).__name__)}"


class Editor:
    """The only way in which adapters change a model. Everything done through it can be undone exactly."""

    def __init__(self, key: tuple[str, str]) -> None:
        self._key = key
        self.edits: list[_Edit] = []

    def method(self, owner: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Wrap the method `name` of this instance with `function(inner, self, *args, **kwargs)`.

        `inner(self, *args, **kwargs)` is the method as it was. `function` must not hold the model or its tensors: a
        deep copy of the model shares it.
        """
        state = _attach(owner)
        if name not in state.seats:
            state.seats[name] = _Seat(owner, name)
        seat = state.seats[name]
        layer = _Layer(self._key, function)
        seat.layers.append(layer)
        seat.rebuild(owner)
        if seat.previous is owner.__dict__.get(name, _Absent):
            owner.__dict__[name] = types.MethodType(seat.method, owner)
        self.edits.append(_MethodEdit(owner, name, layer))

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set a plain attribute in the `__dict__` of an instance (a module, a config): no parameter, no submodule."""
        self.edits.append(_AttributeEdit(owner, name, value, vars(owner).get(name, _Absent)))
        vars(owner)[name] = value

    def hook(self, owner: nn.Module, function: Callable[..., Any], *, before: bool = False, **options: Any) -> None:
        """Register a forward hook (`before=True`: a forward pre-hook); `options` go to torch's `register_*` method."""
        register = owner.register_forward_pre_hook if before else owner.register_forward_hook
        self.edits.append(_HookEdit(register(function, **options)))

    def roll_back(self) -> list[str]:
        left = [edit.undo() for edit in reversed(self.edits)]
        for edit in self.edits:
            if isinstance(edit, _MethodEdit):
                _detach_if_empty(edit.owner)
        self.edits.clear()
        return [text for text in left if text]


@dataclass(frozen=True)
class Row:
    """One line of a report. `state`: patched, already patched, refused, not found, off, undone or left."""

    module: str
    feature: str
    what: str
    state: str
    detail: str = ""


@dataclass
class PatchReport:
    """What was patched, which backend will serve it and why; what was not, and why not."""

    model: str
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def patched(self) -> list[Row]:
        return [row for row in self.rows if row.state in ("patched", "already patched")]

    def __str__(self) -> str:
        table = [("module", "feature", "what", "state", "served by, or why not")]
        table += [(r.module or "(model)", r.feature, r.what, r.state, r.detail) for r in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([f"ivl_kernels in {self.model}:", *lines, *(f"{k}: {v}" for k, v in self.notes.items())])

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "rows": [vars(row).copy() for row in self.rows], "notes": dict(self.notes)}


def serving(op: str, tensor: torch.Tensor) -> str:
    """ "native (float32 on cpu)": the backend of `ops.<op>` for tensors like this one, and why not a better one."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    choice = _library.OPS[op].explain(tensor.device.type, dtype)
    return f"{choice} ({dtype} on {tensor.device.type})"


class PatchHandle:
    """A patch that can be reported and undone. Made by `patch`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._applied: list[tuple[Adapter, Site, tuple[str, str]]] = []
        self._others: list[Row] = []

    def report(self) -> PatchReport:
        """What is patched now, which backend serves it with the model where it is now, and notes on the last call."""
        report = PatchReport(type(self.model).__name__)
        for adapter, site, key in self._applied:
            active = key in getattr(attachment(site.module), "edits", {})
            detail = adapter.serving(site) if active else ""
            report.rows.append(Row(site.path, site.feature, site.what, "patched" if active else "undone", detail))
        report.rows += self._others
        for _, site, _ in self._applied:
            state = attachment(site.module)
            if state is not None:
                report.notes.update({name: str(value) for name, value in state.notes.items()})
        return report

    def undo(self) -> PatchReport:
        """Take back what this handle changed, in any order with other handles; a second call does nothing.

        Returns:
            One row a site. `left` says that somebody else's wrapper sits on top of ours: ours then does nothing any
            more, but stays reachable from that wrapper. A `PatchWarning` says so too.
        """
        report = PatchReport(type(self.model).__name__)
        for _, site, key in reversed(self._applied):
            left = _undo_site(site.module, key)
            report.rows.append(Row(site.path, site.feature, site.what, "left" if left else "undone", "; ".join(left)))
        remaining = [row.detail for row in report.rows if row.state == "left"]
        if remaining:
            warnings.warn("undo: " + "; ".join(remaining), PatchWarning, stacklevel=2)
        return report

    def note(self, name: str) -> Any:
        """What an adapter kept about the last call under this name, or None."""
        for _, site, _ in self._applied:
            state = attachment(site.module)
            if state is not None and name in state.notes:
                return state.notes[name]
        return None

    def last_routing(self, image_sizes: Sequence[tuple[int, int]] | None = None) -> Any:
        """How the last Flash call routed its tiles; None before the first one or without a router.

        Args:
            image_sizes: (height, width) of the upright photographs in pixels, one an image in order of appearance
                (Pillow's `size` is the other way round). With them `grid` is what `imaging.choose_grid`, InternVL's
                tiling rule, chooses when it may make as many tiles as the image has; without, the model's only
                knowledge, None for images of several tiles. The tiles must be cut by that rule, from one tile
                up, the thumbnail last.

        Raises:
            ValueError: another number of sizes than of images, or the rule does not cut a photograph of this size
                into that many tiles.
        """
        routing = self.note("routing")
        return routing if routing is None or image_sizes is None else routing.with_grids(image_sizes)

    def __repr__(self) -> str:
        return f"<PatchHandle of {type(self.model).__name__}: {len(self._applied)} sites>"


def _undo_site(module: nn.Module, key: tuple[str, str]) -> list[str]:
    state = attachment(module)
    edits = state.edits.pop(key, []) if state is not None else []
    left = [edit.undo() for edit in reversed(edits)]
    _detach_if_empty(module)
    return [text for text in left if text]


@functools.cache
def adapters() -> tuple[Adapter, ...]:
    return tuple(importlib.import_module(f"{__package__}.{name}").ADAPTER for name in ADAPTERS)


def features() -> dict[str, Feature]:
    """Every keyword of `patch`."""
    return {name: feature for adapter in adapters() for name, feature in adapter.features.items()}


def _parse(given: Mapping[str, Any]) -> dict[str, Any]:
    known = features()
    values: dict[str, Any] = {name: feature.default for name, feature in known.items()}
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"patch: unknown feature '{name}', expected {', '.join(sorted(known)) or 'none'}")
        if value is None:
            continue
        parse = known[name].parse
        if parse is not None and not (value is False and not known[name].option):
            value = parse(value)
        elif not isinstance(value, bool):
            raise TypeError(f"patch: {name}={value!r}, expected True, False or None")
        values[name] = value
    return values


def patch(model: nn.Module, *, strict: bool = False, backend: str = "", **features: Any) -> PatchHandle:
    """Let the kernels serve a model: this instance only, and nothing of it for which there is no kernel.

    Args:
        model: a transformers model, or anything that contains one: `InternVLForConditionalGeneration`,
            `InternVLModel`, `InternVLChatModel` (remote code), or a language model alone.
        strict: raise instead of reporting when something wanted is refused or is not there.
        backend: force a backend of the ops; empty picks the best.
        **features: one keyword a feature. True: wanted; False: left alone; None or left out: the feature's default,
            which for the exact replacements is "where recognised".

    Returns:
        A handle: `report()` says what was done and what serves it, `undo()` takes it back.

    Raises:
        TypeError: an unknown feature (named), or a value that does not fit.
        PatchError: with `strict`, something was refused or not found.

    A patch either succeeds or leaves the model exactly as it was. Patching again changes nothing and says so. Outputs,
    parameter names, `state_dict`, `save_pretrained`, `.to()`, deep copies and gradients stay what they were.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    options = _parse(features)
    options["backend"] = backend
    handle = PatchHandle(model)
    found: list[tuple[Adapter, Site]] = []
    for adapter in adapters():
        found += [(adapter, site) for site in adapter.find(model, options) if options[site.feature] is not False]
    problems = [f"{s.path or '(model)'}: {s.feature}: {s.reason}" for _, s in found if s.reason]
    for name, feature in _wanted(options).items():
        if not any(site.feature == name for _, site in found):
            handle._others.append(Row("", name, feature.meaning, "not found", "nothing in this model is recognised"))
            if features.get(name):
                problems.append(f"{name}: nothing in this {type(model).__name__} is recognised")
    handle._others += [Row(s.path, s.feature, s.what, "refused", s.reason) for _, s in found if s.reason]
    if strict and problems:
        raise PatchError("nothing was patched: " + "; ".join(problems))

    done: list[tuple[Site, tuple[str, str], Editor]] = []
    try:
        for adapter, site in found:
            key = (site.feature, f"{type(adapter).__module__}.{type(adapter).__qualname__}")
            if site.reason:
                continue
            if key in getattr(attachment(site.module), "edits", {}):
                row = Row(site.path, site.feature, site.what, "already patched", adapter.serving(site))
                handle._others.append(row)
                continue
            editor = Editor(key)
            done.append((site, key, editor))
            adapter.apply(site, editor, options)
            _attach(site.module).edits[key] = editor.edits
            handle._applied.append((adapter, site, key))
    except BaseException:
        for site, key, editor in reversed(done):
            editor.roll_back()
            _attach(site.module).edits.pop(key, None)
            _detach_if_empty(site.module)
        raise
    if not handle._applied and not handle.report().patched:
        warnings.warn(
            f"patch: nothing was patched in this {type(model).__name__}; see handle.report()",
            PatchWarning,
            stacklevel=2,
        )
    return handle


def _wanted(options: Mapping[str, Any]) -> dict[str, Feature]:
    known = features()
    return {n: f for n, f in known.items() if not f.option and options[n] not in (False, None)}


@contextlib.contextmanager
def patched(model: nn.Module, *, strict: bool = False, backend: str = "", **features: Any) -> Iterator[PatchHandle]:
    """`patch` for the length of a `with` block; takes the same arguments and yields the handle."""
    handle = patch(model, strict=strict, backend=backend, **features)
    try:
        yield handle
    finally:
        handle.undo()


PROJECTOR = Feature(True, "pixel shuffle and projector in one op, at every ratio the model has")
PACKING = Feature(True, "visual rows written over the placeholder tokens by an op, with a count check")


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


def replaced_before(module: nn.Module, name: str) -> str:
    """Why upstream's own method `name` cannot be reached on this instance, or ""."""
    current = module.__dict__.get(name)
    function = getattr(current, "__func__", None)
    if current is None or "_ivl_dispatcher" in getattr(function, "__dict__", {}):
        return ""
    if function is not None and function is getattr(type(module), name, None):
        return ""
    return f"{name} of this instance was replaced before by {_describe(current)}"


def named_instances(model: nn.Module, *class_names: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module whose class, or a base of it, has one of these names, in whatever package."""
    for path, module in model.named_modules():
        if any(base.__name__ in class_names for base in type(module).__mro__):
            yield path, module


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _only_moves_inputs(module: nn.Module) -> bool:
    """An accelerate hook that keeps the weights where they are (models spread over devices)."""
    hook = getattr(module, "_hf_hook", None)
    return type(hook).__name__ == "AlignDevicesHook" and not getattr(hook, "offload", True)


def not_plain(module: nn.Module, kind: type[nn.Module], name: str) -> str:
    """Why reading the parameters of `module` would not be the same as calling it; "" when it would.

    Catches LoRA and quantised layers (another class), parametrizations, hooks, offloading and tensor subclasses.
    """
    if type(module) is not kind:
        return f"{name} is a {type(module).__module__}.{type(module).__name__}, not a plain {kind.__name__}"
    if replaced_before(module, "forward") and not _only_moves_inputs(module):
        return f"{name}.forward was replaced by {_describe(module.__dict__['forward'])}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    for parameter_name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"{name}.{parameter_name} is a {type(parameter).__name__}"
        if parameter is not None and parameter.device.type == "meta":
            return f"{name}.{parameter_name} is on the meta device (offloaded)"
    return ""
