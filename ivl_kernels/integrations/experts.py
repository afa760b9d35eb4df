"""Experts of Qwen3-MoE and GPT-OSS language models, alone or inside InternVL.

The forward of each experts module (of each block, where the experts are a list) is wrapped: at every call it is asked
whether the weights are there, plain, and whether upstream's own implementation was asked for since; then one op serves,
else upstream's code.

On transformers 5 the name "ivl" can also be chosen like any other of `ALL_EXPERTS_FUNCTIONS`.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import _cpu
from .._checks import FLOATS
from ..models.plain import class_changed, gathered_in_call, gathered_later, not_plain, watched
from ..models.upstream import class_of, forward_name, named_instances, replaced_before
from ..nn.quantised_experts import QuantisedExperts
from ..ops.moe_experts import moe_experts, moe_experts_list
from . import _expert_peers as peers
from ._edit import Editor, attachment
from ._expert_forms import PROJECTIONS, WEIGHTS, Form, biases_of, computes_silu, form_of, list_problem, route
from ._patch import Adapter, Feature, PatchWarning, Site, _undo_site
from ._report import serving

FEATURE = "moe"
IMPLEMENTATION = "ivl"
OURS = "ours"
_STACKED = ("Qwen3MoeExperts", "GptOssExperts")
_BLOCK = "Qwen3MoeSparseMoeBlock"  # of 4.57: a router and a ModuleList of experts
_QUANTIZED = ("Mxfp4GptOssExperts", "FP8Experts")
_CHOOSE = "set_experts_implementation"


def _activation_problem(module: Any) -> str:
    name = type(module).__name__
    if not isinstance(module, nn.Module) or not computes_silu(type(module)):
        return f"the activation is {name}, not SiLU"
    return not_plain(module, type(module), f"the activation {name}")


def _sharded(tensor: Any) -> bool:
    return type(tensor).__name__ == "DTensor"


def _tensor_problem(name: str, tensor: Any, first: torch.Tensor | None = None) -> str:
    """Why an op cannot take this weight as it is, or "". first: the one whose dtype and device it must have."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        if not isinstance(tensor, torch.Tensor):
            return f"unknown structure: no parameter {name}"
        return f"{name} is a {type(tensor).__name__}: sharded or quantised experts are served by what made them"
    if tensor.dtype not in FLOATS:
        return f"{name} is {tensor.dtype}: quantised experts are served by their own kernels"
    if first is not None and (tensor.dtype, tensor.device) != (first.dtype, first.device):
        return f"{name} is {tensor.dtype} on {tensor.device}, others are {first.dtype} on {first.device}"
    if tensor.dim() > 1 and not tensor.is_contiguous():
        return f"{name} is not contiguous: it would be copied at every call"
    return ""


def _call_problem(hidden: torch.Tensor, weight: torch.Tensor) -> str:
    """Why this call is upstream's: it would cast in another way, or raise."""
    if hidden.device != weight.device or weight.device.type == "meta":
        return f"weights on {weight.device}, hidden states on {hidden.device}"
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == weight.dtype == torch.float64:
        return "" if hidden.dtype == weight.dtype else f"weights are {weight.dtype}, hidden states {hidden.dtype}"
    known = (torch.float32, torch.get_autocast_dtype(kind))
    return "" if hidden.dtype in known and weight.dtype in known else f"autocast from {hidden.dtype}, {weight.dtype}"


def _weights(experts: Any, form: Form) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of stacked experts as they are now (attribute access: parametrizations apply), or why not ours."""
    tensors = {name: getattr(experts, name, None) for name in form.tensors}
    first = tensors["gate_up_proj"]
    for name, tensor in tensors.items():
        why = _tensor_problem(name, tensor, first if isinstance(first, torch.Tensor) else None)
        if why:
            return {}, why
    if not form.gpt_oss:
        act = experts.act_fn
        if "forward" in act.__dict__ or watched(act):
            return {}, not_plain(act, type(act), f"the activation {type(act).__name__}")
        if not torch.compiler.is_compiling() and not computes_silu(type(act)):
            return {}, f"the activation is {type(act).__name__}, not SiLU"
    return tensors, ""  # type: ignore[return-value]


def _chosen(experts: Any) -> Any:
    """The experts implementation that the config asks for; None on 4.57."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)


def _patched(experts: nn.Module, name: str) -> Any:
    """Of a patched module: what the config asked for then ("replaced"), and whether that keeps calls ("yields")."""
    seats = getattr(attachment(experts), "seats", {}).values()
    functions = [layer.function for seat in seats for layer in seat.layers]
    return next((f.__dict__[name] for f in functions if name in f.__dict__), None)


def _choice_problem(experts: Any, replaced: Any) -> str:
    now = _chosen(experts)
    return "" if now in (replaced, IMPLEMENTATION) else f"the config has come to ask for experts '{now}'"


