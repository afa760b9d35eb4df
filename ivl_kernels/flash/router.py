"""The router of a model: its parameters read by the op, or its modules called as upstream calls them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._checks import autocast_dtype
from ..models.plain import intercepted, is_exact_gelu, not_plain
from ..nn.router import TileRouter

_BLOCK = (nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout, nn.LayerNorm)
_GATE = (nn.LayerNorm, nn.Linear)


def _layers(router: TileRouter) -> Iterator[tuple[str, Any, type[nn.Module]]]:
    """(name, layer, class it must have) of everything that the router runs; `nn.Module`: a container."""
    pooling, gating = router.pooling_before_gating, router.gating
    yield "pooling_before_gating", pooling, nn.Module
    yield "gating", gating, nn.Module
    for i in (1, 2):
        attention = getattr(pooling, f"attn{i}")
        yield f"attn{i}", attention, nn.MultiheadAttention
        yield f"attn{i}.out_proj", attention.out_proj, NonDynamicallyQuantizableLinear
        yield f"norm{i}", getattr(pooling, f"norm{i}"), nn.LayerNorm
    sequences = [(f"block{i}", getattr(gating, f"block{i}"), _BLOCK) for i in range(1, 5)]
    for name, sequence, kinds in (*sequences, ("gate", gating.gate, _GATE)):
        yield name, sequence, nn.Module
        for i, (layer, kind) in enumerate(zip(sequence, kinds, strict=True)):
            yield f"{name}.{i}", layer, kind


def router_problem(router: TileRouter) -> str:
    """Why the modules of the router must be called instead of reading their parameters, or ""."""
    try:
        layers = [*_layers(router)]
        given = router.parameters_of_op()
    except (AttributeError, TypeError, ValueError) as error:
        return f"the router is not the expected one ({error})"
    for name, layer, kind in layers:
        if kind in (nn.Module, nn.GELU):
            problem = intercepted(layer, name)
            if kind is nn.GELU and not is_exact_gelu(layer):
                problem = problem or f"{name} is {layer}, not the exact GELU"
        else:
            problem = not_plain(layer, kind, name)
        if problem:
            return problem
    attentions = [layer for _, layer, kind in layers if kind is nn.MultiheadAttention]
    usual = all(
        a.batch_first and a.bias_k is None and not a.add_zero_attn and not (a.training and a.dropout > 0)
        for a in attentions
    )
    if not usual or len({a.num_heads for a in attentions}) > 1:
        return "its attentions have other options than the shipped ones"
    if len({(d.p, d.training) for _, d, kind in layers if kind is nn.Dropout}) > 1:
        return "its dropouts differ"
    if len({norm.eps for _, norm, kind in layers if kind is nn.LayerNorm}) > 1:
        return "its LayerNorms differ in eps"
    parts = (*given["attentions"], *given["blocks"], given["gate"])
    tensors = [given["query"], *(tensor for part in parts for tensor in part)]
    if any(type(tensor) is not nn.Parameter for tensor in tensors):
        return "a parameter is missing, or is no plain parameter"
    if len({tensor.device for tensor in tensors}) > 1:
        return "its parameters are on several devices"
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return f"its parameters are {' and '.join(dtypes)}" if len(dtypes) > 1 else ""


def probabilities_of(router: TileRouter, vit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tiles `vit` [T, 1 + n, C]: probabilities [T, 2] (column 0: compressing is harmless) and logits [T, 2]."""
    query = getattr(router.pooling_before_gating, "query_token", None)
    same = query is not None and query.dtype == vit.dtype and query.device == vit.device
    if len(vit) == 0 or (same and autocast_dtype(vit) is None and not router_problem(router)):
        return router(vit, skip=1, return_logits=True)  # type: ignore[return-value]
    probabilities = router.gating(router.pooling_before_gating([*vit[:, 1:].unbind(0)]))
    wide = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    # Logits up to a constant of the row, which no softmax sees.
    return probabilities, wide.clamp_min(torch.finfo(wide.dtype).tiny).log()
