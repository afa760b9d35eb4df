"""May a layer be read instead of called? One answer, by what the layer is at the time of the question."""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as _module

from .._library import transformed
from .upstream import class_of, describe, forward_name, replaced_before

_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


# What these layers compute unless somebody changes their class.
_STOCK = {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.GELU, nn.Sequential)}


def class_changed(kind: Any) -> str:
    """Who replaced the forward of one of torch's own layers for the whole process; "" for nobody."""
    same = kind not in _STOCK or kind.forward is _STOCK[kind]
    return "" if same else f"{kind.__name__}.forward was replaced by {describe(kind.forward)}"


def watched(module: nn.Module) -> str:
    """Who would see what goes into or comes out of this module: its hooks, those of all modules; "" for nobody."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(not _gathers(hook) for registered in hooks if registered for hook in registered.values()):
        return "has hooks"
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook
        if one is not None and type(one).__name__ != "AlignDevicesHook":
            return f"has a {type(one).__name__}"
    return "is seen by global module hooks" if any(_GLOBAL_HOOKS) else ""


def _gathers(hook: Any) -> bool:
    """A hook of `fully_shard`, which only gathers and shards parameters."""
    while hook is not None:  # decorated, and for a group of modules wrapped once more
        if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp._fully_shard."):
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False


def gathered_in_call(module: nn.Module) -> bool:
    """Whether `fully_shard` manages this module: its parameters are plain inside its unit's forward, and only there."""
    return getattr(module, "_is_fsdp_managed_module", False)


def gathered_later(module: nn.Module) -> bool:
    """Whether that is so without a call of the module: it is no unit of its own."""
    return class_of(module) is type(module) and gathered_in_call(module)


def intercepted(module: nn.Module, name: str) -> str:
    """Who would run besides the class's own forward if `module` were called; "" for nobody."""
    if replaced_before(module, forward_name(module)):
        return f"{name}.forward was replaced by {describe(module.__dict__[forward_name(module)])}"
    why = watched(module)
    return f"{name} {why}" if why else ""


def not_plain(module: nn.Module, kind: type[nn.Module], name: str, *, later: bool = False) -> str:
    """Why reading the parameters of `module` would not be the same as calling it; "" when it would.

    Catches LoRA and quantised layers (another class), parametrizations, hooks, offloading, tensor subclasses and
    transforms of torch.func.
    later: the question is about a call to come, for which `fully_shard` gathers what it shards.
    """
    if transformed():
        return f"{name} is under a torch.func transform"
    if type(module) is not kind:
        return f"{name} is a {type(module).__module__}.{type(module).__name__}, not a plain {kind.__name__}"
    why = intercepted(module, name) or class_changed(kind)
    if why:
        return why
    for parameter_name, parameter in module._parameters.items():
        if later and type(parameter).__name__ == "DTensor" and gathered_later(module):
            continue
        # A plain tensor: FSDP1 puts views of its flat parameter there.
        if parameter is not None and type(parameter) not in (nn.Parameter, torch.Tensor):
            return f"{name}.{parameter_name} is a {type(parameter).__name__}"
        if parameter is not None and parameter.device.type == "meta":
            return f"{name}.{parameter_name} is on the meta device (offloaded)"
    return ""


def gives_new_memory(layer: Any) -> bool:
    """Whether nobody but its caller can hold what this layer returns: plain, and nobody watches. Without autograd."""
    kind = type(layer)
    return kind in (nn.Linear, nn.Embedding) and not not_plain(layer, kind, "")


class LinearStack(NamedTuple):
    """A LayerNorm and linear layers with the exact GELU between them: all that a projector computes."""

    norm: nn.LayerNorm
    linears: tuple[nn.Linear, ...]


def is_exact_gelu(layer: nn.Module) -> bool:
    """Judged by what it computes: transformers has several classes for it."""
    if type(layer) is nn.GELU and not class_changed(nn.GELU):
        return layer.approximate == "none"
    if torch.compiler.is_compiling():  # computes nothing while it traces
        return type(layer).__name__ == "GELUActivation" and layer.__dict__.get("act") is nn.functional.gelu
    return _computes(layer, nn.functional.gelu)


def is_silu(layer: nn.Module) -> bool:
    """Judged by what it computes."""
    return _computes(layer, nn.functional.silu)


