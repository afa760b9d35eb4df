"""Upstreams that do not exist: today's modules with their text changed, executed beside the real ones.

A tiny model is built from the real classes, then every instance gets the class of the same name from the changed
module. No file, class or namespace of transformers is touched, and no code under test is used.
"""

import importlib
import linecache
import re
import types

import pytest
import transformers

_MADE = {}


def source(name):
    module = importlib.import_module(name)
    with open(module.__file__) as file:
        return module, file.read()


def changed(name, edit):
    """The module `name` with `edit(text)` for its text."""
    real, text = source(name)
    text = edit(text)
    if (name, text) not in _MADE:
        made = types.ModuleType(name)
        made.__dict__.update(__package__=real.__package__, __file__=real.__file__, __spec__=real.__spec__)
        # A decorator of transformers reads the model's name out of the path, so the folder stays.
        path = re.sub(r"(\w+)\.py$", rf"\1_changed_{len(_MADE)}.py", real.__file__)
        linecache.cache[path] = (len(text), None, text.splitlines(True), path)
        exec(compile(text, path, "exec"), made.__dict__)
        _MADE[name, text] = made
    return _MADE[name, text]


def become(model, module):
    """Every instance of a class of the real module gets the class of that name in the changed one."""
    for part in model.modules():
        if type(part).__module__ == module.__name__ and hasattr(module, type(part).__name__):
            part.__class__ = getattr(module, type(part).__name__)
    return model


def edit(*changes, within=None):
    """Replaces patterns in a module's text, or in its class `within`; skips the test where one is not there."""

    def apply(text):
        start, end = 0, len(text)
        if within is not None:
            start = text.find(f"class {within}(")
            if start < 0:
                pytest.skip(f"transformers {transformers.__version__}: no class {within}")
            following = re.compile(r"^(@|class |def |__all__)", re.MULTILINE).search(text, text.index("\n", start))
            end = following.start() if following else len(text)
        body = text[start:end]
        for old, new in changes:
            body, found = re.subn(old, new, body)
            if not found:
                where = within or "the module"
                pytest.skip(f"transformers {transformers.__version__}: nothing like {old!r} in {where}")
        return text[:start] + body + text[end:]

    return apply


def both(*edits):
    def apply(text):
        for change in edits:
            text = change(text)
        return text

    return apply
