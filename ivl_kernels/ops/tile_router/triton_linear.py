"""Products of few rows with weights that are streamed once, in Triton: a tile each, and what launches them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import Kernel, cdiv, next_power_of_2
from ..common.activations import gelu
from .op import FewRows, FewRowsTransposed


@triton.jit
def linear_tile(
    x, w, bias, out, group, block, split, m0, rows, each, width, stride, outputs, split_width, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr = 1, GELU: tl.constexpr = False,
):  # fmt: skip
    """One tile of out [splits, rows, outputs]: x [PARTS, rows, groups, width], summed over parts, times rows of w."""
    groups = outputs // each
    inside = block * BN + tl.arange(0, BN)
    n = group * each + inside
    n_mask = inside < each
    m = m0 + tl.arange(0, BM)
    m_mask = m < rows
    total = tl.zeros((BM, BN), tl.float32)
    last = tl.minimum((split + 1) * split_width, width)
    x_rows = x + (m[:, None].to(tl.int64) * groups + group) * width
    w_rows = w + n[None, :].to(tl.int64) * stride
    for k0 in range(split * split_width, last, BK):
        k = k0 + tl.arange(0, BK)
        a = _sum_of_parts(x_rows + k[None, :], m_mask[:, None] & (k[None, :] < width), rows * groups * width, PARTS)
        b = tl.load(w_rows + k[:, None], mask=n_mask[None, :] & (k[:, None] < width), other=0.0)
        total = tl.dot(a, b.to(tl.float32), total, input_precision=PRECISION)
    if bias is not None:
        b = tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)
        total += tl.where(split == 0, b, 0.0)[None, :]
    if scale is not None:
        total *= scale
    if GELU:
        total = gelu(total)
    place = out + (split.to(tl.int64) * rows + m[:, None]) * outputs + n[None, :]
    tl.store(place, total, mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def _sum_of_parts(place, mask, part, PARTS: tl.constexpr):
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        total += tl.load(place + i * part, mask=mask, other=0.0)
    return total


@triton.jit
def transposed_tile(
    x, w, out, group, block, m0, rows, each, width, stride, groups,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr = 1,
):  # fmt: skip
    """One tile of out [rows, groups, width]: x [PARTS, rows, groups, each], summed, times the blocks of w's rows."""
    c = block * BN + tl.arange(0, BN)
    c_mask = c < width
    m = m0 + tl.arange(0, BM)
    m_mask = m < rows
    row = m[:, None].to(tl.int64) * groups + group
    total = tl.zeros((BM, BN), tl.float32)
    for d0 in range(0, each, BK):
        d = d0 + tl.arange(0, BK)
        mask = m_mask[:, None] & (d[None, :] < each)
        a = _sum_of_parts(x + row * each + d[None, :], mask, rows * groups * each, PARTS)
        place = w + (group * each + d[:, None]).to(tl.int64) * stride + c[None, :]
        b = tl.load(place, mask=(d[:, None] < each) & c_mask[None, :], other=0.0)
        total = tl.dot(a, b.to(tl.float32), total, input_precision=PRECISION)
    tl.store(out + row * width + c[None, :], total, mask=m_mask[:, None] & c_mask[None, :])


@Kernel
@triton.jit
def tile_router_linear_kernel(
    x, w, bias, out, rows, each, width, stride, outputs, blocks, split_width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid, split, m0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BM
    linear_tile(
        x, w, bias, out, pid // blocks, pid % blocks, split, m0, rows, each, width, stride, outputs, split_width, None,
        BM, BN, BK, PRECISION,
    )  # fmt: skip


@Kernel
@triton.jit
def tile_router_linear_transposed_kernel(
    x, w, out, rows, each, width, stride, groups,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, m0 = tl.program_id(1), tl.program_id(2) * BM
    transposed_tile(
        x, w, out, group, tl.program_id(0), m0, rows, each, width, stride, groups,
        BM, BN, BK, PRECISION,
    )  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: AMD GPUs have float32 matrix units, NVIDIA's take TF32 (three for float32 inputs)."""
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def rows_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def linear_config(rows: int, groups: int, each: int, width: int) -> dict[str, int]:
    """Launch of the linear kernel: few outputs are cut along the width until about 256 programs stream the weights."""
    block_n = 32 if each >= 32 else 16
    blocks = cdiv(each, block_n)
    splits = max(1, min(8, 256 // max(1, groups * blocks), width // 512))
    block_k = min(64, max(16, next_power_of_2(width)))
    return {
        "blocks": blocks,
        "split_width": cdiv(cdiv(width, splits), block_k) * block_k,
        "BM": 16 if rows <= 16 else 32 if rows <= 32 else 64,
        "BN": block_n,
        "BK": block_k,
        "num_warps": 4,
        "num_stages": 3,
    }


def few_rows_linear(a: FewRows) -> Tensor:
    x, w = a.x.contiguous(), rows_last(a.w)
    (rows, groups, width), outputs = x.shape, w.shape[0]
    each = outputs // groups
    bias = None if a.bias is None else a.bias.contiguous()
    config = linear_config(rows, groups, each, width)
    blocks, split_width = config.pop("blocks"), config.pop("split_width")
    splits = cdiv(width, split_width)
    out = x.new_empty(splits, rows, outputs)
    if rows:
        tile_router_linear_kernel[groups * blocks, splits, cdiv(rows, config["BM"])](
            x, w, bias, out, rows, each, width, w.stride(0), outputs, blocks, split_width,
            PRECISION=precision(w.dtype), enable_fp_fusion=True, **config,
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)


def transposed_config(rows: int, each: int, itemsize: int) -> dict[str, int]:
    """Launch of `tile_router_linear_transposed_kernel`; fewer warps or longer steps spill."""
    depth = 32 if rows > 32 and itemsize == 4 else 64
    return {
        "BM": 16 if rows <= 16 else 32 if rows <= 32 else 64,
        "BN": 64,
        "BK": min(depth, max(16, next_power_of_2(each))),
        "num_warps": 4 if rows <= 16 else 8,
        "num_stages": 2,
    }


def few_rows_linear_transposed(a: FewRowsTransposed) -> Tensor:
    x, w = a.x.contiguous(), rows_last(a.w)
    (rows, groups, each), width = x.shape, w.shape[1]
    out = x.new_empty(rows, groups, width)
    config = transposed_config(rows, each, w.element_size())
    if rows:
        tile_router_linear_transposed_kernel[cdiv(width, config["BN"]), groups, cdiv(rows, config["BM"])](
            x, w, out, rows, each, width, w.stride(0), groups, PRECISION=precision(w.dtype), enable_fp_fusion=True,
            **config,
        )  # fmt: skip
    return out
