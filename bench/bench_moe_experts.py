"""Mixture-of-experts layers of InternVL3.5-30B-A3B and -GPT-OSS-20B against transformers' implementations."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from bench.measure import Case, Work, backward, device
from ivl_kernels.nn import QuantisedExperts
from ivl_kernels.ops import moe_dispatch, moe_experts, moe_routing
from ivl_kernels.ops.moe_experts import formats
from ivl_kernels.testing import MODELS
from ivl_kernels.testing.cases import Cost
from ivl_kernels.testing.cases import moe_experts as moe_case

MATRICES = ("gate_up_proj", "down_proj")
NAMES = {"qwen3_moe": "InternVL3.5-30B-A3B", "gpt_oss": "InternVL3.5-GPT-OSS-20B-A4B"}


@functools.lru_cache(maxsize=1)
def layer(family: str, dtype: torch.dtype, experts: int) -> Any:
    """transformers' module of experts, its weights the same for every expert but in memory of their own."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = MODELS[NAMES[family]]
    config = SimpleNamespace(
        num_experts=experts, num_local_experts=experts, hidden_size=shape.hidden, hidden_act="silu",
        moe_intermediate_size=shape.intermediate, intermediate_size=shape.intermediate,
        swiglu_alpha=1.702, swiglu_limit=7.0, _experts_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        module = Qwen3MoeExperts(config) if family == "qwen3_moe" else GptOssExperts(config)
    for name, parameter in list(module.named_parameters()):
        values = torch.empty(parameter.shape, dtype=dtype, device=device())
        values.copy_(torch.randn(parameter.shape[1:], device=device()) * parameter.shape[-1] ** -0.5)
        setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    return module


def logits(tokens: int, experts: int, top_k: int, skew: str) -> torch.Tensor:
    """Router logits, the same in every call: even, all tokens to the same experts, or by Zipf's law."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).log()
    if skew == "one":
        scores[:, top_k:] -= 100
    elif skew == "zipf":
        scores = scores * torch.arange(1, experts + 1)
    return scores.to(device())


def routing(tokens: int, experts: int, top_k: int, skew: str) -> torch.Tensor:
    return logits(tokens, experts, top_k, skew).topk(top_k, dim=1).indices


def ours(
    module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, backend: str = ""
) -> torch.Tensor:
    options: dict[str, Any] = {}
    if hasattr(module, "gate_up_proj_bias"):
        options = dict(
            gate_up_bias=module.gate_up_proj_bias, down_bias=module.down_proj_bias, activation="gpt_oss",
            layout="interleaved",
        )  # fmt: skip
    return moe_experts(hidden, ids, weights, module.gate_up_proj, module.down_proj, backend=backend, **options)


def costs(module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[Cost, Cost]:
    """Of the forward and of the backward."""
    return moe_case.cost({"hidden": hidden, "ids": ids, "weights": weights, "down": module.down_proj})


def sample(tokens: int) -> torch.Tensor:
    """Indices of at most 64 tokens, first and last among them: float64 of a whole long layer takes minutes."""
    return torch.linspace(0, tokens - 1, min(tokens, 64), device=device()).long()


def exact(module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """In float64, one expert after the other; the sampled tokens only."""
    kept = sample(len(hidden))
    hidden, ids, weights = hidden[kept], ids[kept], weights[kept]
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        one = SimpleNamespace(**{name: value[e : e + 1].double() for name, value in module.named_parameters()})
        share = weights[token, slot, None].double()
        rows = ours(one, hidden[token].double(), torch.zeros_like(token)[:, None], share, backend="reference")
        out.index_add_(0, token, rows)
    return out


def make(family: str, tokens: int, dtype: torch.dtype, skew: str = "even") -> Work:
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    shape = MODELS[NAMES[family]]
    module = layer(family, dtype, shape.experts)
    hidden = torch.randn(tokens, shape.hidden, device=device()).to(dtype)
    ids = routing(tokens, shape.experts, shape.top_k, skew)
    weights = torch.rand(ids.shape, device=device()).to(dtype)
    arguments = (module, hidden, ids, weights)
    variants = {
        "ours": torch.no_grad()(lambda: ours(*arguments)),
        "eager": torch.no_grad()(lambda: module(hidden, ids, weights)),
        "grouped_mm": torch.no_grad()(lambda: grouped_mm_experts_forward(*arguments)),
    }
    if tokens == 1:
        variants["batched_mm"] = torch.no_grad()(lambda: batched_mm_experts_forward(*arguments))
    return Work(
        variants, truth=torch.no_grad()(lambda: exact(*arguments)), select=lambda out: out[sample(tokens)],
        cost=costs(*arguments)[0],
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def quantised_layer(family: str, to: str) -> tuple[Any, Any]:
    """transformers' module in bfloat16 with weights that the format holds exactly, and the same in the format."""
    shape = MODELS[NAMES[family]]
    module = layer.__wrapped__(family, torch.bfloat16, shape.experts)
    transposed = family == "gpt_oss"
    stored = QuantisedExperts(
        shape.experts, shape.hidden, shape.intermediate,
        quantisation=to, activation="gpt_oss" if transposed else "silu", interleaved=transposed, bias=transposed,
        device=device(), dtype=torch.bfloat16,
    ).requires_grad_(False)  # fmt: skip
    for name in MATRICES:
        weight = getattr(module, name)
        values, scales = formats.quantise(weight[0].mT if transposed else weight[0], to)
        for tensor, one in zip(stored.tensors(name), (values, scales)):
            tensor.copy_(one.expand_as(tensor))
        expanded = formats.dequantise(values, scales, torch.bfloat16)
        weight.copy_(expanded.mT if transposed else expanded)
        if transposed:
            getattr(stored, f"{name}_bias").copy_(getattr(module, f"{name}_bias"))
    return module, stored


def make_quantised(family: str, tokens: int, to: str) -> Work:
    """Experts in few bits against ours and transformers' on the weights that they stand for, in bfloat16."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    shape = MODELS[NAMES[family]]
    module, stored = quantised_layer(family, to)
    hidden = torch.randn(tokens, shape.hidden, device=device()).bfloat16()
    ids = routing(tokens, shape.experts, shape.top_k, "even")
    weights = torch.rand(ids.shape, device=device()).bfloat16()
    no_grad = torch.no_grad()
    variants = {
        "ours": no_grad(lambda: stored(hidden, ids, weights)),
        "ours on bfloat16": no_grad(lambda: ours(module, hidden, ids, weights)),
        "eager": no_grad(lambda: module(hidden, ids, weights)),
        "grouped_mm": no_grad(lambda: grouped_mm_experts_forward(module, hidden, ids, weights)),
    }
    truth = no_grad(lambda: exact(module, hidden, ids, weights))
    plain, _ = costs(module, hidden, ids, weights)
    spared = sum(getattr(module, name).nbytes - sum(t.nbytes for t in stored.tensors(name)) for name in MATRICES)
    cost = Cost(plain.least - spared * ids.unique().numel() // shape.experts, plain.flops)
    return Work(variants, truth=truth, select=lambda out: out[sample(tokens)], cost=cost)


def quantised_cases(quick: bool) -> Iterator[Case]:
    for family, to in (("qwen3_moe", "mxfp4"), ("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8"))[: 1 if quick else 3]:
        for tokens in (1, 16) if quick else (1, 4, 16, 64, 320):
            yield Case(
                "moe_experts_quantised",
                f"{NAMES[family]} tokens={tokens} {to} bfloat16",
                {"model": NAMES[family], "tokens": tokens, "format": to, "dtype": "bfloat16"},
                lambda f=family, t=tokens, q=to: make_quantised(f, t, q),
                dtype=torch.bfloat16,
                seconds=6.0,
            )


def make_layer(tokens: int, dtype: torch.dtype) -> Work:
    """From router logits to the layer's result, and how long the part before the experts takes by itself."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    shape = MODELS[NAMES["qwen3_moe"]]
    module = layer("qwen3_moe", dtype, shape.experts)
    hidden = torch.randn(tokens, shape.hidden, device=device()).to(dtype)
    scores = logits(tokens, shape.experts, shape.top_k, "even")

    def plain(experts: Any) -> Any:
        weights, ids = torch.topk(scores.softmax(-1, dtype=torch.float), shape.top_k, dim=-1)
        return experts(module, hidden, ids, (weights / weights.sum(dim=-1, keepdim=True)).to(dtype))

    def fused() -> torch.Tensor:
        ids, weights = moe_routing(scores, shape.top_k, renormalize=True)
        return ours(module, hidden, ids, weights.to(dtype))

    def routing_only() -> torch.Tensor:
        ids, weights = moe_routing(scores, shape.top_k, renormalize=True)
        return moe_dispatch(ids, shape.experts).offsets, weights.to(dtype)

    no_grad = torch.no_grad()
    variants = {
        "ours": no_grad(fused),
        "eager": no_grad(lambda: plain(type(module).forward)),
        "grouped_mm": no_grad(lambda: plain(grouped_mm_experts_forward)),
        "routing and dispatch alone": no_grad(routing_only),
    }
    return Work(
        variants,
        truth=no_grad(lambda: plain(exact)),
        select=lambda out: out[sample(tokens)],
        unchecked=["routing and dispatch alone"],
        cost=costs(module, hidden, scores.topk(shape.top_k, dim=1).indices, scores[:, : shape.top_k].to(dtype))[0],
    )


def make_training(tokens: int, experts: int, dtype: torch.dtype, frozen: bool) -> Work:
    from transformers.integrations.moe import grouped_mm_experts_forward

    shape = MODELS[NAMES["qwen3_moe"]]
    module = layer("qwen3_moe", dtype, experts).requires_grad_(not frozen)
    hidden = torch.randn(tokens, shape.hidden, device=device()).to(dtype).requires_grad_()
    ids = routing(tokens, experts, shape.top_k, "even")
    weights = torch.rand(ids.shape, device=device()).to(dtype).requires_grad_()
    grad = torch.randn(hidden.shape, device=device()).to(dtype)
    inputs = [hidden, weights, *(() if frozen else (module.gate_up_proj, module.down_proj))]

    def step(forward: Any) -> Any:
        return lambda: backward(forward(module, hidden, ids, weights), inputs, grad)

    def truth() -> Any:
        double = [t.detach().double() for t in (hidden, weights, module.gate_up_proj, module.down_proj)]
        wanted = [t.requires_grad_() for t in double[: len(inputs)]]
        return backward(moe_experts(double[0], ids, *double[1:], backend="reference"), wanted, grad.double())

    variants = {"ours": step(ours), "eager": step(type(module).forward), "grouped_mm": step(grouped_mm_experts_forward)}
    there, back = costs(module, hidden, ids, weights)
    # Without gradients of the weights, half of the backward's products and none of their bytes.
    spared = (module.gate_up_proj.nbytes + module.down_proj.nbytes, back.flops // 2) if frozen else (0, 0)
    cost = Cost(there.least + back.least - spared[0], there.flops + back.flops - spared[1])
    return Work(variants, truth=truth, cost=cost)


def cases(quick: bool) -> Iterator[Case]:
    for family in ("qwen3_moe",) if quick else ("qwen3_moe", "gpt_oss"):
        for dtype in (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16):
            for tokens, skew in ((1, "even"), (64, "even"), (320, "even"), (320, "one"), (320, "zipf"), (3400, "even")):
                if quick and (tokens > 64 or skew != "even"):
                    continue
                name = str(dtype).removeprefix("torch.")
                yield Case(
                    "moe_experts",
                    f"{NAMES[family]} tokens={tokens} {skew} {name}",
                    {"model": NAMES[family], "tokens": tokens, "routing": skew, "dtype": name},
                    lambda f=family, t=tokens, d=dtype, s=skew: make(f, t, d, s),
                    dtype=dtype,
                    seconds=12.0 if tokens > 1000 else 6.0,
                )
            for tokens in () if quick or family == "gpt_oss" else (1, 64, 320, 3400):
                yield Case(
                    "moe_layer",
                    f"from router logits, {NAMES[family]} tokens={tokens} {name}",
                    {"model": NAMES[family], "tokens": tokens, "dtype": name},
                    lambda t=tokens, d=dtype: make_layer(t, d),
                    dtype=dtype,
                    seconds=9.0 if tokens > 1000 else 4.0,
                )
    yield from quantised_cases(quick)
    settings = ((256, False),) if quick else ((256, False), (1700, False), (256, True), (1700, True))
    for tokens, frozen in settings:
        yield Case(
            "moe_experts",
            f"forward + backward, 16 experts{' (frozen)' if frozen else ''}, tokens={tokens} float32",
            {"tokens": tokens, "experts": 16, "frozen": frozen},
            lambda t=tokens, f=frozen: make_training(t, 16, torch.float32, f),
        )
