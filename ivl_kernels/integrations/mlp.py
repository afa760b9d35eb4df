"""MLPs of the vision and language models in one op: on a CPU without a [tokens, inner] in memory, on a GPU SwiGLU's
activation in one kernel between the vendor's products (GELU is one already, and stays).

What an MLP is, and on a CPU whether the package's product is the faster one for this many rows, is asked at every call;
anything but plain layers on tensors of their own dtype is upstream's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import _cpu, _gpu
from .._checks import KERNEL_FLOATS
from .._library import recorded
from .._plan import counted
from ..models.plain import is_mlp
from ..models.plain import mlp as layers_of
from ..models.upstream import forward_name, replaced_before
from ..ops import gated_mlp, mlp
from ..ops.linear import choice
from ._edit import Editor
from ._patch import Adapter, Feature, Site
from ._report import serving
from .linear import roots


def _forward(backend: str) -> Any:
    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        x: Any = args[0] if args else None
        layers = layers_of(self) if len(args) == 1 and not kwargs and _serves(x) else ""
        if isinstance(layers, str) or not _fits(x, layers.up.weight):
            return inner(self, *args, **kwargs)
        gate, up, down = layers
        if gate is None and _on_gpu(x):
            return inner(self, *args, **kwargs)
        if gate is not None:
            return gated_mlp(x, gate.weight, up.weight, down.weight, backend=backend)
        return mlp(x, up.weight, down.weight, up.bias, down.bias, backend=backend)

    return forward


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda or _gpu.preferred()


def _serves(x: Any) -> bool:
    if recorded() or counted() or type(x) is not torch.Tensor or x.dim() == 0 or x.dtype not in KERNEL_FLOATS:
        return False
    if x.device.type not in ("cpu", "cuda") or torch.is_autocast_enabled(x.device.type):
        return False
    return _on_gpu(x) or choice.own(x.dtype, x.numel() // max(x.shape[-1], 1))


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype == weight.dtype and x.device == weight.device and x.shape[-1] == weight.shape[1]


def _mlps(root: nn.Module) -> list[Any]:
    return [m for m in root.modules() if is_mlp(m) and not replaced_before(m, forward_name(m))]


def _reason(found: list[Any]) -> str:
    """Why upstream's code is as good for these MLPs, or ""."""
    devices = {p.device.type for module in found for p in module.parameters()} - {"cpu", "meta"}
    if not devices:
        return "" if _gpu.preferred() else _cpu.problem() or ""
    if others := devices - {"cuda"}:
        return f"on {min(others)} upstream's code serves"
    plain = all(isinstance(layers := layers_of(m), tuple) and layers.gate is None for m in found)
    return "GELU is one kernel of torch's on a GPU, as here" if plain else ""


class Mlp(Adapter):
    features = {"mlp": Feature(True, "MLPs in one op: no [tokens, inner] in memory (CPU), one kernel for SwiGLU (GPU)")}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, root in roots(model):
            found = _mlps(root)
            if not found:
                continue
            yield Site("mlp", path, root, f"{len(found)} MLPs", _reason(found), upstream=True)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        for module in _mlps(site.module):
            edit.method(module, forward_name(module), _forward(options["backend"]))

    def serving(self, site: Site) -> str:
        found = _mlps(site.module)
        if not found:
            return "upstream's own code: its layers are others now"
        first = next(found[0].parameters())
        if _on_gpu(first):
            return serving("mlp", *found)
        dtype = first.dtype
        name = str(dtype).removeprefix("torch.")
        return f"{name}: {choice.explained(dtype)}" if dtype in KERNEL_FLOATS else f"upstream's own code for {name}"


ADAPTER = Mlp()
