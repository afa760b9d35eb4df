"""MoE experts on GPUs.

Forward, four launches: dispatch (in `moe_routing`), gate_up GEMM with the activation in its epilogue, down GEMM,
weighted gather-sum. Backward, four launches: down GEMM transposed with the activation's backward in its epilogue,
both weight gradients, gate_up GEMM transposed, gather-sum.

Rows are assignments (token, choice) in expert order; they are never copied: `permutation` is followed in the operand
loads. A tile is up to BM rows of one expert, listed by the dispatch. The grid is the largest number of tiles that the
shapes allow, so nothing is read back to the host; the programs of tiles that do not exist leave at once. A tile that
is at most half or a quarter full is computed at that height: an expert's tiles are tall while its rows last, however
unevenly tokens chose, and the last one is as short as they leave it.

In the accumulator gate and up are interleaved (gate in even columns), whatever the layout of the weights: a pair then
sits in one thread, and one GEMM serves both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._gpu import capability, multiprocessors
from ..._targets import limits
from ..._triton import cdiv, next_power_of_2
from ..common.matmul import flags
from . import triton_described
from .op import Experts, ExpertsBackward, Gradients, Output, empty_gradients, empty_output, tile_rows
from .triton_backward import (
    moe_experts_combine_backward_kernel,
    moe_experts_down_backward_kernel,
    moe_experts_weight_grad_kernel,
)
from .triton_forward import (
    moe_experts_combine_kernel,
    moe_experts_gate_up_kernel,
    moe_experts_rows_kernel,
    moe_experts_rows_persistent_kernel,
)


def _pipeline(rows: int, columns: int, steps: int, depth: int, itemsize: int, target: int) -> tuple[int, int]:
    """Depth of a step along K, at most `depth`, and number of stages: as many as shared memory and K's length allow."""
    limit = limits(target).pipeline
    while depth > 16 and 2 * (rows + columns) * depth * itemsize > limit:
        depth //= 2
    stages = limit // ((rows + columns) * depth * itemsize)
    return depth, 2 if target == 0 else max(1, min(4, stages, max(2, steps // depth // 2)))


def gemm_config(
    rows: int, columns: int, inner: int, itemsize: int, target: int, *, pairs: bool = False, epilogue: bool = False,
    stored: bool = False, mixed: bool = False,
) -> dict:  # fmt: skip
    """Tile sizes of a grouped GEMM.

    Args:
        rows: rows of a tile.
        columns: columns of the result; gate and up count as one column when `pairs`.
        inner: length of the sums.
        itemsize: bytes of an element.
        target: `capability`.
        epilogue: pairs are in the epilogue only; the product has one column for both.
        stored: weights are in blocks of 32, whole ones of which are expanded.
        mixed: weights are float32 beside 16-bit rows, and rounded in registers.
    """
    wide = 2 if pairs else 1
    plain = not mixed and not stored
    width = (256 if itemsize < 4 and not mixed else 128) if target else 128 if plain else 64
    while width > 32 and width // 2 >= columns * wide:
        width //= 2
    if itemsize < 4:
        # On 100 accumulators are not in registers; stored values are expanded in registers.
        large = rows * width > (64 * 128 if target == 100 or stored or mixed else 64 * 256)
        # Small ones: registers spill before stages fit.
        depth = 128 // itemsize if limits(target).large else 64 // itemsize
    else:
        # Three tf32 products, and below Hopper their operands, in two parts each, are in registers.
        if target not in (0, 90, 100) and not epilogue:
            width = min(width, 64 * 128 // rows)
        large = rows * width >= 64 * 128 and target != 0
        depth = 128 // itemsize
    depth, stages = _pipeline(rows, 2 * width if mixed else width, inner, depth, itemsize, target)
    columns, least = width // wide, 32 if stored else 16
    columns = max(columns, least) if epilogue else columns
    return dict(BM=rows, BN=columns, BK=max(depth, least), GROUP=8, num_warps=8 if large else 4, num_stages=stages)


def weight_grad_config(slots: int, experts: int, itemsize: int, target: int) -> dict:
    """Tile sizes of the weight gradients: BR rows a step, and no pipeline where an expert has only a few."""
    mean = slots / experts
    side = 128 if itemsize < 4 else 64
    depth = 16 if mean <= 16 else 32 if mean <= 128 or itemsize == 4 else 64
    limit = limits(target).pipeline
    stages = 1 if mean <= 128 else 2 if target == 0 else min(3, limit // (2 * side * depth * itemsize))
    return dict(BR=depth, BP=side, BG=side, num_warps=4 if stages == 1 and target else 8, num_stages=stages)


def combine_config(tokens: int, columns: int) -> dict:
    """Few tokens: one warp a program, so that there are enough programs."""
    few = tokens * columns < 64 * 2048
    width = min(next_power_of_2(columns), 256 if few else 1024)
    return dict(BT=(256 if few else 2048) // width, BH=width, num_warps=1 if few else 4, enable_fp_fusion=True)


def _plan(slots: int, experts: int) -> tuple[int, int]:
    """Rows of a tile, and the most tiles that can have work."""
    rows = tile_rows(slots, experts)
    return rows, (slots + (rows - 1) * min(experts, slots)) // rows


def _contiguous(a: Experts) -> tuple[Any, ...]:
    matrices = (t.view(torch.uint8) if a.format else t for t in (a.gate_up, a.down))
    tensors = (a.hidden, a.weights, *matrices, a.gate_up_scales, a.down_scales, a.gate_up_bias, a.down_bias)
    return tuple(t if t is None else t.contiguous() for t in tensors)


def _grid(num_tiles: int, columns: int, config: dict) -> tuple[int]:
    return (cdiv(num_tiles, config["GROUP"]) * config["GROUP"] * cdiv(columns, config["BN"]),)


def _rows(
    a: Experts, rows: Tensor, weights: Tensor, scales: Tensor | None, bias: Tensor | None, out: Tensor, along_k: bool,
    target: int, options: dict[str, Any],
) -> None:  # fmt: skip
    """out [rows, N] = rows [rows, K], in expert order, times their experts' [E, N, K] (along_k) or [E, K, N]."""
    K, N = rows.shape[1], out.shape[1]
    height, num_tiles = _plan(rows.shape[0], weights.shape[0])
    config = gemm_config(height, N, K, rows.element_size(), target, stored=bool(a.format), mixed=a.mixed)
    operands, described = triton_described.in_order(rows, weights, config, along_k, a.format, target)
    if described and triton_described.persistent(rows.shape[0], weights.shape[0], K, config):
        programs = min(multiprocessors(rows, target), *_grid(num_tiles, N, config))
        options = {key: value for key, value in options.items() if key not in ("FORMAT", "TALL")}
        moe_experts_rows_persistent_kernel[(programs,)](
            operands[0], operands[-1], bias, out, a.offsets, a.tiles, num_tiles, K=K, N=N, ALONG_K=along_k,
            E_POW2=next_power_of_2(weights.shape[0]), **config | options,
        )  # fmt: skip
        return
    moe_experts_rows_kernel[_grid(num_tiles, N, config)](
        *operands, scales, bias, out, a.offsets, a.tiles, num_tiles, K=K, N=N, STEP_K=1 if along_k else N,
        STEP_N=K if along_k else 1, DESCRIBED=described, **config | options,
    )  # fmt: skip


def moe_experts(a: Experts) -> Output:
    concatenated, in_rows = not a.interleaved, a.in_rows
    E, H, I = a.gate_up.shape[0], a.hidden.shape[1], a.inner
    S, K = a.weights.shape
    result = empty_output(a)
    if S * K == 0:
        result.out.zero_()
        return result
    hidden, weights, gate_up, down, gate_up_scales, down_scales, gate_up_bias, down_bias = _contiguous(a)
    target, size = capability(hidden), hidden.element_size()
    rows, num_tiles = _plan(S * K, E)
    common = flags(size, target) | dict(E=E, FORMAT=a.format, TALL=target >= 90)
    act = hidden.new_empty(S * K, I)
    config = gemm_config(rows, I, H, size, target, pairs=True, stored=bool(a.format), mixed=a.mixed)
    operands, described = triton_described.gathered(hidden, gate_up, config, concatenated, a.format, target)
    moe_experts_gate_up_kernel[_grid(num_tiles, I, config)](
        *operands, gate_up_scales, gate_up_bias, act, result.pre if a.keep else None, a.permutation, a.offsets,
        a.tiles, num_tiles, H=H, I=I, TOP_K=K, CONCATENATED=concatenated, GPT_OSS=a.activation == "gpt_oss",
        ALPHA=a.alpha, LIMIT=a.limit, DESCRIBED=described, **config, **common,
    )  # fmt: skip
    y = hidden.new_empty(S * K, H)
    _rows(a, act, down, down_scales, down_bias, y, in_rows, target, common)
    config = combine_config(S, H)
    moe_experts_combine_kernel[(cdiv(S, config["BT"]), cdiv(H, config["BH"]))](
        y, weights, a.inverse, a.offsets, result.out, S, E=E, H=H, TOP_K=K, **config
    )
    return result


def moe_experts_backward(b: ExpertsBackward) -> Gradients:
    a, pre, needs = b.forward, b.pre, b.need
    concatenated, in_rows = not a.interleaved, a.in_rows
    E, H, I = a.gate_up.shape[0], a.hidden.shape[1], a.inner
    S, K = a.weights.shape
    result = empty_gradients(b)
    if S * K == 0:
        for gradient in result:
            gradient.zero_()
        return result
    grad = b.grad.contiguous()
    hidden, weights, gate_up, down, gate_up_scales, down_scales, _, down_bias = _contiguous(a)
    target, size = capability(hidden), hidden.element_size()
    rows, num_tiles = _plan(S * K, E)
    common = flags(size, target)
    gemm = common | dict(E=E, FORMAT=a.format, TALL=target >= 90)

    def wanted(name: str) -> Tensor | None:
        return getattr(result, name) if getattr(needs, name) else None

    need_up, need_down = needs.gate_up or needs.gate_up_bias, needs.down or needs.down_bias

    config = gemm_config(rows, I, H, size, target, pairs=True, epilogue=True, stored=bool(a.format), mixed=a.mixed)
    # With more warps or stages ptxas takes so few registers that it spills.
    few_registers = target == 120 and common["PRECISION"] == "tf32"
    if few_registers:
        config |= dict(num_warps=4, num_stages=2)
    column_tiles = cdiv(I, config["BN"])
    grad_pre = torch.empty_like(pre)
    weighted = pre.new_empty(S * K, I) if need_down else None
    direct = column_tiles == 1 and needs.weights
    partial = result.weights if direct else weights.new_empty(column_tiles, S * K, dtype=torch.float32)
    moe_experts_down_backward_kernel[_grid(num_tiles, I, config)](
        grad, down, down_scales, down_bias, weights, pre, weighted, grad_pre, partial, a.permutation, a.offsets,
        a.tiles, S * K, num_tiles, H=H, I=I, TOP_K=K, CONCATENATED=concatenated, GPT_OSS=a.activation == "gpt_oss",
        ALPHA=a.alpha, LIMIT=a.limit, **config, **gemm,
    )  # fmt: skip
    if need_up or need_down:
        config = weight_grad_config(S * K, E, size, target)
        up = cdiv(2 * I, config["BP"]) * cdiv(H, config["BG"]) if need_up else 0
        both = up + (cdiv(I, config["BP"]) * cdiv(H, config["BG"]) if need_down else 0)
        moe_experts_weight_grad_kernel[(both, E)](
            grad_pre, hidden, wanted("gate_up"), wanted("gate_up_bias"), weighted, grad, wanted("down"),
            wanted("down_bias"), weights, a.permutation, a.offsets,
            H=H, I=I, TOP_K=K, CONCATENATED=concatenated, NUM_UP=up, **config, **common,
        )  # fmt: skip
    if needs.hidden or needs.weights:
        expanded = None
        if needs.hidden:
            expanded = hidden.new_empty(S * K, H)
            few_warps = dict(num_warps=4) if few_registers and rows == 64 else {}
            _rows(a, grad_pre, gate_up, gate_up_scales, None, expanded, not in_rows, target, gemm | few_warps)
        config = combine_config(S, H)
        moe_experts_combine_backward_kernel[(cdiv(S, config["BT"]), cdiv(H, config["BH"]))](
            expanded, a.inverse, a.offsets, result.hidden, partial, wanted("weights"), S, E=E, H=H, TOP_K=K,
            NUM_PARTIAL=0 if direct else column_tiles, **config,
        )  # fmt: skip
    return result