def _computes(layer: nn.Module, function: Any) -> bool:
    if replaced_before(layer, forward_name(layer)) or layer._modules or layer._parameters or layer._buffers:
        return False
    # All that its forward can depend on; the attributes of nn.Module itself begin with an underscore.
    own = tuple((name, value) for name, value in vars(layer).items() if name[0] != "_" and name != "training")
    key: Any = (type(layer).forward, function, own)
    try:
        if key not in _COMPUTED:
            _COMPUTED[key] = _agrees(layer, function)
        return _COMPUTED[key]
    except TypeError:  # an attribute that cannot be hashed
        return _agrees(layer, function)


_COMPUTED: dict[Any, bool] = {}


def _agrees(layer: nn.Module, function: Any) -> bool:
    try:
        with torch.device("cpu"), torch.no_grad():
            x = torch.linspace(-4, 4, 17, dtype=torch.float64)
            return bool(torch.allclose(type(layer).forward(layer, x), function(x), rtol=0, atol=1e-9))
    except Exception:
        return False


class _Step:
    """Stands for a layer or a tensor while a container's forward is asked in which order it calls its layers."""

    def __init__(self, name: str, before: Any = None) -> None:
        self.name, self.before = name, before

    def __call__(self, x: Any) -> Any:
        return _Step(self.name, x)

    def __mul__(self, other: Any) -> Any:
        return _Step("*", (self, other))


_ORDERS: dict[tuple[Any, ...], tuple[str, ...]] = {}
_GATED: dict[tuple[Any, ...], tuple[str, ...]] = {}


def _order(container: nn.Module) -> tuple[str, ...]:
    """Names of the layers that the container's forward calls one after the other, or () when it does anything else."""
    names = tuple(container._modules)
    kind = class_of(container)
    if kind is nn.Sequential and not class_changed(kind):
        return names
    key = (kind.forward, *names)  # a class may get another one
    if key not in _ORDERS:
        start = _Step("")
        try:
            # With nothing but the layers: a wrapper's forward (FSDP1) must not touch its module.
            value = kind.forward(types.SimpleNamespace(**{name: _Step(name) for name in names}), start)
            order: list[str] = []
            while value is not start:
                order.insert(0, value.name)
                value = value.before
        except Exception:
            order = []
        _ORDERS[key] = tuple(order) if len(set(order)) == len(order) else ()
    return _ORDERS[key]


def _gated_order(container: nn.Module) -> tuple[str, ...]:
    """Names of (gate, activation, up, down) where the forward is down(activation(gate(x)) * up(x)), or ()."""
    names = tuple(container._modules)
    kind = class_of(container)
    key = (kind.forward, *names)
    if key not in _GATED:
        start = _Step("")
        found: tuple[str, ...] = ()
        try:
            down = kind.forward(types.SimpleNamespace(**{name: _Step(name) for name in names}), start)
            for one, other in (down.before.before, down.before.before[::-1]):
                if down.before.name == "*" and one.before.before is start and other.before is start:
                    found = (one.before.name, one.name, other.name, down.name)
        except Exception:
            found = ()
        _GATED[key] = found if len(set(found)) == 4 and set(found) <= set(names) else ()
    return _GATED[key]


class Mlp(NamedTuple):
    """The linear layers of a transformer layer's MLP; with a gate it is SwiGLU, without the exact GELU is between."""

    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear


def _mlp_names(container: nn.Module) -> tuple[str, ...]:
    """Names of an MLP's activation and, in the order of `Mlp`, of its layers; () for what is none."""
    children = [isinstance(child, nn.Linear) for child in container.children()]
    if sorted(children) not in ([False, True, True], [False, True, True, True]):
        return ()
    if container._parameters:
        return ()
    if len(children) == 3:
        order = _order(container)
        return (order[1], order[0], order[2]) if len(order) == 3 else ()
    gated = _gated_order(container)
    return (gated[1], gated[0], *gated[2:]) if gated else ()


def is_mlp(container: nn.Module) -> bool:
    """Whether this module computes an MLP from its layers, whatever they are now."""
    return bool(_mlp_names(container))


