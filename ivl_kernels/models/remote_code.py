"""Loading remote-code checkpoints (`InternVLChatModel`) under transformers 5."""

from __future__ import annotations

import functools
import json
import os
from typing import Any


def enable_remote_code(model: type | str | os.PathLike[str]) -> type:
    """Make a remote-code InternVL class loadable by `from_pretrained` under transformers 5.

    The published code never calls `post_init()`, where transformers 5 collects the tied weights, so loading fails with
    "object has no attribute 'all_tied_weights_keys'". This wraps the class's `__init__` so that `post_init()` runs at
    its end if the class forgot it; weights, tied ones included, then load as under transformers 4. Classes that call
    `post_init()`, and transformers 4, are not affected.

    Args:
        model: the class, or a local checkpoint folder. Given a folder, **its code is executed**, as with
            `trust_remote_code=True`.

    Returns:
        The class. `enable_remote_code(folder).from_pretrained(folder)` loads; so does `AutoModel.from_pretrained(
        folder, trust_remote_code=True)` afterwards in this process.

    Raises:
        ValueError: the folder's config.json names no remote code for AutoModel.
    """
    cls = model if isinstance(model, type) else _remote_class(os.fspath(model))
    if "_ivl_post_init" in vars(cls):
        return cls
    original = cls.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # A subclass with an __init__ of its own is not complete yet.
        if type(self).__init__ is cls.__init__ and not hasattr(self, "all_tied_weights_keys"):  # type: ignore[misc]
            self.post_init()  # type: ignore[attr-defined]

    cls.__init__ = __init__  # type: ignore[misc]
    cls._ivl_post_init = True  # type: ignore[attr-defined]
    return cls


def _remote_class(folder: str) -> type:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        reference = json.load(file).get("auto_map", {}).get("AutoModel")
    if reference is None:
        raise ValueError(f"model: {folder}/config.json has no auto_map entry for AutoModel, so there is no remote code")
    return get_class_from_dynamic_module(reference, folder)
