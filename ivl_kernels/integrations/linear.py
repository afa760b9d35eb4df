"""The linear layers of the vision and language models on the package's own matrix product, where it is the faster one.

What a layer is, and which product is faster for this many rows, is asked at every call; anything but a plain layer on
CPU tensors of its own dtype is upstream's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import _cpu
from .._checks import KERNEL_FLOATS
from .._library import recorded
from .._plan import counted
from ..models.families import Family, families_in, text_stacks
from ..models.plain import class_changed
from ..models.upstream import forward_name, replaced_before
from ..ops import linear
from ..ops.linear import choice
from ._edit import Editor
from ._patch import Adapter, Feature, Site


def _forward(backend: str) -> Any:
    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = args[0] if args else kwargs.get("input")
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if len(args) + len(kwargs) != 1 or not _serves(x, weight, bias):
            return inner(self, *args, **kwargs)
        return linear(x, weight, bias, backend=backend)

    return forward


def _serves(x: Any, weight: Any, bias: Any) -> bool:
    plain = type(x) is torch.Tensor and type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    if not plain or x.device.type != "cpu" or weight.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    if bias is not None and bias.dtype != x.dtype or x.dtype not in KERNEL_FLOATS:
        return False
    if recorded() or torch.is_autocast_enabled("cpu"):
        return False
    # A class or a call that somebody else has changed or counts.
    if class_changed(nn.Linear) or counted():
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    return x.dim() > 0 and x.shape[-1] == weight.shape[1] and choice.own(x.dtype, x.numel() // max(x.shape[-1], 1))


def _layers(root: nn.Module) -> list[Any]:
    return [m for m in root.modules() if type(m) is nn.Linear and not replaced_before(m, forward_name(m))]


def _parts(family: Family) -> Iterator[nn.Module]:
    """Vision transformer, language model and head, as far as a model has them."""
    if family.has_vision:
        yield family.vision
    if family.language is not None:
        yield family.language
        if family.head is not None:
            yield family.head


def roots(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the vision transformers, language models and heads; of a language model alone, the whole."""
    names = {id(module): path for path, module in model.named_modules()}
    families = list(families_in(model))
    for _, family in families:
        seen: set[int] = set()
        for part in _parts(family):
            if id(part) not in seen:
                seen |= {id(module) for module in part.modules()}
                yield names[id(part)], part
    if not families and any(True for _ in text_stacks(model)):
        yield "", model


class Linear(Adapter):
    features = {
        "linear": Feature(True, "linear layers on the package's own matrix product where it is faster (CPU)"),
    }

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, root in roots(model):
            layers = _layers(root)
            reason = _cpu.problem() or ("" if layers else "no plain linear layer")
            if layers and all(layer.weight.device.type not in ("cpu", "meta") for layer in layers):
                reason = f"on {layers[0].weight.device.type} the BLAS serves"
            yield Site("linear", path, root, f"{len(layers)} linear layers", reason or "", upstream=True)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        for layer in _layers(site.module):
            edit.method(layer, forward_name(layer), _forward(options["backend"]))

    def serving(self, site: Site) -> str:
        dtypes = sorted({layer.weight.dtype for layer in _layers(site.module)}, key=str)
        return "; ".join(f"{str(dtype).removeprefix('torch.')}: {choice.explained(dtype)}" for dtype in dtypes)


ADAPTER = Linear()
