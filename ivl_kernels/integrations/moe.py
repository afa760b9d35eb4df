"""Experts of Qwen3-MoE and GPT-OSS language models, alone or inside InternVL.

transformers 5 asks `ALL_EXPERTS_FUNCTIONS` for the implementation that an experts module's config names. Ours is
registered there as "ivl", and a patched module sees its config through a view that names it, so that a config shared
with other models stays as it is. On 4.57 the forward of each instance is wrapped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import _native
from ..models.plain import not_plain
from ..models.upstream import named_instances, replaced_before
from ..ops.moe_experts import moe_experts, moe_experts_list
from ._edit import Editor
from ._patch import Adapter, Feature, Site
from ._report import serving

IMPLEMENTATION = "ivl"
_STACKED = ("Qwen3MoeExperts", "GptOssExperts")
_BLOCK = "Qwen3MoeSparseMoeBlock"  # of 4.57: a router and a ModuleList of experts
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_QUANTIZED = ("Mxfp4GptOssExperts", "FP8Experts")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _ConfigView:
    """A config as a patched module sees it: only the implementation of the experts differs."""

    _experts_implementation = IMPLEMENTATION

    def __init__(self, original: Any, backend: str) -> None:
        self.original, self.ivl_backend = original, backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ConfigView:
        return _ConfigView(copy.deepcopy(self.original, memo), self.ivl_backend)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _same, (self.original,)  # a pickled model loads unpatched


def _same(value: Any) -> Any:
    return value


def _is_gpt_oss(experts: nn.Module) -> bool:
    return any(base.__name__ == "GptOssExperts" for base in type(experts).__mro__)


def experts_forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The "ivl" entry of transformers' `ALL_EXPERTS_FUNCTIONS`."""
    gate_up, down = experts.gate_up_proj, experts.down_proj  # attribute access: LoRA's parametrizations apply
    options: dict[str, Any] = {"backend": getattr(experts.config, "ivl_backend", "")}
    if _is_gpt_oss(experts):
        options.update(
            gate_up_bias=experts.gate_up_proj_bias,
            down_bias=experts.down_proj_bias,
            activation="gpt_oss",
            alpha=experts.alpha,
            limit=experts.limit,
            layout="interleaved",
        )
    hidden = hidden_states.to(gate_up.dtype)  # under autocast they differ
    return moe_experts(hidden, top_k_index, top_k_weights, gate_up, down, **options).to(hidden_states.dtype)


def _dense_weights_forward(backend: str) -> Any:
    """GptOssExperts of 4.57: batched hidden states, and routing weights for every expert."""

    def forward(
        inner: Any, self: Any, hidden_states: torch.Tensor, router_indices: Any = None, routing_weights: Any = None
    ) -> torch.Tensor:
        weights = routing_weights.gather(1, router_indices)
        out = moe_experts(
            hidden_states.reshape(-1, self.hidden_size).to(self.gate_up_proj.dtype),
            router_indices,
            weights,
            self.gate_up_proj,
            self.down_proj,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            activation="gpt_oss",
            alpha=self.alpha,
            limit=self.limit,
            layout="interleaved",
            backend=backend,
        )
        return out.to(hidden_states.dtype).view(hidden_states.shape[0], -1, self.hidden_size)

    return forward


def _matrices(experts: nn.ModuleList) -> list[list[nn.Parameter]] | None:
    """Gate, up and down of every expert; None when one of them is not a plain linear layer (LoRA put there since)."""
    lists: list[list[nn.Parameter]] = [[], [], []]
    for expert in experts._modules.values():
        for name, matrices in zip(_PROJECTIONS, lists):
            layer = expert._modules[name]  # type: ignore[union-attr]
            if type(layer) is not nn.Linear:
                return None
            matrices.append(layer._parameters["weight"])  # type: ignore[arg-type]
    return lists


def _block_forward(backend: str) -> Any:
    def forward(inner: Any, self: Any, hidden_states: torch.Tensor) -> Any:
        matrices = _matrices(self.experts)
        kind = hidden_states.device.type
        if matrices is None or hidden_states.dtype != matrices[0][0].dtype or kind != "cpu":
            return inner(self, hidden_states)
        if torch.is_autocast_enabled(kind):  # the stock loop casts only the experts that it needs
            return inner(self, hidden_states)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits = self.gate(hidden)
        weights = router_logits.softmax(dim=1, dtype=torch.float)
        weights, ids = weights.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = moe_experts_list(hidden, ids, weights.to(hidden.dtype), *matrices, backend=backend)
        return out.view(hidden_states.shape), router_logits

    return forward