def _serve(
    experts: Any, form: Form, tensors: Mapping[str, torch.Tensor], given: tuple[torch.Tensor, ...], backend: str
) -> torch.Tensor | None:
    """The result, or None where the call is none as we know it."""
    hidden, ids, weights = given
    flat = hidden.reshape(-1, hidden.shape[-1])
    gate_up, down = (tensors[name] for name in WEIGHTS)
    count = gate_up.shape[0]
    fits = ids.dim() == 2 and ids.shape[0] == flat.shape[0] > 0 and (form.dense or hidden.dim() == 2)
    if not fits or weights.shape != (ids.shape[0], count if form.dense else ids.shape[1]):
        return None
    if _call_problem(flat, gate_up):
        return None
    if form.dense:
        weights = weights.gather(1, ids.clamp(max=count - 1))
    options: dict[str, Any] = {}
    if form.gpt_oss:
        options = dict(alpha=experts.alpha, limit=experts.limit)
    out = moe_experts(
        flat.to(gate_up.dtype), ids, weights, gate_up, down, **biases_of(tensors), activation=form.activation,
        layout=form.layout, backend=backend, **options,
    ).to(hidden.dtype)  # fmt: skip
    return out.view(hidden.shape[0], -1, out.shape[1]) if form.dense else out


def _kept(replaced: Any, form: Form, tensors: Mapping[str, torch.Tensor], given: tuple[torch.Tensor, ...]) -> bool:
    hidden, ids, weights = given
    return peers.keeps(replaced, form.gpt_oss, tensors["gate_up_proj"], hidden, ids, (weights, *tensors.values()))


