"""The projector on GPUs.

Forward: one pass over the tokens (row statistics, or the normalised rows themselves), then one GEMM a hidden layer
with bias and GELU in its epilogue, then the last linear. The first GEMM either gathers and normalises its operand tiles
itself (implicit) or reads the rows of that pass; `implicit` decides, `docs/pixel_shuffle_mlp.md` has the byte and FLOP
counts. The last linear needs no epilogue of ours: the vendor's GEMM adds the bias, unless the rows are scattered.

Backward: the passes are kernels (GELU with bias sums, LayerNorm with the scatter to the tokens), the GEMMs are the
vendor's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gpu import capability
from ..._triton import Described, Kernel, cdiv, describable
from ..common.activations import gelu, gelu_slope
from ..common.matmul import flags, operands
from .config import gemm_config, implicit, row_config, slab_config
from .op import Projected, Projector, ProjectorBackward, ProjectorInto, empty_pre, inputs_of


@triton.jit
def _first_patch(row, tiles, stride_tile, stride_token, MERGE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                 SKIP: tl.constexpr, TRANSPOSED: tl.constexpr, CHOSEN: tl.constexpr):  # fmt: skip
    """Offset of the first patch of shuffled row(s) `row`, in elements."""
    ROWS: tl.constexpr = HEIGHT // MERGE
    COLUMNS: tl.constexpr = WIDTH // MERGE
    tile = row // (ROWS * COLUMNS)
    cell = row % (ROWS * COLUMNS)
    if TRANSPOSED:
        i = cell % ROWS
        j = cell // ROWS
    else:
        i = cell // COLUMNS
        j = cell % COLUMNS
    if CHOSEN:
        tile = tl.load(tiles + tile)
    return tile.to(tl.int64) * stride_tile + (SKIP + i * (MERGE * WIDTH) + j * MERGE).to(tl.int64) * stride_token


@triton.jit
def _patch(k, stride_token, C: tl.constexpr, MERGE: tl.constexpr, WIDTH: tl.constexpr):
    """Offset of the patch of feature(s) `k` of a shuffled row from its first patch."""
    q = k // C
    return ((q // MERGE) * WIDTH + q % MERGE) * stride_token


@triton.jit
def _features(k, stride_token, C: tl.constexpr, MERGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Feature numbers k .. k + BLOCK and their offsets; one patch when BLOCK divides C."""
    lanes = tl.arange(0, BLOCK)
    if C % BLOCK == 0:
        return k + lanes, _patch(k, stride_token, C, MERGE, WIDTH) + tl.multiple_of(k % C, BLOCK) + lanes
    else:
        return k + lanes, _patch(k + lanes, stride_token, C, MERGE, WIDTH) + (k + lanes) % C


@triton.jit
def _row_features(k, stride_token, C: tl.constexpr, MERGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                  RUN: tl.constexpr):  # fmt: skip
    """As `_features`; RUN consecutive features are in one patch (RUN divides C)."""
    feature = k + tl.arange(0, BLOCK)
    return feature, tl.max_contiguous(_patch(feature, stride_token, C, MERGE, WIDTH) + feature % C, RUN)


