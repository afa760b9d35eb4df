"""MLPs of the vision and language models in one op, which keeps no [tokens, inner] in memory (CPU).

What an MLP is, and whether the package's product is the faster one for this many rows, is asked at every call; anything
but plain layers on CPU tensors of their own dtype is upstream's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import _native
from .._checks import KERNEL_FLOATS
from .._library import counted, recorded
from ..models.plain import is_mlp
from ..models.plain import mlp as layers_of
from ..models.upstream import forward_name, replaced_before
from ..ops import gated_mlp, mlp
from ..ops.linear import choice
from ._edit import Editor
from ._patch import Adapter, Feature, Site
from .linear import roots


def _forward(backend: str) -> Any:
    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        x: Any = args[0] if args else None
        layers = layers_of(self) if len(args) == 1 and not kwargs and _serves(x) else ""
        if isinstance(layers, str) or not _fits(x, layers.up.weight):
            return inner(self, *args, **kwargs)
        gate, up, down = layers
        if gate is not None:
            return gated_mlp(x, gate.weight, up.weight, down.weight, backend=backend)
        return mlp(x, up.weight, down.weight, up.bias, down.bias, backend=backend)

    return forward


def _serves(x: Any) -> bool:
    if recorded() or counted() or torch.is_autocast_enabled("cpu"):
        return False
    if type(x) is not torch.Tensor or x.device.type != "cpu" or x.dim() == 0:
        return False
    return x.dtype in KERNEL_FLOATS and choice.own(x.dtype, x.numel() // max(x.shape[-1], 1))


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype == weight.dtype and x.device == weight.device and x.shape[-1] == weight.shape[1]


def _mlps(root: nn.Module) -> list[Any]:
    return [m for m in root.modules() if is_mlp(m) and not replaced_before(m, forward_name(m))]


class Mlp(Adapter):
    features = {"mlp": Feature(True, "MLPs in one op, without all their activations in memory (CPU)")}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, root in roots(model):
            found = _mlps(root)
            if not found:
                continue
            devices = {p.device.type for module in found for p in module.parameters()} - {"cpu", "meta"}
            reason = _native.problem() or (f"on {min(devices)} the BLAS serves" if devices else "")
            yield Site("mlp", path, root, f"{len(found)} MLPs", reason, upstream=True)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        for module in _mlps(site.module):
            edit.method(module, forward_name(module), _forward(options["backend"]))

    def serving(self, site: Site) -> str:
        found = _mlps(site.module)
        if not found:
            return "upstream's own code: its layers are others now"
        dtype = next(found[0].parameters()).dtype
        name = str(dtype).removeprefix("torch.")
        return f"{name}: {choice.explained(dtype)}" if dtype in KERNEL_FLOATS else f"upstream's own code for {name}"


ADAPTER = Mlp()
