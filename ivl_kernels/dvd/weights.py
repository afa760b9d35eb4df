"""The vision side's tensors: their names in a checkpoint and in a model, and the fingerprint of weights and rules."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..flash import FlashVision
from ..models.families import FLASH, Family, RemoteCode, Transformers
from ..ops.tile_image import MEAN, STD


def parts_of(family: Family) -> dict[str, nn.Module]:
    """The modules of the vision side by the names that a checkpoint of the family has for them."""
    parts = {family.vision_name: family.vision, family.projector_name: family.projector}
    holder = family.flash_holder
    if holder is not None:
        parts |= {name: getattr(holder, name) for name in FLASH if hasattr(holder, name)}
    return parts


Read = Callable[[], Tensor]


def stored(folder: str, kind: type[Family]) -> dict[str, dict[str, Read]]:
    """Of a checkpoint (safetensors, one file or several): part -> name -> what reads that tensor, and only that."""
    from safetensors import safe_open

    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            where = json.load(file)["weight_map"]
    elif os.path.exists(os.path.join(folder, "model.safetensors")):
        with safe_open(os.path.join(folder, "model.safetensors"), "pt") as opened:
            where = dict.fromkeys(opened.keys(), "model.safetensors")
    else:
        raise ValueError(f"folder: {folder} has neither model.safetensors nor model.safetensors.index.json")

    def read(key: str) -> Tensor:
        with safe_open(os.path.join(folder, where[key]), "pt") as opened:
            return opened.get_tensor(key)

    flash = "|".join(FLASH) if kind is RemoteCode else "(?!)"  # the other family's are renamed on reading
    names = re.compile(rf"^(?:model\.)?(?P<part>{kind.vision_name}|{kind.projector_name}|{flash})\.(?P<name>.+)$")
    found: dict[str, dict[str, Read]] = {}
    for key in where:
        match = names.match(key)
        if match:
            found.setdefault(match["part"], {})[match["name"]] = lambda key=key: read(key)  # type: ignore[misc]
    if kind is Transformers and any(re.search(r"(^|\.)mlp2\.", key) for key in where):
        state = FlashVision.from_pretrained(folder).state_dict()
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            found.setdefault(part, {})[rest] = lambda tensor=tensor: tensor  # type: ignore[misc]
    return found


def held(family: Family) -> dict[str, dict[str, Read]]:
    """The same of a model in memory."""
    return {
        part: {name: (lambda tensor=tensor: tensor) for name, tensor in module.state_dict().items()}  # type: ignore[misc]
        for part, module in parts_of(family).items()
    }


def fingerprint_of(parts: Mapping[str, Mapping[str, Read]], rules: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of tensors, as bfloat16 has them, and rules: the same in whatever dtype they are loaded."""
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
    for part in sorted(parts):
        for name in sorted(parts[part]):
            tensor = parts[part][name]().detach().to("cpu")
            tensor = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            digest.update(f"{part}.{name} {list(tensor.shape)}".encode())
            digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def rules_of(family: Family, flash: bool) -> dict[str, Any]:
    """What besides weights decides the rows of a photograph."""
    rules: dict[str, Any] = {
        "family": family.class_name,
        "tokens": family.tokens_a_tile,
        "pixels": family.tile_pixels,
        "merge": family.merge,
        "order": family.order,
        "normalisation": [*MEAN, *STD],
    }
    if flash:
        settings = family.flash_settings
        names = ("flash_relative_threshold", "flash_absolute_threshold")
        rules["thresholds"] = [getattr(settings, name, None) for name in names]
    return rules


def load_parts(family: Family, found: Mapping[str, Mapping[str, Read]], dtype: torch.dtype | None) -> None:
    """Fill the modules of the vision side with a checkpoint's tensors.

    Raises:
        ValueError: one is missing, extra or of another shape.
    """
    parts = parts_of(family)
    problems = [f"{part} is not expected" for part in found if part not in parts]
    for part, module in parts.items():
        expected, given = module.state_dict(), found.get(part, {})
        problems += [f"{part}.{name} is missing" for name in expected if name not in given]
        problems += [f"{part}.{name} is not expected" for name in given if name not in expected]
        if problems:
            continue
        tensors = {name: given[name]() for name in expected}
        shapes = [(name, tensors[name].shape, expected[name].shape) for name in expected]
        problems += [f"{part}.{n} is {list(a)}, expected {list(b)}" for n, a, b in shapes if a != b]
        if not problems:
            values = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
            module.load_state_dict(values, assign=True)
    if problems:
        raise ValueError(f"folder: it does not fit: {'; '.join(problems[:5])} ({len(problems)} in all)")
