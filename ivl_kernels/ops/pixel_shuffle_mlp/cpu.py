"""The projector on the CPU: csrc/cpu/pixel_shuffle_mlp.cpp, with its own matrix product or torch's.

Our float32 product widens bfloat16 and float16 weights while it packs them and applies bias and GELU to finished tiles.
torch's is used where it is faster: float64, bfloat16 on processors with bfloat16 instructions, and processors without
AVX2. Then the rows pass through it in chunks, between our passes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import _cpu, _env
from .op import Projected, Projector, ProjectorBackward, ProjectorInto, empty_pre, inputs_of

CHUNK_BYTES = 8 << 20  # of shuffled, normalised rows


@functools.cache
def _bfloat16_products() -> bool:
    """True when oneDNN multiplies bfloat16 by instructions made for it."""
    limit = _env.ONEDNN_MAX_CPU_ISA.get().upper()
    allowed = not limit or any(name in limit for name in ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT"))
    return allowed and bool(_cpu.module().cpu_features().get("avx512bf16"))


def _use_library(dtype: torch.dtype) -> bool:
    if dtype == torch.float64:
        return True
    if dtype == torch.float32:
        return _cpu.module().cpu_features()["isa"] == "portable"
    return dtype == torch.bfloat16 and _bfloat16_products()


def _rows_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _chunk(rows: int, columns: int, itemsize: int) -> int:
    most = max(64, CHUNK_BYTES // (columns * itemsize))
    return -(-rows // -(-rows // most)) if rows else 1


def _contiguous(a: Projector) -> Projector:
    return a._replace(
        x=_rows_last(a.x),
        norm_weight=a.norm_weight.contiguous(),
        norm_bias=a.norm_bias.contiguous(),
        weights=[_rows_last(w) for w in a.weights],
        biases=[b.contiguous() for b in a.biases],
        tiles=None if a.tiles is None else a.tiles.contiguous(),
    )


def _norm(a: Projector, first: int, out: Tensor) -> None:
    _cpu.op("shuffle_norm")(a.x, a.norm_weight, a.norm_bias, *a.geometry, a.tiles, first, out)


def _gelu(pre: Tensor, out: Tensor) -> None:
    nothing = pre.new_empty(0)
    _cpu.op("gelu_backward")(pre, out, nothing, nothing)


def _project(out: Tensor, starts: Tensor | None, a: Projector) -> Tensor:
    """The rows of the result into `out` [rows, H]: tile k from row starts[k], or one after the other (None)."""
    pre, rows = empty_pre(a), a.selected * a.cells
    if rows == 0:
        return pre
    a = _contiguous(a)
    target = out if out.stride(1) == 1 else out.contiguous()
    if not _use_library(a.x.dtype):
        _cpu.op("pixel_shuffle_mlp")(
            *a[:5], *a.geometry, a.tiles, rows, target, None if starts is None else starts.contiguous(), pre
        )
    else:
        places = None if starts is None else starts.tolist()
        size = _chunk(rows, a.features, a.x.element_size())
        for first in range(0, rows, size):
            count = min(size, rows - first)
            values = a.x.new_empty(count, a.features)
            _norm(a, first, values)
            column = 0
            for weight, bias in zip(a.weights[:-1], a.biases[:-1]):
                end = column + weight.shape[0]
                z = pre[first : first + count, column:end] if a.keep else a.x.new_empty(count, weight.shape[0])
                torch.addmm(bias, values, weight.t(), out=z)
                values = torch.empty_like(z, memory_format=torch.contiguous_format) if a.keep else z
                _gelu(z, values)
                column = end
            for begin, end, row in _pieces(first, first + count, a.cells, places):
                piece = values[begin - first : end - first]
                torch.addmm(a.biases[-1], piece, a.weights[-1].t(), out=target[row : row + end - begin])
    if target is not out:
        out.copy_(target)
    return pre


def _pieces(first: int, last: int, cells: int, places: list[int] | None):
    """(begin, end, row of `out`) of the runs of rows [first, last) that are contiguous in `out`."""
    if places is None:
        yield first, last, first
        return
    while first < last:
        end = min(last, (first // cells + 1) * cells)
        yield first, end, places[first // cells] + first % cells
        first = end


def pixel_shuffle_mlp(a: Projector) -> Projected:
    out = a.x.new_empty(a.selected * a.cells, a.weights[-1].shape[0])
    pre = _project(out, None, a)
    return Projected(out.view(a.selected, a.cells, out.shape[1]), pre)


def pixel_shuffle_mlp_into_(a: ProjectorInto) -> Tensor:
    return _project(a.out, a.starts, a.forward)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """a @ b, into `out` or added to it."""
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    if not _use_library(a.dtype):
        _cpu.op("matmul_into")(a, b if 1 in b.stride() else b.contiguous(), b.new_empty(0), out, accumulate, True)
    elif accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
    return out


def pixel_shuffle_mlp_backward(b: ProjectorBackward) -> list[Tensor]:
    a, weights, pre, needs = _contiguous(b.forward), b.forward.weights, b.pre, b.needs
    x, rows, features, layers = a.x, a.selected * a.cells, a.features, len(a.weights)
    sums_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    found = [x.new_empty(0) for _ in needs]
    if rows == 0:
        return [t.new_zeros(t.shape if need else 0) for t, need in zip(inputs_of(a), needs)]
    nothing, sums_nothing = x.new_empty(0), x.new_empty(0, dtype=sums_dtype)
    dz = b.grad.reshape(rows, -1).contiguous()
    if needs[-1]:
        found[-1] = dz.sum(0)
    column = pre.shape[1]
    for i in range(layers - 1, 0, -1):
        z = pre[:, column - weights[i].shape[1] : column]
        column -= weights[i].shape[1]
        need_weight, need_bias = needs[3 + i], needs[3 + layers + i - 1]
        before = any(needs[:3]) or any(needs[3 : 3 + i]) or any(needs[3 + layers : 3 + layers + i])
        da = _product(dz, weights[i]) if before else nothing
        activated = torch.empty_like(z, memory_format=torch.contiguous_format) if need_weight else nothing
        sums = x.new_zeros(z.shape[1], dtype=sums_dtype) if need_bias else sums_nothing
        _cpu.op("gelu_backward")(z, activated, da, sums)
        if need_weight:
            found[3 + i] = _product(dz.t(), activated)
        if need_bias:
            found[3 + layers + i - 1] = sums.to(x.dtype)
        dz = da
        if not before:
            return found
    size = _chunk(rows, features, x.element_size())
    if needs[3]:
        # Weight gradients of 16-bit floats are not summed chunk by chunk: each sum would be rounded.
        step = size if x.element_size() >= 4 else rows
        weight_grad = torch.empty_like(weights[0], memory_format=torch.contiguous_format)
        for first in range(0, rows, step):
            values = x.new_empty(min(step, rows - first), features)
            _norm(a, first, values)
            _product(dz[first : first + step].t(), values, weight_grad, accumulate=first > 0)
        found[3] = weight_grad
    if any(needs[:3]):
        dx = x.new_empty(a.selected, *x.shape[1:]) if needs[0] else nothing
        sums = x.new_zeros(2, features, dtype=sums_dtype) if needs[1] or needs[2] else sums_nothing
        for first in range(0, rows, size):
            da = _product(dz[first : first + size], weights[0])
            _cpu.op("shuffle_norm_backward")(x, a.norm_weight, *a.geometry, a.tiles, first, da, dx, sums)
        if needs[0]:
            dx[:, : a.skip] = 0
            found[0] = dx if a.tiles is None else torch.zeros_like(x).index_add_(0, a.tiles, dx)
        for i in (1, 2):
            if needs[i]:
                found[i] = sums[i - 1].to(x.dtype, copy=True)
    return found