@triton.jit
def _row_statistics(base, stride_token, eps, R: tl.constexpr, C: tl.constexpr, MERGE: tl.constexpr,
                    WIDTH: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of R rows, in one pass: Welford's update in each lane, then merged."""
    K: tl.constexpr = C * MERGE * MERGE
    mean = tl.zeros([R, BLOCK], tl.float32)
    squares = tl.zeros([R, BLOCK], tl.float32)
    count = tl.zeros([1, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        feature, offset = _row_features(k, stride_token, C, MERGE, WIDTH, BLOCK, RUN)
        inside = (feature < K)[None, :]
        value = tl.load(base + offset[None, :], mask=inside, other=0.0).to(tl.float32)
        count += inside.to(tl.float32)
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)
        squares += delta * tl.where(inside, value - mean, 0.0)
    total = tl.sum(mean * count, 1) / K
    spread = mean - total[:, None]
    variance = (tl.sum(squares, 1) + tl.sum(spread * spread * count, 1)) / K
    return total, 1.0 / tl.sqrt(variance + eps)


@Kernel
@triton.jit
def pixel_shuffle_mlp_norm_kernel(
    x, tiles, norm_weight, norm_bias, stats, rows, M, stride_tile, stride_token, eps, C: tl.constexpr,
    MERGE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SKIP: tl.constexpr, TRANSPOSED: tl.constexpr,
    CHOSEN: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """stats [M, 2] = mean and scale of each shuffled row; rows [M, K] = the normalised rows. Either may be None."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    live = row < M
    K: tl.constexpr = C * MERGE * MERGE
    first = _first_patch(tl.minimum(row, M - 1), tiles, stride_tile, stride_token, MERGE, HEIGHT, WIDTH, SKIP,
                         TRANSPOSED, CHOSEN)  # fmt: skip
    base = x + first[:, None]
    if BLOCK >= K:
        feature, offset = _row_features(0, stride_token, C, MERGE, WIDTH, BLOCK, RUN)
        inside = (feature < K)[None, :]
        whole = tl.load(base + offset[None, :], mask=live[:, None] & inside, other=0.0).to(tl.float32)
        mean = tl.sum(whole, 1) / K
        spread = tl.where(inside, whole - mean[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(spread * spread, 1) / K + eps)
    else:
        mean, scale = _row_statistics(base, stride_token, eps, R, C, MERGE, WIDTH, BLOCK, RUN)
    if stats is not None:
        tl.store(stats + row.to(tl.int64) * 2, mean, mask=live)
        tl.store(stats + row.to(tl.int64) * 2 + 1, scale, mask=live)
    if rows is not None:
        target = rows + row.to(tl.int64)[:, None] * K
        for k in range(0, K, BLOCK):
            feature, offset = _row_features(k, stride_token, C, MERGE, WIDTH, BLOCK, RUN)
            mask = live[:, None] & (feature < K)[None, :]
            value = whole if BLOCK >= K else tl.load(base + offset[None, :], mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(norm_weight + feature, mask=feature < K, other=0.0)[None, :].to(tl.float32)
            bias = tl.load(norm_bias + feature, mask=feature < K, other=0.0)[None, :].to(tl.float32)
            value = (value - mean[:, None]) * scale[:, None] * weight + bias
            tl.store(target + feature[None, :], value.to(rows.dtype.element_ty), mask=mask)


@Kernel
@triton.jit
def pixel_shuffle_mlp_linear_kernel(
    a, tiles, stats, norm_weight, norm_bias, w, bias, out, starts, pre, M, stride_tile, stride_token, stride_out,
    stride_pre, C: tl.constexpr, MERGE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SKIP: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHOSEN: tl.constexpr, K: tl.constexpr, N: tl.constexpr, IMPLICIT: tl.constexpr,
    DESCRIBED: tl.constexpr, GELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out = act(a w^T + bias): `a` is [M, K], or when IMPLICIT the tokens, gathered and normalised tile by tile.

    DESCRIBED: a and w are tensor descriptors by [BM, BK] and [BN, BK], whose boxes bulk copies bring.
    pre: gets a w^T + bias, or None. starts: first row of `out` of each vision tile, or None.
    """
    NUM_N: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    group = pid // (GROUP * NUM_N)
    height = min((M + BM - 1) // BM - group * GROUP, GROUP)
    first_row = (group * GROUP + pid % (GROUP * NUM_N) % height) * BM
    first_column = (pid % (GROUP * NUM_N) // height) * BN
    row = first_row + tl.arange(0, BM)
    column = first_column + tl.arange(0, BN)
    # Rows and columns past the end compute on valid data and are not stored.
    row_in = tl.minimum(row, M - 1)
    column_in = column if N % BN == 0 else tl.minimum(column, N - 1)
    if not DESCRIBED:
        w_rows = w + column_in.to(tl.int64)[None, :] * K
    if IMPLICIT:
        first = _first_patch(row_in, tiles, stride_tile, stride_token, MERGE, HEIGHT, WIDTH, SKIP, TRANSPOSED, CHOSEN)
        a_rows = a + first[:, None]
        mean = tl.load(stats + row_in.to(tl.int64) * 2)
        scale = tl.load(stats + row_in.to(tl.int64) * 2 + 1)
    elif not DESCRIBED:
        a_rows = a + row_in.to(tl.int64)[:, None] * K
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        lanes = k + tl.arange(0, BK)
        inside = lanes < K
        if DESCRIBED:
            value = a.load([first_row, k])
        elif IMPLICIT:
            feature, offset = _features(k, stride_token, C, MERGE, WIDTH, BK)
            if K % BK == 0:
                value = tl.load(a_rows + offset[None, :])
                weight = tl.load(norm_weight + feature)
                shift = tl.load(norm_bias + feature)
            else:
                value = tl.load(a_rows + offset[None, :], mask=inside[None, :], other=0.0)
                weight = tl.load(norm_weight + feature, mask=inside, other=0.0)
                shift = tl.load(norm_bias + feature, mask=inside, other=0.0)
            value = (value.to(tl.float32) - mean[:, None]) * scale[:, None]
            value = value * weight.to(tl.float32)[None, :] + shift.to(tl.float32)[None, :]
            value = value.to(w.dtype.element_ty)
        elif K % BK == 0:
            value = tl.load(a_rows + lanes[None, :])
        else:
            value = tl.load(a_rows + lanes[None, :], mask=inside[None, :], other=0.0)
        if DESCRIBED:
            other = tl.trans(w.load([first_column, k]))
        elif K % BK == 0:
            other = tl.load(w_rows + lanes[:, None])
        else:
            other = tl.load(w_rows + lanes[:, None], mask=inside[:, None], other=0.0)
        value, other = operands(value, other, PRECISION, UPCAST)
        acc = tl.dot(value, other, acc, input_precision=PRECISION)
    stored = (row < M)[:, None] & (column < N)[None, :]
    z = acc + tl.load(bias + column_in).to(tl.float32)[None, :]
    if pre is not None:
        target = pre + row.to(tl.int64)[:, None] * stride_pre + column[None, :]
        tl.store(target, z.to(pre.dtype.element_ty), mask=stored)
    if GELU:
        z = gelu(z)
    if starts is not None:
        CELLS: tl.constexpr = (HEIGHT // MERGE) * (WIDTH // MERGE)
        place = tl.load(starts + row_in // CELLS) + row_in % CELLS
    else:
        place = row.to(tl.int64)
    tl.store(out + place[:, None] * stride_out + column[None, :], z.to(out.dtype.element_ty), mask=stored)


@Kernel
@triton.jit
def pixel_shuffle_mlp_gelu_backward_kernel(
    pre, grad, activated, sums, M, stride_pre: tl.constexpr, N: tl.constexpr, SLAB: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """activated = gelu(pre), grad *= gelu'(pre) in place, sums [slabs, N] = its column sums. Any may be None."""
    slab = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(0, SLAB, BM):
        row = (slab * SLAB + first + tl.arange(0, BM)).to(tl.int64)
        mask = (row < M)[:, None] & (column < N)[None, :]
        z = tl.load(pre + row[:, None] * stride_pre + column[None, :], mask=mask, other=0.0).to(tl.float32)
        at = row[:, None] * N + column[None, :]
        if activated is not None:
            tl.store(activated + at, gelu(z).to(activated.dtype.element_ty), mask=mask)
        if grad is not None:
            dz = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * gelu_slope(z)
            tl.store(grad + at, dz.to(grad.dtype.element_ty), mask=mask)
            total += tl.where(mask, dz, 0.0)
    if sums is not None:
        tl.store(sums + slab.to(tl.int64) * N + column, tl.sum(total, 0), mask=column < N)


@triton.jit
def _centred_and_gradient(k, base, grad_rows, live, norm_weight, mean, scale, stride_token, C: tl.constexpr,
                          MERGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                          RUN: tl.constexpr):  # fmt: skip
    """Of the features from k on: the normalised values, and the gradients times the norm's weight (0 past the end)."""
    feature, offset = _row_features(k, stride_token, C, MERGE, WIDTH, BLOCK, RUN)
    inside = feature < C * MERGE * MERGE
    mask = live[:, None] & inside[None, :]
    centred = (tl.load(base + offset[None, :], mask=mask, other=0.0).to(tl.float32) - mean) * scale
    g = tl.load(grad_rows + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    return centred, g * tl.load(norm_weight + feature, mask=inside, other=0.0)[None, :].to(tl.float32)


@Kernel
@triton.jit
def pixel_shuffle_mlp_norm_backward_kernel(
    x, tiles, norm_weight, stats, grad, dx, M, stride_tile, stride_token, C: tl.constexpr, MERGE: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SKIP: tl.constexpr, TRANSPOSED: tl.constexpr, CHOSEN: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """dx [K, SKIP + HEIGHT * WIDTH, C], without the skipped tokens, from the gradient [M, K] of the normalised rows."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    live = row < M
    row = tl.minimum(row, M - 1)
    K: tl.constexpr = C * MERGE * MERGE
    TOKENS: tl.constexpr = SKIP + HEIGHT * WIDTH
    first = _first_patch(row, tiles, stride_tile, stride_token, MERGE, HEIGHT, WIDTH, SKIP, TRANSPOSED, CHOSEN)
    base = x + first[:, None]
    first = _first_patch(row, tiles, TOKENS * C, C, MERGE, HEIGHT, WIDTH, SKIP, TRANSPOSED, False)
    target = dx + first[:, None]
    mean = tl.load(stats + row.to(tl.int64) * 2)[:, None]
    scale = tl.load(stats + row.to(tl.int64) * 2 + 1)[:, None]
    grad_rows = grad + row.to(tl.int64)[:, None] * K
    if BLOCK >= K:
        all_centred, all_g = _centred_and_gradient(
            0, base, grad_rows, live, norm_weight, mean, scale, stride_token, C, MERGE, WIDTH, BLOCK, RUN
        )  # fmt: skip
        mean_g = tl.sum(all_g, 1)[:, None] / K
        mean_gx = tl.sum(all_g * all_centred, 1)[:, None] / K
    else:
        sum_g = tl.zeros([R, BLOCK], tl.float32)
        sum_gx = tl.zeros([R, BLOCK], tl.float32)
        for k in range(0, K, BLOCK):
            centred, g = _centred_and_gradient(
                k, base, grad_rows, live, norm_weight, mean, scale, stride_token, C, MERGE, WIDTH, BLOCK, RUN
            )  # fmt: skip
            sum_g += g
            sum_gx += g * centred
        mean_g = tl.sum(sum_g, 1)[:, None] / K
        mean_gx = tl.sum(sum_gx, 1)[:, None] / K
    for k in range(0, K, BLOCK):
        if BLOCK >= K:
            centred, g = all_centred, all_g
        else:
            centred, g = _centred_and_gradient(
                k, base, grad_rows, live, norm_weight, mean, scale, stride_token, C, MERGE, WIDTH, BLOCK, RUN
            )  # fmt: skip
        value = (g - mean_g - centred * mean_gx) * scale
        feature, place = _row_features(k, C, C, MERGE, WIDTH, BLOCK, RUN)
        tl.store(target + place[None, :], value.to(dx.dtype.element_ty), mask=live[:, None] & (feature < K)[None, :])


@Kernel
@triton.jit
def pixel_shuffle_mlp_norm_parameters_kernel(
    x, tiles, stats, grad, sums, M, stride_tile, stride_token, C: tl.constexpr, MERGE: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SKIP: tl.constexpr, TRANSPOSED: tl.constexpr, CHOSEN: tl.constexpr,
    SLAB: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [slabs, 2, K]: over a slab of rows, of grad * normalised row and of grad."""
    slab = tl.program_id(0)
    K: tl.constexpr = C * MERGE * MERGE
    feature, offset = _features(tl.program_id(1) * BLOCK, stride_token, C, MERGE, WIDTH, BLOCK)
    weight_sum = tl.zeros([BM, BLOCK], tl.float32)
    bias_sum = tl.zeros([BM, BLOCK], tl.float32)
    for first in range(0, SLAB, BM):
        row = slab * SLAB + first + tl.arange(0, BM)
        mask = (row < M)[:, None] & (feature < K)[None, :]
        row_in = tl.minimum(row, M - 1)
        base = _first_patch(row_in, tiles, stride_tile, stride_token, MERGE, HEIGHT, WIDTH, SKIP, TRANSPOSED, CHOSEN)
        mean = tl.load(stats + row.to(tl.int64) * 2, mask=row < M, other=0.0)
        scale = tl.load(stats + row.to(tl.int64) * 2 + 1, mask=row < M, other=0.0)
        value = tl.load(x + base[:, None] + offset[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + row.to(tl.int64)[:, None] * K + feature[None, :], mask=mask, other=0.0).to(tl.float32)
        weight_sum += g * (value - mean[:, None]) * scale[:, None]
        bias_sum += g
    target = sums + slab.to(tl.int64) * (2 * K) + feature
    tl.store(target, tl.sum(weight_sum, 0), mask=feature < K)
    tl.store(target + K, tl.sum(bias_sum, 0), mask=feature < K)


def _geometry(a: Projector) -> dict[str, Any]:
    return dict(C=a.x.shape[2], MERGE=a.merge, HEIGHT=a.height, WIDTH=a.width, SKIP=a.skip, TRANSPOSED=a.transposed,
                CHOSEN=a.tiles is not None)  # fmt: skip


def _contiguous(a: Projector) -> Projector:
    return a._replace(
        x=a.x if a.x.stride(-1) == 1 else a.x.contiguous(),
        norm_weight=a.norm_weight.contiguous(),
        norm_bias=a.norm_bias.contiguous(),
        weights=[w.contiguous() for w in a.weights],
        biases=[b.contiguous() for b in a.biases],
        tiles=None if a.tiles is None else a.tiles.contiguous(),
    )


def _shuffle_norm(a: Projector, stats: Tensor | None, values: Tensor | None, count: int) -> None:
    config = row_config(count, a.features, a.x.shape[2], a.x.element_size(), capability(a.x), 1)
    pixel_shuffle_mlp_norm_kernel[(cdiv(count, config["R"]),)](
        a.x, a.tiles, a.norm_weight, a.norm_bias, stats, values, count, a.x.stride(0), a.x.stride(1), a.eps,
        **_geometry(a), **config,
    )  # fmt: skip


def shuffled_rows(a: Projector) -> Tensor:
    """The shuffled and normalised rows, without the products; for who has them from elsewhere."""
    values = a.x.new_empty(a.selected * a.cells, a.features)
    if len(values):
        _shuffle_norm(_contiguous(a), None, values, len(values))
    return values


def _linear(
    a: Projector, layer: int, values: Tensor, stats: Tensor | None, out: Tensor, starts: Tensor | None,
    pre: Tensor | None, activate: bool, config: dict[str, Any],
) -> None:  # fmt: skip
    """Layer of the projector; with `stats` of a.x normalised as it is read, else of `values`."""
    rows, w, target = a.selected * a.cells, a.weights[layer], capability(a.x)
    source, x_strides = (a.x, (a.x.stride(0), a.x.stride(1))) if stats is not None else (values, (0, 0))
    N, K = w.shape
    described = stats is None and config["BM"] * config["BN"] >= 128 * 128 and describable(target, values, w)
    if described:
        source = Described(values, (rows, K), (K, 1), (config["BM"], config["BK"]))
        w = Described(w, (N, K), (K, 1), (config["BN"], config["BK"]))
    pixel_shuffle_mlp_linear_kernel[(cdiv(rows, config["BM"]) * cdiv(N, config["BN"]),)](
        source, a.tiles, stats, a.norm_weight, a.norm_bias, w, a.biases[layer], out, starts, pre, rows, *x_strides,
        out.stride(0), 0 if pre is None else pre.stride(0), **_geometry(a), K=K, N=N, IMPLICIT=stats is not None,
        DESCRIBED=described, GELU=activate, **config, **flags(values.element_size(), target),
    )  # fmt: skip


def _project(out: Tensor, starts: Tensor | None, a: Projector) -> Tensor:
    """The rows of the result into `out`: tile k from row starts[k], or one after the other (None)."""
    pre, rows = empty_pre(a), a.selected * a.cells
    if rows == 0:
        return pre
    a = _contiguous(a)
    x, target, size = a.x, capability(a.x), a.x.element_size()
    result = out if out.stride(1) == 1 else out.contiguous()
    shapes = [(w.shape[0], w.shape[1], a.keep and w is not a.weights[-1]) for w in a.weights]
    configs = [gemm_config(rows, N, K, size, target, keep) for N, K, keep in shapes]
    gather = len(a.weights) > 1 and implicit(a.weights[0].shape[0], configs[0], size, target)
    stats = x.new_empty(rows, 2, dtype=torch.float32) if gather else None
    values = x.new_empty(0 if gather else rows, a.features)
    _shuffle_norm(a, stats, None if gather else values, rows)
    column = 0
    for i, w in enumerate(a.weights[:-1]):
        hidden = x.new_empty(rows, w.shape[0])
        kept = pre[:, column : column + w.shape[0]] if a.keep else None
        column += w.shape[0]
        _linear(a, i, values, stats if i == 0 else None, hidden, None, kept, True, configs[i])
        values = hidden
    if starts is None:
        torch.addmm(a.biases[-1], values, a.weights[-1].t(), out=result)
    else:
        _linear(a, len(a.weights) - 1, values, None, result, starts.contiguous(), None, False, configs[-1])
    if result is not out:
        out.copy_(result)
    return pre


def pixel_shuffle_mlp(a: Projector) -> Projected:
    out = a.x.new_empty(a.selected * a.cells, a.weights[-1].shape[0])
    pre = _project(out, None, a)
    return Projected(out.view(a.selected, a.cells, out.shape[1]), pre)


def pixel_shuffle_mlp_into_(a: ProjectorInto) -> Tensor:
    return _project(a.out, a.starts, a.forward)


def _gelu_backward(z: Tensor, da: Tensor | None, activated: Tensor | None, sums: bool) -> Tensor | None:
    """Column sums of the new `da`, in float32, when wanted."""
    rows, columns = z.shape
    config, block = slab_config(rows, columns)
    slabs = cdiv(rows, config["SLAB"])
    partial = z.new_empty(slabs, columns, dtype=torch.float32) if sums else None
    pixel_shuffle_mlp_gelu_backward_kernel[(slabs, cdiv(columns, block))](
        z, da, activated, partial, rows, z.stride(0), N=columns, BN=block, **config
    )
    return None if partial is None else partial.sum(0)


def pixel_shuffle_mlp_backward(b: ProjectorBackward) -> list[Tensor]:
    pre, needs, layers = b.pre, b.needs, len(b.forward.weights)
    rows, features = b.forward.selected * b.forward.cells, b.forward.features
    if rows == 0:
        return [t.new_zeros(t.shape if need else 0) for t, need in zip(inputs_of(b.forward), needs)]
    a, weights = _contiguous(b.forward), b.forward.weights
    x = a.x
    found = [x.new_empty(0) for _ in needs]
    dz = b.grad.reshape(rows, b.grad.shape[-1]).contiguous()
    if needs[-1]:
        found[-1] = dz.sum(0)
    column = pre.shape[1]
    for i in range(layers - 1, 0, -1):
        z = pre[:, column - weights[i].shape[1] : column]
        column -= weights[i].shape[1]
        need_weight, need_bias = needs[3 + i], needs[3 + layers + i - 1]
        before = any(needs[: 3 + i]) or any(needs[3 + layers : 3 + layers + i])
        da = dz @ weights[i] if before else None
        activated = x.new_empty(z.shape) if need_weight else None
        sums = _gelu_backward(z, da, activated, need_bias)
        if activated is not None:
            found[3 + i] = dz.t() @ activated
        if sums is not None:
            found[3 + layers + i - 1] = sums.to(x.dtype)
        if da is None:
            return found
        dz = da
    geometry, strides = _geometry(a), (x.stride(0), x.stride(1))
    stats = x.new_empty(rows, 2, dtype=torch.float32)
    values = x.new_empty(rows, features) if needs[3] else None
    _shuffle_norm(a, stats, values, rows)
    if values is not None:
        found[3] = dz.t() @ values
        del values
    if not any(needs[:3]):
        return found
    da = dz @ weights[0]
    if needs[0]:
        dx = x.new_empty(a.selected, *x.shape[1:])
        config = row_config(rows, features, x.shape[2], x.element_size(), capability(x), 2)
        pixel_shuffle_mlp_norm_backward_kernel[(cdiv(rows, config["R"]),)](
            x, a.tiles, a.norm_weight, stats, da, dx, rows, *strides, **geometry, **config
        )  # fmt: skip
        dx[:, : a.skip] = 0
        found[0] = dx if a.tiles is None else x.new_zeros(x.shape).index_add_(0, a.tiles, dx)
    if needs[1] or needs[2]:
        config, block = slab_config(rows, features)
        slabs = cdiv(rows, config["SLAB"])
        partial = x.new_empty(slabs, 2, features, dtype=torch.float32)
        pixel_shuffle_mlp_norm_parameters_kernel[(slabs, cdiv(features, block))](
            x, a.tiles, stats, da, partial, rows, *strides, **geometry, BLOCK=block, **config
        )
        sums = partial.sum(0)
        for i in (1, 2):
            if needs[i]:
                found[i] = sums[i - 1].to(x.dtype, copy=True)
    return found