def _block_problem(block: Any) -> str:
    """Why a block with a list of experts is left alone, or ""."""
    if replaced_before(block, "forward"):
        return replaced_before(block, "forward")
    if _native.problem():
        return f"lists of experts are served by the C++ kernels: {_native.problem()}"
    for i, expert in enumerate(block.experts):
        for name in _PROJECTIONS:
            why = not_plain(getattr(expert, name), nn.Linear, f"experts.{i}.{name}")
            if why:
                return why
        if not _plain(expert):
            return f"experts.{i} has hooks or another forward"
    parameter = block.experts[0].gate_proj.weight
    if parameter.device.type != "cpu":
        return f"lists of experts are served on the CPU, not {parameter.device.type}"
    if type(block.experts[0].act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"the activation is {type(block.experts[0].act_fn).__name__}, not SiLU"
    return ""


def _plain(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__


def _is_list_block(module: Any) -> bool:
    return type(module).__name__ == _BLOCK and isinstance(getattr(module, "experts", None), nn.ModuleList)


def _stacked_elsewhere(module: nn.Module) -> bool:
    """Stacked experts of a class that is not upstream's: Liger-Kernel's, in models made after it was applied."""
    named = any(base.__name__ in (*_STACKED, *_QUANTIZED) for base in type(module).__mro__)
    stacks = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return not named and all(stack is not None and stack.dim() == 3 for stack in stacks)


def _problem(experts: Any) -> str:
    """Why a module of stacked experts is left alone, or ""."""
    names = ["gate_up_proj", "down_proj"] + (["gate_up_proj_bias", "down_proj_bias"] if _is_gpt_oss(experts) else [])
    if type(experts).__name__ not in _STACKED:
        return f"unknown experts: {type(experts).__module__}.{type(experts).__name__}"
    why = replaced_before(experts, "forward")
    if why:
        return why
    parametrized = getattr(experts, "parametrizations", {})
    for name in names:
        parameter = experts._parameters.get(name)
        if parameter is None and name not in parametrized:
            return f"unknown structure: no parameter {name}"
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}: sharded or quantised experts are served by what made them"
        if parameter is not None and parameter.dtype not in _FLOATS:
            return f"{name} is {parameter.dtype}: quantised experts are served by their own kernels"
    if not _is_gpt_oss(experts) and type(experts.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"the activation is {type(experts.act_fn).__name__}, not SiLU"
    return ""


def _uses_interface(experts: Any) -> bool:
    return hasattr(experts, "is_concatenated") and hasattr(experts, "config")


class Moe(Adapter):
    features = {"moe": Feature(True, "experts: gather, grouped products, activation and weighted sum in one op")}

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, module in named_instances(model, *_STACKED):
            yield Site("moe", path, module, "experts", _problem(module))
        for path, module in model.named_modules():
            if _is_list_block(module):
                yield Site("moe", path, module, "experts", _block_problem(module))
            if type(module).__name__ in _QUANTIZED:
                reason = f"{type(module).__name__}: quantised experts are served by their own kernels"
                yield Site("moe", path, module, "experts", reason)
            if _stacked_elsewhere(module):
                reason = f"unknown experts: {type(module).__module__}.{type(module).__name__}"
                yield Site("moe", path, module, "experts", reason)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        experts: Any = site.module
        if _is_list_block(experts):
            edit.method(experts, "forward", _block_forward(options["backend"]))
            return
        if not _uses_interface(experts):
            edit.method(experts, "forward", _dense_weights_forward(options["backend"]))
            return
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
        edit.attribute(experts, "config", _ConfigView(experts.config, options["backend"]))

    def serving(self, site: Site) -> str:
        if replaced_before(site.module, "forward"):
            return replaced_before(site.module, "forward")
        if _is_list_block(site.module):
            return serving("moe_experts_list", site.module.experts[0].gate_proj.weight)
        return serving("moe_experts", site.module.gate_up_proj)


ADAPTER = Moe()