def _given(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
    """Hidden states, ids and weights of a call; None where it has anything else."""
    named = {**dict(zip(names, args)), **kwargs}
    if len(args) + len(kwargs) != 3 or len(named) != 3 or any(name not in named for name in names):
        return None
    values = tuple(named[name] for name in names)
    return values if all(isinstance(value, torch.Tensor) for value in values) else None


def _stacked_forward(form: Form, replaced: Any, yields: bool, backend: str) -> Callable[..., Any]:
    """yields: `replaced` keeps the calls that it is expected to be faster at."""
    kind: Any = form.kind
    stock = kind.forward

    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        given = _given(form.names, args, kwargs)
        known = class_of(self) is kind and kind.forward is stock and not _choice_problem(self, replaced)
        if given is None or not known:
            return inner(self, *args, **kwargs)
        tensors, why = _weights(self, form)
        theirs = why or yields and _kept(replaced, form, tensors, given)
        out = None if theirs else _serve(self, form, tensors, given, backend)
        return inner(self, *args, **kwargs) if out is None else out

    forward.__dict__.update(replaced=replaced, yields=yields)
    return forward


def experts_forward(experts: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The "ivl" entry of transformers' `ALL_EXPERTS_FUNCTIONS`, for those who choose it by name."""
    kind = class_of(experts)
    form = form_of(kind)
    given = None if isinstance(form, str) else _given(form.names, args, kwargs)
    if not isinstance(form, str) and given is not None and (form.gpt_oss or not _activation_problem(experts.act_fn)):
        tensors, why = _weights(experts, form)
        out = None if why else _serve(experts, form, tensors, given, "")
        if out is not None:
            return out
    return inspect.unwrap(kind.forward)(experts, *args, **kwargs)  # type: ignore[attr-defined]


def _matrices(block: Any) -> tuple[list[list[nn.Parameter]], str]:
    """Gate, up and down of every expert of a list, or why they cannot be read.

    Of some hundred small modules, at every call: only what stands out is asked closer.
    """
    lists: list[list[nn.Parameter]] = [[], [], []]
    experts = block.experts._modules
    first = None
    kinds: tuple[Any, ...] = ()
    for i, expert in experts.items():
        parts = expert._modules
        act = parts.get("act_fn")
        kinds = kinds or (type(expert), type(act))
        if (type(expert), type(act)) != kinds:
            return lists, f"experts.{i} is not like the first: {type(expert).__name__}, {type(act).__name__}"
        for module, name in ((expert, f"experts.{i}"), (act, f"experts.{i}.act_fn")):
            why = "" if _quiet(module) else not_plain(module, type(module), name)
            if why:
                return lists, why
        for matrices, name in zip(lists, PROJECTIONS):
            layer = parts[name]
            path = f"experts.{i}.{name}"
            if type(layer) is not nn.Linear or not _quiet(layer):
                why = not_plain(layer, nn.Linear, path)
                if why:
                    return lists, why
            weight = layer._parameters["weight"]
            if layer._parameters["bias"] is not None:
                return lists, f"{path} has a bias"
            if first is None:
                first = weight
            elif (
                type(weight) is not nn.Parameter or weight.dtype != first.dtype or weight.device != first.device
                or not weight.is_contiguous()
            ):  # fmt: skip
                return lists, not_plain(layer, nn.Linear, path) or _tensor_problem(path, weight, first)
            matrices.append(weight)
    why = watched(block.experts) or class_changed(nn.Linear) or _tensor_problem("experts.0.gate_proj.weight", first)
    return lists, f"experts: {why}" if why else ""


def _quiet(module: Any) -> bool:
    """Nothing of its own instance comes between a module's call and its class's forward; global hooks aside."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not hooks and "forward" not in own


def _list_call_problem(block: Any, lists: list[list[nn.Parameter]]) -> str:
    if lists[0][0].device.type != "cpu":
        return f"lists of experts are served on the CPU, not {lists[0][0].device.type}"
    shapes = [{weight.shape for weight in matrices} for matrices in lists]
    return "" if all(len(shape) == 1 for shape in shapes) else "the experts have several sizes"


def _block_forward(kinds: tuple[Any, ...], backend: str) -> Callable[..., Any]:
    """kinds: classes of the block, an expert and its activation."""
    stock = [kind.forward for kind in kinds]

    def forward(inner: Any, self: Any, hidden_states: torch.Tensor) -> Any:
        one = self.experts[0]
        now = class_of(self), type(one), type(one.act_fn)
        if now != kinds or [kind.forward for kind in kinds] != stock:
            return inner(self, hidden_states)
        lists, why = _matrices(self)
        why = why or _list_call_problem(self, lists) or _call_problem(hidden_states, lists[0][0])
        # Under autocast the stock loop casts only the experts that it needs.
        if why or torch.is_autocast_enabled(hidden_states.device.type) or not hidden_states.numel():
            return inner(self, hidden_states)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.gate(hidden)
        ids, weights = route(self, logits)
        out = moe_experts_list(hidden, ids, weights.to(hidden.dtype), *lists, backend=backend)
        return out.view(hidden_states.shape), logits

    return forward


def _by_generate() -> bool:
    """Whether transformers' `generate` made this call: it takes "batched_mm" for "grouped_mm" while it decodes."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(__name__.partition(".")[0]):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("transformers.generation")


def _choose(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """`set_experts_implementation` of a patched model: whoever chooses after the patch gets what he chose."""
    if _by_generate():
        return None  # a switch between two of upstream's own, for speed
    result = inner(self, *args, **kwargs)
    left = []
    for module in self.modules():
        for key in list(getattr(attachment(module), "edits", {})):
            if key[0] == FEATURE:
                left += _undo_site(module, key)
    message = f"{_CHOOSE} was called after patch(moe=...): the choice counts, the patch of the experts is undone"
    warnings.warn("; ".join([message, *left]), PatchWarning, stacklevel=4)
    return result


def _holders(model: nn.Module, experts: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules below `model` that let the user choose an implementation for some of these experts."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside or not callable(getattr(module, _CHOOSE, None)):
            continue
        below = {id(m) for m in module.modules()}
        if any(id(e) in below for e in experts):
            inside |= below
            yield path, module


def _stacked_problem(experts: Any) -> str:
    """Why a module of stacked experts is left alone, or ""."""
    form = form_of(class_of(experts))
    if isinstance(form, str):
        return form
    why = replaced_before(experts, forward_name(experts))
    if why:
        return why
    for name in form.tensors:
        tensor = getattr(experts, name, None)
        why = "" if _sharded(tensor) and gathered_in_call(experts) else _tensor_problem(name, tensor)
        if why:
            return why
    return "" if form.gpt_oss else _activation_problem(experts.act_fn)


def _block_problem(block: Any) -> str:
    """Why a block with a list of experts is left alone, or ""."""
    if replaced_before(block, forward_name(block)):
        return replaced_before(block, forward_name(block))
    if _cpu.problem():
        return f"lists of experts are served by the C++ kernels: {_cpu.problem()}"
    for i, expert in enumerate(block.experts):
        for name in PROJECTIONS:
            layer = getattr(expert, name, None)
            if not isinstance(layer, nn.Module):
                return f"unknown structure: experts.{i} has no {name}"
            sharded = _sharded(layer._parameters.get("weight"))
            if sharded and not gathered_later(layer):
                return _tensor_problem(f"experts.{i}.{name}.weight", layer.weight)
            why = "" if sharded else not_plain(layer, nn.Linear, f"experts.{i}.{name}")
            if why:
                return why
    one = block.experts[0]
    why = _activation_problem(one.act_fn) or list_problem(class_of(block), class_of(one))
    if why or _sharded(one.gate_proj.weight):
        return why
    lists, why = _matrices(block)
    return why or _list_call_problem(block, lists)


def _is_list_block(module: Any) -> bool:
    named = any(base.__name__ == _BLOCK for base in type(module).__mro__)
    return named and isinstance(getattr(module, "experts", None), nn.ModuleList) and len(module.experts) > 0


def _stacked_elsewhere(module: nn.Module) -> bool:
    """Stacked experts of a class that is not upstream's: Liger-Kernel's, in models made after it was applied."""
    named = any(base.__name__ in (*_STACKED, *_QUANTIZED) for base in type(module).__mro__)
    stacks = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return not named and all(stack is not None and stack.dim() == 3 for stack in stacks)


def _parse(value: Any) -> Any:
    if value is not True and value != OURS:
        raise TypeError(f"patch: {FEATURE}={value!r}, expected True, False, None or '{OURS}'")
    return value


class Experts(Adapter):
    features = {
        FEATURE: Feature(
            True,
            "experts: gather, grouped products, activation and weighted sum in one op; 'ours': also where the chosen "
            "'sonicmoe' or 'deepgemm' is expected to be faster",
            _parse,
        )
    }

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        served: list[nn.Module] = []
        for path, module in named_instances(model, *_STACKED, *_QUANTIZED):
            quantised = any(base.__name__ in _QUANTIZED for base in type(module).__mro__)
            reason = f"{class_of(module).__name__}: quantised experts are served by their own kernels"
            reason = reason if quantised else _stacked_problem(module)
            served += [] if reason else [module]
            yield Site(FEATURE, path, module, "experts", reason)
        for path, module in model.named_modules():
            if isinstance(module, QuantisedExperts):
                reason = f"experts in {module.quantisation}: their module calls moe_experts itself"
                yield Site(FEATURE, path, module, "experts", reason)
                continue
            if _is_list_block(module):
                yield Site(FEATURE, path, module, "experts", _block_problem(module))
            if _stacked_elsewhere(module):
                reason = f"unknown experts: {type(module).__module__}.{type(module).__name__}"
                yield Site(FEATURE, path, module, "experts", reason)
        for path, module in _holders(model, served):
            yield Site(FEATURE, path, module, f"{_CHOOSE}: a later choice counts")

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        module: Any = site.module
        if site.what != "experts":
            for holder in module.modules():
                if callable(getattr(holder, _CHOOSE, None)):
                    edit.method(holder, _CHOOSE, _choose)
            return
        if _is_list_block(module):
            one = module.experts[0]
            forward = _block_forward((class_of(module), type(one), type(one.act_fn)), options["backend"])
        else:
            _register()
            form = form_of(class_of(module))
            assert isinstance(form, Form)
            chosen = _chosen(module)
            yields = options[FEATURE] != OURS and chosen in peers.PEERS
            forward = _stacked_forward(form, chosen, yields, options["backend"])
        edit.method(module, forward_name(module), forward)

    def serving(self, site: Site) -> str:
        module: Any = site.module
        if site.what != "experts":
            return ""
        if _is_list_block(module):
            lists, why = _matrices(module)
            why = why or _list_call_problem(module, lists)
            op, weight = "moe_experts_list", getattr(module.experts[0].gate_proj, "weight", None)
        else:
            form = form_of(class_of(module))
            why = form if isinstance(form, str) else _weights(module, form)[1]
            why = _choice_problem(module, _patched(module, "replaced")) or why
            op, weight = "moe_experts", getattr(module, "gate_up_proj", None)
        why = replaced_before(module, forward_name(module)) or why
        return _text(op, weight, why) + _in_place_of(module)


def _text(op: str, weight: Any, why: str) -> str:
    """What serves an experts module that is now as it is."""
    if why.startswith("the config"):
        return f"upstream's own code: {why}"
    if _sharded(weight) and "DTensor" in why:
        where = serving(op, weight.to_local())
        return f"{where} where its FSDP unit makes the weights whole for the call, else upstream's own code"
    if isinstance(weight, torch.Tensor) and weight.device.type == "meta" and op == "moe_experts":
        return "the weights that are loaded for the call (offloaded)"
    return f"upstream's own code: {why}" if why else serving(op, weight)


def _in_place_of(module: Any) -> str:
    replaced = _patched(module, "replaced")
    if replaced is None:
        return ""
    if not _patched(module, "yields"):
        return f"; in place of experts '{replaced}'"
    form = form_of(class_of(module))
    why = peers.problem(replaced, isinstance(form, Form) and form.gpt_oss, module.gate_up_proj)
    if why:
        return f"; in place of experts '{replaced}': {why}"
    gradients = " without gradients" if replaced == "deepgemm" else ""
    return (
        f"; up to {peers.ROWS} rows an expert: beyond, calls{gradients} are left to experts '{replaced}', which is "
        f"calculated to be as fast or faster there (moe='{OURS}' serves these too)"
    )


def _register() -> None:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # 4.57
        return
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


ADAPTER = Experts()
