"""Half a model of a checkpoint folder: the vision side without a language model, and the other way round."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from .families import FAMILIES, FLASH, Family, Transformers
from .remote_code import enable_remote_code


def family_class(folder: str) -> type[Family]:
    """The family of a checkpoint by its config.json.

    Raises:
        ValueError: another model.
    """
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        found = json.load(file).get("model_type")
    for family in FAMILIES:
        if family.model_type == found:
            return family
    wanted = " or ".join(repr(family.model_type) for family in FAMILIES)
    raise ValueError(f"folder: {folder}/config.json has model_type {found!r}, expected {wanted}")


def _model_class(folder: str, kind: type[Family], trust_remote_code: bool) -> Any:
    if kind is Transformers:
        import transformers

        return transformers.InternVLForConditionalGeneration
    if not trust_remote_code:
        raise ValueError(f"folder: {folder} brings its own code, expected trust_remote_code=True to run it")
    return enable_remote_code(folder)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory; buffers are real."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def vision_half(folder: str, kind: type[Family], trust_remote_code: bool) -> Any:
    """The model of a checkpoint's config without its language model; parameters are on the meta device."""
    model_class = _model_class(folder, kind, trust_remote_code)
    with _parameters_on_meta():
        model = model_class(model_class.config_class.from_pretrained(folder))
    kind(model).drop_language()
    return model


def language_half(folder: str, kind: type[Family], trust_remote_code: bool, **options: Any) -> Any:
    """A checkpoint's model, loaded by transformers without its vision side.

    The layers of the tower are never built; what else of the vision side its class makes is dropped again.

    Args:
        options: of `from_pretrained`.

    Raises:
        ValueError: the checkpoint has not all tensors of the language model.
    """
    base = _model_class(folder, kind, trust_remote_code)
    config = base.config_class.from_pretrained(folder)
    layers, config.vision_config.num_hidden_layers = config.vision_config.num_hidden_layers, 0
    known = [*(getattr(base, "_keys_to_ignore_on_load_unexpected", None) or ())]
    known += [rf"(^|\.){name}\." for name in (kind.vision_name, "flash", *FLASH)]
    # In upstream's module, since it converts tensors' names for its own classes alone.
    changed = {"_keys_to_ignore_on_load_unexpected": known, "__module__": base.__module__}
    without: Any = type(base.__name__, (base,), changed)
    model, report = without.from_pretrained(folder, config=config, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"folder: {folder} has no {', '.join(missing[:5])} ({len(missing)} in all)")
    model.config.vision_config.num_hidden_layers = layers
    kind(model).drop_vision()
    return model
