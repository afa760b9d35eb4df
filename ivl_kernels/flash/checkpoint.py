"""The modules that Flash adds to a model, and how they are read from a checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..models.families import FLASH, Transformers, family_of
from ..nn.router import TileRouter

_KEY = re.compile(rf"^(?:model\.)?(?:flash\.)?((?:{'|'.join(FLASH)})\..*)$")


def _renamed() -> dict[str, tuple[str, ...]]:
    blocks, attentions = (
        [f"{kind}{i}" for i in range(1, 5)] for kind in ("gating.block", "pooling_before_gating.attn")
    )
    table: dict[str, tuple[str, ...]] = {}
    for leaf in ("weight", "bias"):
        for layer, name in ((0, "norm"), (1, "dense1"), (4, "dense2"), (7, "dense3")):
            table[f"mlp2.{layer}.{leaf}"] = (f"mlp2.{name}.{leaf}",)
        for block in blocks:
            for layer, name in ((0, "dense_in"), (3, "dense_out"), (5, "norm")):
                table[f"{block}.{layer}.{leaf}"] = (f"{block}.{name}.{leaf}",)
        for layer, name in ((0, "gate_norm"), (1, "gate_proj")):
            table[f"gating.gate.{layer}.{leaf}"] = (f"gating.{name}.{leaf}",)
        for attention in attentions:
            table[f"{attention}.in_proj_{leaf}"] = tuple(
                f"{attention}.{name}.{leaf}" for name in ("query", "key", "value")
            )
    return table


# Released name: the names in the layout of transformers' pull request 42166; several are laid end to end in this order.
_RENAMED = _renamed()


class FlashVision(nn.Module):
    """The modules that Flash adds to an InternVL model, for transformers-native ones, which have no Flash of their own.

    Its parameters have the names of the released checkpoints: `mlp2.*`, `pooling_before_gating.*`, `gating.*`.

    Args:
        vision_width: hidden size C of the vision transformer.
        hidden: hidden size H of the language model.
        relative_threshold, absolute_threshold: of the decision rule; from the checkpoint's config.json. No defaults.
        heads: of the router's attentions.
        dropout: of `mlp2` and `gating` in train mode.
        device, dtype: of the parameters.

    Example:
        flash = FlashVision.from_pretrained("InternVL3_5-1B-Flash", dtype=model.dtype)
        flash.attach(model)
        handle = ivl_kernels.patch(model)
    """

    def __init__(
        self,
        vision_width: int,
        hidden: int,
        relative_threshold: float,
        absolute_threshold: float,
        *,
        heads: int = 16,
        dropout: float = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide, inner = vision_width * 16, 2 * hidden
        self.mlp2 = nn.Sequential(
            nn.LayerNorm(wide, **factory),
            nn.Linear(wide, inner, **factory),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(inner, inner, **factory),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(inner, hidden, **factory),
        )
        router = TileRouter(vision_width, heads, dropout, **factory)
        self.pooling_before_gating, self.gating = router.pooling_before_gating, router.gating
        self.relative_threshold, self.absolute_threshold = float(relative_threshold), float(absolute_threshold)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        relative_threshold: float | None = None,
        absolute_threshold: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> FlashVision:
        """Read the Flash modules out of a checkpoint folder (safetensors, in one file or sharded with an index).

        Takes a released Flash checkpoint (`mlp2.*`, ...), a native model saved with its `FlashVision` attached
        (`flash.mlp2.*` or `model.flash.mlp2.*`, ...), and either under the names of transformers' pull request 42166
        (`model.mlp2.dense1.*`, attentions as query, key and value). Only the tensors needed are read.

        Args:
            folder: the checkpoint.
            relative_threshold, absolute_threshold: instead of those of config.json.
            device, dtype: of the result; dtype None: as stored.

        Raises:
            ValueError: there are no thresholds, a tensor is missing, extra or of another shape, or the checkpoint's
                pixel shuffle is not the one native models compute. Nothing is guessed.
        """
        folder = os.fspath(folder)
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        thresholds = []
        for name, given in (("relative", relative_threshold), ("absolute", absolute_threshold)):
            value = given if given is not None else config.get(f"flash_{name}_threshold")
            if value is None:
                raise ValueError(
                    f"{name}_threshold: {folder}/config.json has no flash_{name}_threshold, and nothing is assumed: "
                    "pass it"
                )
            thresholds.append(value)
        if config.get("ps_version", "v2") != "v2":
            raise ValueError(
                f"ps_version: {folder}/config.json has {config['ps_version']!r}, native models compute 'v2'"
            )
        tensors = _read_tensors(folder)
        if not tensors:
            raise ValueError(f"folder: {folder} holds no Flash modules ({', '.join(g + '.*' for g in FLASH)})")
        names = cls(16, 1, *thresholds, device="meta").state_dict()
        layouts = [{name: table.get(name, (name,)) for name in names} for table in ({}, _RENAMED)]
        absent = [[part for parts in layout.values() for part in parts if part not in tensors] for layout in layouts]
        layout, missing = min(zip(layouts, absent), key=lambda both: len(both[1]))
        known = {part for parts in layout.values() for part in parts}
        problems = [f"{name} is missing" for name in missing]
        problems += [f"{name} is not expected" for name in tensors if name not in known]
        if not missing:
            last, gate = (tensors[layout[name][0]] for name in ("mlp2.7.weight", "gating.gate.1.weight"))
            dtype = dtype or last.dtype
            self = cls(gate.shape[1], last.shape[0], *thresholds, device="meta", dtype=dtype)
            for name, whole in self.state_dict().items():
                parts = layout[name]
                problems += [
                    f"{part} is {list(tensors[part].shape)}, expected {list(expected.shape)}"
                    for part, expected in zip(parts, whole.chunk(len(parts)))
                    if tensors[part].shape != expected.shape
                ]
        if problems:
            raise ValueError(f"folder: {folder} does not fit: {'; '.join(problems[:5])} ({len(problems)} in all)")
        values = {
            name: tensors[parts[0]] if len(parts) == 1 else torch.cat([tensors[part] for part in parts])
            for name, parts in layout.items()
        }
        self.load_state_dict({n: t.to(device=device, dtype=dtype) for n, t in values.items()}, assign=True)
        return self

    def attach(self, model: nn.Module) -> None:
        """Make this the model's submodule `flash`, so that it moves, saves and trains with it.

        Sets `flash_mode` and the thresholds in the model's config. The model behaves as before until it is patched.

        Raises:
            TypeError: not a transformers-native `InternVLForConditionalGeneration`.
            ValueError: the widths do not fit the model.
        """
        m: Any = model
        family = family_of(model)
        if not isinstance(family, Transformers) or family.core is model:
            raise TypeError(f"model: got {type(model).__name__}, expected InternVLForConditionalGeneration")
        config = m.config
        wanted = (config.vision_config.hidden_size * 16, config.text_config.hidden_size)
        got = (self.mlp2[0].normalized_shape[0], self.mlp2[7].out_features)
        if got != wanted:
            raise ValueError(
                f"model: its mlp2 would take {wanted[0]} and give {wanted[1]}, this one {got[0]} and {got[1]}"
            )
        m.flash = self.train(m.training)
        config.flash_mode = True
        config.flash_relative_threshold = self.relative_threshold
        config.flash_absolute_threshold = self.absolute_threshold


def _read_tensors(folder: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    index = os.path.join(folder, "model.safetensors.index.json")
    single = os.path.join(folder, "model.safetensors")
    files: Mapping[str, list[str]] = {}
    if os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            located = json.load(file)["weight_map"]
        files = {name: [k for k, v in located.items() if v == name] for name in dict.fromkeys(located.values())}
    elif os.path.exists(single):
        with safe_open(single, "pt") as opened:
            files = {"model.safetensors": list(opened.keys())}
    else:
        raise ValueError(f"folder: {folder} has neither model.safetensors nor model.safetensors.index.json")
    tensors = {}
    for name, keys in files.items():
        wanted = [(key, match[1]) for key in keys if (match := _KEY.match(key))]
        if wanted:
            with safe_open(os.path.join(folder, name), "pt") as opened:
                tensors.update({short: opened.get_tensor(key) for key, short in wanted})
    return tensors
