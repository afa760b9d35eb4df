"""RMSNorms of the vision and language models in one pass over their rows: Qwen's, Llama's, InternViT-6B's, GPT-OSS's.

Which classes those are is judged by what they compute; a layer whose parameters may not be read is called as it is.
torch's own LayerNorm is one pass already. The q/k norms of language models are the rotary embedding's (`rope`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .._checks import KERNEL_FLOATS
from .._library import recorded
from ..models.plain import not_plain, rms_norm
from ..models.upstream import class_of, forward_name, replaced_before
from ..ops import rms_norm as fused
from ._edit import Editor
from ._patch import Adapter, Feature, Site
from ._report import serving
from .linear import roots

# Rows that torch's six small operations take no longer for than one call from Python, on a CPU.
_FEW = 16


def _forward(kind: Any, backend: str) -> Callable[..., Any]:
    stock, rounding = kind.forward, _rounding(kind)
    eps = rms_norm(kind, rounding)[0]

    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        x: Any = args[0] if args else None
        if len(args) != 1 or kwargs or kind.forward is not stock or not _serves(x) or not_plain(self, kind, ""):
            return inner(self, *args, **kwargs)
        weight = self.weight
        if weight.dtype != x.dtype or weight.device != x.device or weight.shape != x.shape[-1:]:
            return inner(self, *args, **kwargs)
        return fused(x, weight, getattr(self, eps), rounding=rounding, backend=backend)

    return forward


def _serves(x: Any) -> bool:
    if recorded():
        return False
    if type(x) is not torch.Tensor or x.dim() == 0 or x.device.type not in ("cpu", "cuda"):
        return False
    enough = x.is_cuda or x.numel() > _FEW * x.shape[-1]
    return x.shape[-1] > 0 and enough and x.dtype in KERNEL_FLOATS


def _rounding(kind: Any) -> str:
    """Where a class of RMSNorm rounds, "" for what is none."""
    return next((where for where in ("before_weight", "after_weight") if not rms_norm(kind, where)[1]), "")


def _is_norm(module: Any) -> bool:
    lone = list(module._parameters) == ["weight"] and not module._modules
    return lone and "Norm" in class_of(module).__name__ and _rounding(class_of(module)) != ""


def _norms(root: Any, liger: bool = False) -> list[Any]:
    """The RMSNorms that Liger-Kernel serves, or all others."""
    found = (m for m in root.modules() if _is_norm(m) and not replaced_before(m, forward_name(m)))
    return [m for m in found if class_of(m).__module__.startswith("liger_kernel.") == liger]


class Norms(Adapter):
    features = {"norms": Feature(True, "RMSNorms in one pass over their rows")}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, root in roots(model):
            if found := _norms(root):
                yield Site("norms", path, root, f"{len(found)} RMSNorms")
            elif theirs := _norms(root, liger=True):
                yield Site("norms", path, root, f"{len(theirs)} RMSNorms", "Liger-Kernel's serve", upstream=True)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        made: dict[Any, Any] = {}
        for norm in _norms(site.module):
            kind: Any = class_of(norm)
            if kind not in made:
                made[kind] = _forward(kind, options["backend"])
            edit.method(norm, forward_name(norm), made[kind])

    def serving(self, site: Site) -> str:
        found = _norms(site.module)
        return serving("norm", *found) if found else "upstream's own code: its norms are others now"


ADAPTER = Norms()
