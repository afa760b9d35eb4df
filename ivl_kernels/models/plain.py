"""May a layer be read instead of called? One answer, by what the layer is at the time of the question."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

from .upstream import describe, forward_name, replaced_before

_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def watched(module: nn.Module) -> str:
    """Who would see what goes into or comes out of this module: its hooks, those of all modules; "" for nobody."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    return "is seen by global module hooks" if any(_GLOBAL_HOOKS) else ""


def _only_moves_inputs(module: nn.Module) -> bool:
    """An accelerate hook that keeps the weights where they are (models spread over devices)."""
    hook = getattr(module, "_hf_hook", None)
    return type(hook).__name__ == "AlignDevicesHook" and not getattr(hook, "offload", True)


def not_plain(module: nn.Module, kind: type[nn.Module], name: str) -> str:
    """Why reading the parameters of `module` would not be the same as calling it; "" when it would.

    Catches LoRA and quantised layers (another class), parametrizations, hooks, offloading and tensor subclasses.
    """
    if type(module) is not kind:
        return f"{name} is a {type(module).__module__}.{type(module).__name__}, not a plain {kind.__name__}"
    if replaced_before(module, forward_name(module)):
        return f"{name}.forward was replaced by {describe(module.__dict__[forward_name(module)])}"
    if "_hf_hook" in module.__dict__ and not _only_moves_inputs(module):
        return f"{name} has accelerate's {type(module._hf_hook).__name__}"
    why = watched(module)
    if why:
        return f"{name} {why}"
    for parameter_name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"{name}.{parameter_name} is a {type(parameter).__name__}"
        if parameter is not None and parameter.device.type == "meta":
            return f"{name}.{parameter_name} is on the meta device (offloaded)"
    return ""


def gives_new_memory(layer: nn.Module) -> bool:
    """Whether nobody but its caller can hold what this layer returns: plain, and nobody watches. Without autograd."""
    return type(layer) is nn.Linear and not not_plain(layer, nn.Linear, "")


@functools.cache
def rms_norm(kind: type[nn.Module]) -> tuple[str, str]:
    """(name of the attribute that holds eps, "") of a class of RMSNorm, or ("", why it is none as we know it).

    Judged by what it computes: normalised in float32, rounded to the input's dtype, times the weight in that dtype.
    """
    eps = 0.375
    try:
        with torch.device("cpu"), torch.no_grad():
            norm: Any = kind(8, eps=eps).float()
            weight = torch.linspace(0.3, 1.7, 8)
            (parameter,) = norm.parameters()
            parameter.copy_(weight)
            x = torch.linspace(-2, 3, 24).view(3, 8)
            for dtype in (torch.float32, torch.bfloat16):
                given = x.to(dtype)
                wide = given.float()
                normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
                if not torch.equal(norm.to(dtype)(given), weight.to(dtype) * normal.to(dtype)):
                    return "", f"{kind.__name__} computes something else"
    except Exception as error:
        return "", f"{kind.__name__} is not an RMSNorm as we know it ({error})"
    names = [name for name, value in vars(norm).items() if type(value) is float and value == eps]
    return (names[0], "") if len(names) == 1 else ("", f"{kind.__name__} does not keep its eps")
