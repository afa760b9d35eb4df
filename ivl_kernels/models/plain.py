"""May a layer's parameters be read instead of the layer being called?"""

from __future__ import annotations

from torch import nn

from .upstream import describe, replaced_before


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
    if replaced_before(module, "forward") and not _only_moves_inputs(module):
        return f"{name}.forward was replaced by {describe(module.__dict__['forward'])}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    for parameter_name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"{name}.{parameter_name} is a {type(parameter).__name__}"
        if parameter is not None and parameter.device.type == "meta":
            return f"{name}.{parameter_name} is on the meta device (offloaded)"
    return ""