def mlp(container: nn.Module) -> Mlp | str:
    """The layers of an MLP whose parameters may be read instead of calling it, or why it must be called."""
    modules: dict[str, Any] = container._modules
    names = _mlp_names(container)
    if not names:
        return f"{type(container).__name__} is neither linear, GELU, linear nor a gated MLP"
    act, *linears = names
    gated = len(linears) == 3
    why = intercepted(container, "the MLP") or intercepted(modules[act], act)
    why = why or next(filter(None, (not_plain(modules[name], nn.Linear, name) for name in linears)), "")
    if why:
        return why
    if not (is_silu if gated else is_exact_gelu)(modules[act]):
        return f"{act} is {modules[act]}, not the {'SiLU' if gated else 'exact GELU'}"
    layers = [modules[name] for name in linears]
    if gated and any(layer.bias is not None for layer in layers):
        return "its linear layers have biases"
    parameters = [p for layer in layers for p in layer._parameters.values() if p is not None]
    if len({(p.dtype, p.device) for p in parameters}) > 1:
        return "its parameters are of several dtypes or on several devices"
    up, down = layers[-2:]
    if any(layer.bias is not None and layer.bias.shape != layer.weight.shape[:1] for layer in layers):
        return "a bias does not have its layer's width"
    if up.out_features != down.in_features or gated and layers[0].weight.shape != up.weight.shape:
        return "its widths do not fit each other"
    return Mlp(layers[0] if gated else None, up, down)


def linear_stack(container: nn.Module, *, live_dropout: bool = False, later: bool = False) -> LinearStack | str:
    """The layers of a projector whose parameters may be read instead of calling it, or why it must be called.

    Recognised is LayerNorm, Linear, exact GELU, Linear, ..., Linear under any names and in any class, with dropout
    that is off (`live_dropout`: or on); parameters of one dtype (a mix is upstream's to compute) on one device.
    later: as in `not_plain`.
    """
    why = intercepted(container, "the projector")
    if why:
        return why
    layers: list[tuple[str, Any]] = [(name, container._modules[name]) for name in _order(container)]
    if not layers or any(True for _ in container.parameters(recurse=False)):
        return f"the projector is a {type(container).__name__} that does more than call its layers in turn"
    norm: Any = None
    linears: list[Any] = []
    active = True  # whether a linear may follow
    for name, layer in layers:
        if isinstance(layer, (nn.Dropout, nn.Identity)):
            why = intercepted(layer, name)
            if not (why or live_dropout) and isinstance(layer, nn.Dropout) and layer.training and layer.p > 0:
                why = f"{name} is a dropout that is live"
        elif norm is None:
            why, norm = not_plain(layer, nn.LayerNorm, name, later=later), layer
            if not why and (layer.weight is None or layer.bias is None or len(layer.normalized_shape) != 1):
                why = f"{name} has no weight or bias, or normalises more than one axis"
        elif active:
            why, active = not_plain(layer, nn.Linear, name, later=later), False
            linears.append(layer)
            if not why and layer.bias is None:
                why = f"{name} has no bias"
        else:
            why, active = intercepted(layer, name), True
            if not why and not is_exact_gelu(layer):
                why = f"{name} is {layer}, not the exact GELU"
        if why:
            return why
    if norm is None or not linears or active:
        return "the projector does not end in a linear layer behind a LayerNorm"
    parameters = [parameter for layer in (norm, *linears) for parameter in layer._parameters.values()]
    dtypes = {parameter.dtype for parameter in parameters}
    if len(dtypes) > 1:
        return f"its parameters are {' and '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
    if len({parameter.device for parameter in parameters}) > 1:
        return "its parameters are on several devices"
    widths = [norm.normalized_shape[0], *(linear.out_features for linear in linears)]
    if [linear.in_features for linear in linears] != widths[:-1]:
        return "its widths do not fit each other"
    return LinearStack(norm, tuple(linears))


def rms_norm(kind: type[nn.Module], rounding: str = "before_weight") -> tuple[str, str]:
    """(name of the attribute that holds eps, "") of a class of RMSNorm, or ("", why it is none as we know it).

    Judged by what it computes: normalised in float32, rounded to the input's dtype, times the weight in that dtype; or
    with rounding="after_weight" (GPT-OSS) times the weight in float32, and rounded then.
    """
    known: Any = kind
    return _rms_norm(known, known.forward, rounding)


@functools.cache
def _rms_norm(kind: Any, forward: Any, rounding: str) -> tuple[str, str]:
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
                scaled = weight.to(dtype) * (normal.to(dtype) if rounding == "before_weight" else normal)
                if not torch.equal(norm.to(dtype)(given), scaled.to(dtype)):
                    return "", f"{kind.__name__} computes something else"
    except Exception as error:
        return "", f"{kind.__name__} is not an RMSNorm as we know it ({error})"
    names = [name for name, value in vars(norm).items() if type(value) is float and value == eps]
    return (names[0], "") if len(names) == 1 else ("", f"{kind.__name__} does not keep its eps")
