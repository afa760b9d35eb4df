"""The patching framework: adapters say where and what; `patch` applies them and hands out what takes them back."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ._edit import Editor, attach, attachment, detach_if_empty
from ._report import PatchReport, Row, failure

# The adapters, in the order in which they are applied: a later one wraps an earlier one. Each name is a module of
# this package with an `ADAPTER`.
ADAPTERS: tuple[str, ...] = (
    "vision", "loss", "flash", "experts", "rope", "v2pe", "attention", "cache", "norms", "mlp", "linear", "packed",
    "graphs",
)  # fmt: skip


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
        upstream: the reason is no refusal: upstream's own code is what is wanted here.
    """

    feature: str
    path: str
    module: nn.Module
    what: str
    reason: str = ""
    upstream: bool = False


class Adapter:
    """Base of the adapters: one part that several model families share.

    What raises here is a refused row with the error's text, and what it changed is taken back.
    """

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


class PatchHandle:
    """A patch that can be reported and undone. Made by `patch`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._applied: list[tuple[Adapter, Site, tuple[str, str]]] = []
        self._present: list[tuple[Adapter, Site, tuple[str, str]]] = []  # patched before by another handle
        self._others: list[Row] = []

    def report(self) -> PatchReport:
        """What is patched now, which backend serves it with the model where it is now, and notes on the last call.

        Never raises: what an adapter cannot tell about a module as it is now is the row's detail.
        """
        report = PatchReport(type(self.model).__name__)
        inside = set(map(id, self.model.modules()))
        ours = [(*applied, "patched") for applied in self._applied]
        for adapter, site, key, state in (*ours, *((*present, "already patched") for present in self._present)):
            detail = ""
            if key not in getattr(attachment(site.module), "edits", {}):
                state = "undone"
            elif id(site.module) not in inside:
                state = "removed"
            else:
                detail = "; ".join(filter(None, (_serving(adapter, site), *_covered(site.module, key))))
            report.rows.append(Row(site.path, site.feature, site.what, state, detail))
        report.rows += self._others
        for _, site, _ in self._applied:
            report.notes.update({name: str(value) for name, value in _notes(site.module).items()})
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
        return next((_notes(s.module)[name] for _, s, _ in self._applied if name in _notes(s.module)), None)

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


def _serving(adapter: Adapter, site: Site) -> str:
    try:
        return adapter.serving(site)
    except Exception as error:
        return f"not known as the module is now ({failure(error)})"


def _covered(module: nn.Module, key: tuple[str, str]) -> Iterator[str]:
    for edit in getattr(attachment(module), "edits", {}).get(key, ()):
        yield edit.covered()


def _notes(module: nn.Module) -> Mapping[str, Any]:
    return getattr(attachment(module), "notes", {})


def _undo_site(module: nn.Module, key: tuple[str, str]) -> list[str]:
    state = attachment(module)
    edits = state.edits.pop(key, []) if state is not None else []
    left = [edit.undo() for edit in reversed(edits)]
    detach_if_empty(module)
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
    wanted = _wanted(options)
    handle = PatchHandle(model)
    found: list[tuple[Adapter, Site]] = []
    rows = handle._others
    for adapter in adapters():
        try:
            sites = [site for site in adapter.find(model, options) if options[site.feature] is not False]
        except Exception as error:
            failed = [name for name in adapter.features if name in wanted]
            rows += [Row("", name, wanted[name].meaning, "refused", failure(error)) for name in failed]
            continue
        found += [(adapter, site) for site in sites if not site.reason]
        rows += [
            Row(site.path, site.feature, site.what, "upstream" if site.upstream else "refused", site.reason)
            for site in sites
            if site.reason
        ]
    seen = {site.feature for _, site in found} | {row.feature for row in rows}
    nothing = f"nothing in this {type(model).__name__} is recognised"
    rows += [
        Row("", name, feature.meaning, "not found", nothing) for name, feature in wanted.items() if name not in seen
    ]
    problems = [row for row in rows if row.state == "refused" or features.get(row.feature)]
    if strict and problems:
        raise PatchError("nothing was patched: " + "; ".join(map(_problem, problems)))

    done: list[tuple[Site, tuple[str, str], Editor]] = []
    try:
        for adapter, site in found:
            key = (site.feature, f"{type(adapter).__module__}.{type(adapter).__qualname__}")
            if key in getattr(attachment(site.module), "edits", {}):
                handle._present.append((adapter, site, key))
                continue
            done.append((site, key, Editor(key)))
            try:
                adapter.apply(site, done[-1][2], options)
                attach(site.module).edits[key] = done[-1][2].edits
                adapter.serving(site)  # who cannot say what serves does not know this model
            except Exception as error:
                _take_back(*done.pop())
                rows.append(Row(site.path, site.feature, site.what, "refused", failure(error)))
                if strict:
                    raise PatchError("nothing was patched: " + _problem(rows[-1])) from error
            else:
                handle._applied.append((adapter, site, key))
    except BaseException:
        for applied in reversed(done):
            _take_back(*applied)
        raise
    if not handle._applied and not handle._present:
        warnings.warn(
            f"patch: nothing was patched in this {type(model).__name__}; see handle.report()",
            PatchWarning,
            stacklevel=2,
        )
    # Whoever asks for other answers must know that he does not get them.
    missed = [row for row in rows if features.get(row.feature) and wanted[row.feature].default is not True]
    if missed:
        why = "; ".join(map(_problem, missed))
        warnings.warn(f"patch: {why}: the answers are the stock ones", PatchWarning, stacklevel=2)
    return handle


def _problem(row: Row) -> str:
    return f"{row.module or '(model)'}: {row.feature}: {row.detail}"


def _take_back(site: Site, key: tuple[str, str], editor: Editor) -> None:
    editor.roll_back()
    getattr(attachment(site.module), "edits", {}).pop(key, None)
    detach_if_empty(site.module)


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
