"""Rotary embedding on GPUs.

Triton rather than CUDA C++: tiles of arithmetic with many compile-time variants (dtype, head shape, norm, angles), and
one source serves NVIDIA and AMD. A program holds cos and sin of its tokens in registers and walks over the heads
of q, then of k, so angles are read or computed once a token and q and k are touched once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _gpu
from ..._triton import Kernel, cdiv, lanes, next_power_of_2
from .op import Gradients, NormBackward, Rope, Rotated, empty_rotated

# pi / 2 as the sum of three float32 numbers. k * PI_A is exact in the first fused multiply-add while x < 2^18.
PI_A = tl.constexpr(1.5707963705062866)
PI_B = tl.constexpr(-4.371138828673793e-08)
PI_C = tl.constexpr(-1.7151245100058637e-15)


@triton.jit
def _sin_cos(x):
    """sin and cos to within 1 ulp for |x| < 2^18: Cody-Waite reduction with the remainder as a sum of two floats."""
    k = tl.floor(x * 0.6366197723675814 + 0.5)
    r = tl.fma(-k, PI_A, x)  # exact
    high = r - k * PI_B
    product_error = tl.fma(k, PI_B, -(k * PI_B))
    low = ((r - high) - k * PI_B) - product_error - k * PI_C
    z = high * high
    s = tl.fma(z, 2.7557314e-06, -1.9841270e-04)
    s = tl.fma(z, s, 8.3333333e-03)
    s = tl.fma(z, s, -1.6666667e-01)
    sine = high + tl.fma(high * z, s, low)
    c = tl.fma(z, -2.7557319e-07, 2.4801587e-05)
    c = tl.fma(z, c, -1.3888889e-03)
    c = tl.fma(z, c, 4.1666668e-02)
    half = 0.5 * z
    w = 1.0 - half
    # z was rounded: its error matters where the cosine is near 1 / sqrt(2)
    half_error = 0.5 * tl.fma(high, high, -z)
    cosine = w + (((1.0 - w) - half) + (tl.fma(z * z, c, -(high * low)) - half_error))
    quadrant = k.to(tl.int32)
    odd = (quadrant & 1) != 0
    a = tl.where(odd, cosine, sine)
    b = tl.where(odd, sine, cosine)
    return tl.where((quadrant & 2) != 0, -a, a), tl.where(((quadrant + 1) & 2) != 0, -b, b)


@triton.jit
def _same(value: tl.constexpr, x):
    return tl.full(x.shape, value, x.dtype)


@triton.jit
def _times(x, y, PACKED: tl.constexpr):
    """The product rounded to the operands' 16-bit type. PACKED: two at a time (NVIDIA)."""
    if PACKED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, _same(-0.0, x)], x.dtype, True, 2
        )
    elif PACKED:
        return tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], x.dtype, True, 2)
    else:
        return (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype)


@triton.jit
def _plus(x, y, PACKED: tl.constexpr):
    if PACKED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $3, $2;", "=r,r,r,r", [x, y, _same(1.0, x)], x.dtype, True, 2
        )
    elif PACKED:
        return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], x.dtype, True, 2)
    else:
        return (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)


@triton.jit
def _minus(x, y, PACKED: tl.constexpr):
    if PACKED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $2, $3, $1;", "=r,r,r,r", [x, y, _same(-1.0, x)], x.dtype, True, 2
        )
    elif PACKED:
        return tl.inline_asm_elementwise("sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], x.dtype, True, 2)
    else:
        return (x.to(tl.float32) - y.to(tl.float32)).to(x.dtype)


@triton.jit
def _angles(
    first, second, angle_batch, angle_token, scale, b, n, i, inside, fits,
    TABLE: tl.constexpr, ROUND: tl.constexpr, INVERSE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """cos and sin [TOKENS, HALF]: rounded to DTYPE when ROUND, else float32."""
    rows = first + b * angle_batch + n.to(tl.int64) * angle_token
    if TABLE:
        mask = inside[:, None] & fits[None, :]
        cos = tl.load(rows[:, None] + i[None, :], mask, 0.0)
        sin = tl.load((second + b * angle_batch + n.to(tl.int64) * angle_token)[:, None] + i[None, :], mask, 0.0)
    else:
        position = tl.load(rows, inside, 0.0)
        frequency = tl.load(second + i, fits, 0.0)
        sin, cos = _sin_cos(position[:, None] * frequency[None, :])
        if scale is not None:
            cos, sin = cos * scale, sin * scale
    if INVERSE:
        sin = -sin
    if ROUND:
        cos, sin = cos.to(DTYPE), sin.to(DTYPE)
    else:
        cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    return cos, sin


@triton.jit
def _rotate(a, b, cos, sin, ROUND: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr):
    """With a table the bits are those of the eager chain: every product is rounded."""
    if ROUND:
        u = _minus(_times(a, cos, PACKED), _times(b, sin, PACKED), PACKED)
        v = _plus(_times(b, cos, PACKED), _times(a, sin, PACKED), PACKED)
    elif TABLE:
        u = a * cos - b * sin
        v = b * cos + a * sin
    else:
        u = tl.fma(a, cos, -sin * b)
        v = tl.fma(b, cos, a * sin)
    return u, v


@triton.jit
def _heads(
    x, y, weight, cos, sin, begin, end, x_batch, x_head, x_token, y_batch, y_head, y_token, b, n, inside, eps,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    NORM: tl.constexpr, ROUND: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    dtype = x.dtype.element_ty
    i = tl.arange(0, BLOCK)
    mask = inside[:, None] & (i < HALF)[None, :]
    x += b * x_batch
    y += b * y_batch
    from_a = n.to(tl.int64)[:, None] * x_token + i[None, :]
    to_a = n.to(tl.int64)[:, None] * y_token + i[None, :]
    if REST > 0:
        j = tl.arange(0, REST_BLOCK)
        rest_mask = inside[:, None] & (j < REST)[None, :]
        from_rest = n.to(tl.int64)[:, None] * x_token + 2 * HALF + j[None, :]
        to_rest = n.to(tl.int64)[:, None] * y_token + 2 * HALF + j[None, :]
    if NORM:
        weight_a = tl.load(weight + i, i < HALF, 0.0)[None, :]
        weight_b = tl.load(weight + HALF + i, i < HALF, 0.0)[None, :]
        if REST > 0:
            weight_rest = tl.load(weight + 2 * HALF + j, j < REST, 0.0)[None, :]
    for h in range(begin, end):
        row = x + tl.cast(h, tl.int64) * x_head
        out = y + tl.cast(h, tl.int64) * y_head
        a = tl.load(row + from_a, mask, 0.0)
        b_ = tl.load(row + from_a + HALF, mask, 0.0)
        if REST > 0:
            rest = tl.load(row + from_rest, rest_mask, 0.0)
        if NORM:
            a, b_ = a.to(tl.float32), b_.to(tl.float32)
            total = tl.sum(a * a + b_ * b_, 1)
            if REST > 0:
                rest = rest.to(tl.float32)
                total += tl.sum(rest * rest, 1)
            # The bits of the division and the sum, in one instruction where nothing is rounded between.
            mean = tl.fma(total, 1.0 / DIM, eps) if DIM & (DIM - 1) == 0 else total / DIM + eps
            rstd = (1.0 / tl.sqrt_rn(mean))[:, None]
            a, b_ = a * rstd, b_ * rstd
            if ROUND:
                a, b_ = _times(a.to(dtype), weight_a, PACKED), _times(b_.to(dtype), weight_b, PACKED)
            else:
                a, b_ = a * weight_a.to(tl.float32), b_ * weight_b.to(tl.float32)
            if REST > 0:
                rest = rest * rstd
                if ROUND:
                    rest = _times(rest.to(dtype), weight_rest, PACKED)
                else:
                    rest = (rest * weight_rest.to(tl.float32)).to(dtype)
        elif not ROUND:
            a, b_ = a.to(tl.float32), b_.to(tl.float32)
        u, v = _rotate(a, b_, cos, sin, ROUND, PACKED, TABLE)
        tl.store(out + to_a, u.to(dtype), mask)
        tl.store(out + to_a + HALF, v.to(dtype), mask)
        if REST > 0:
            tl.store(out + to_rest, rest, rest_mask)


@Kernel
@triton.jit
def v2pe_rope_kernel(
    q, k, q_out, k_out, q_weight, k_weight, first, second, tokens, angle_batch, angle_token, scale, eps,
    q_batch, q_head, q_token, k_batch, k_head, k_token, qo_batch, qo_head, qo_token, ko_batch, ko_head, ko_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr, REST_BLOCK: tl.constexpr, TOKENS: tl.constexpr, TABLE: tl.constexpr,
    NORM: tl.constexpr, ROUND: tl.constexpr, INVERSE: tl.constexpr, PACKED: tl.constexpr, Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Program (token block, batch row, group of heads).

    Q_BLOCK > 0, for few tokens: program (token, batch row, group), that many heads at a time, so that its threads share
    the work of the angles.
    """
    Q_EACH: tl.constexpr = (Q_HEADS + GROUPS - 1) // GROUPS
    K_EACH: tl.constexpr = (K_HEADS + GROUPS - 1) // GROUPS
    group = tl.program_id(2) if GROUPS > 1 else 0
    q_first, k_first = group * Q_EACH, group * K_EACH
    q_end = tl.minimum(q_first + Q_EACH, Q_HEADS) if GROUPS > 1 else Q_HEADS
    k_end = tl.minimum(k_first + K_EACH, K_HEADS) if GROUPS > 1 else K_HEADS
    b = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = n < tokens
    cos, sin = _angles(
        first, second, angle_batch, angle_token, scale, b, n, i, inside, i < HALF, TABLE, ROUND, INVERSE,
        q.dtype.element_ty,
    )  # fmt: skip
    if Q_BLOCK > 0:
        # Heads take the place of tokens: rows of the tile are heads, and the loop has one turn.
        t = tl.program_id(0)
        h = tl.arange(0, Q_BLOCK)
        for done in tl.static_range(0, Q_EACH, Q_BLOCK):
            skip = tl.full((), done, tl.int64) + q_first
            _heads(
                q + skip * q_head, q_out + skip * qo_head, q_weight, cos, sin, t, t + 1,
                q_batch, q_token, q_head, qo_batch, qo_token, qo_head, b, h,
                h < q_end - q_first - done, eps, DIM, HALF, BLOCK, REST, REST_BLOCK, NORM, ROUND, PACKED, TABLE,
            )  # fmt: skip
        h = tl.arange(0, K_BLOCK)
        for done in tl.static_range(0, K_EACH, K_BLOCK):
            skip = tl.full((), done, tl.int64) + k_first
            _heads(
                k + skip * k_head, k_out + skip * ko_head, k_weight, cos, sin, t, t + 1,
                k_batch, k_token, k_head, ko_batch, ko_token, ko_head, b, h,
                h < k_end - k_first - done, eps, DIM, HALF, BLOCK, REST, REST_BLOCK, NORM, ROUND, PACKED, TABLE,
            )  # fmt: skip
    else:
        _heads(
            q, q_out, q_weight, cos, sin, q_first, q_end, q_batch, q_head, q_token, qo_batch, qo_head, qo_token, b, n,
            inside, eps, DIM, HALF, BLOCK, REST, REST_BLOCK, NORM, ROUND, PACKED, TABLE,
        )  # fmt: skip
        _heads(
            k, k_out, k_weight, cos, sin, k_first, k_end, k_batch, k_head, k_token, ko_batch, ko_head, ko_token, b, n,
            inside, eps, DIM, HALF, BLOCK, REST, REST_BLOCK, NORM, ROUND, PACKED, TABLE,
        )  # fmt: skip


@triton.jit
def _heads_backward(
    g, x, y, weight, partial, cos, sin, HEADS, g_batch, g_head, g_token, x_batch, x_head, x_token, y_batch, y_head,
    y_token, b, n, inside, eps,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients before the norm; the weight's gradient of this program to `partial` [DIM]."""
    dtype = y.dtype.element_ty
    i = tl.arange(0, BLOCK)
    mask = inside[:, None] & (i < HALF)[None, :]
    g += b * g_batch
    x += b * x_batch
    y += b * y_batch
    wide = n.to(tl.int64)[:, None]
    columns = i[None, :]
    weight_a = tl.load(weight + i, i < HALF, 0.0).to(tl.float32)[None, :]
    weight_b = tl.load(weight + HALF + i, i < HALF, 0.0).to(tl.float32)[None, :]
    sum_a = tl.zeros_like(cos)
    sum_b = tl.zeros_like(cos)
    if REST > 0:
        j = tl.arange(0, REST_BLOCK)
        rest_mask = inside[:, None] & (j < REST)[None, :]
        rest_columns = 2 * HALF + j[None, :]
        weight_rest = tl.load(weight + 2 * HALF + j, j < REST, 0.0).to(tl.float32)[None, :]
        sum_rest = tl.zeros(rest_mask.shape, tl.float32)
    for h in range(HEADS):
        head = tl.cast(h, tl.int64)
        g_row = g + head * g_head + wide * g_token
        x_row = x + head * x_head + wide * x_token
        y_row = y + head * y_head + wide * y_token
        u = tl.load(g_row + columns, mask, 0.0).to(tl.float32)
        v = tl.load(g_row + columns + HALF, mask, 0.0).to(tl.float32)
        a = tl.load(x_row + columns, mask, 0.0).to(tl.float32)
        b_ = tl.load(x_row + columns + HALF, mask, 0.0).to(tl.float32)
        grad_a = u * cos + v * sin
        grad_b = v * cos - u * sin
        total = tl.sum(a * a + b_ * b_, 1)
        dot = tl.sum(grad_a * weight_a * a + grad_b * weight_b * b_, 1)
        if REST > 0:
            grad_rest = tl.load(g_row + rest_columns, rest_mask, 0.0).to(tl.float32)
            rest = tl.load(x_row + rest_columns, rest_mask, 0.0).to(tl.float32)
            total += tl.sum(rest * rest, 1)
            dot += tl.sum(grad_rest * weight_rest * rest, 1)
        rstd = (1.0 / tl.sqrt_rn(total / DIM + eps))[:, None]
        dot = dot[:, None] * rstd / DIM
        a, b_ = a * rstd, b_ * rstd
        sum_a += grad_a * a
        sum_b += grad_b * b_
        tl.store(y_row + columns, (rstd * (weight_a * grad_a - a * dot)).to(dtype), mask)
        tl.store(y_row + columns + HALF, (rstd * (weight_b * grad_b - b_ * dot)).to(dtype), mask)
        if REST > 0:
            rest = rest * rstd
            sum_rest += grad_rest * rest
            tl.store(y_row + rest_columns, (rstd * (weight_rest * grad_rest - rest * dot)).to(dtype), rest_mask)
    tl.store(partial + i, tl.sum(sum_a, 0), i < HALF)
    tl.store(partial + HALF + i, tl.sum(sum_b, 0), i < HALF)
    if REST > 0:
        tl.store(partial + 2 * HALF + j, tl.sum(sum_rest, 0), j < REST)


@Kernel
@triton.jit
def v2pe_rope_backward_kernel(
    grad_q, grad_k, q, k, q_out, k_out, q_weight, k_weight, partial, first, second, tokens, angle_batch, angle_token,
    scale, eps, gq_batch, gq_head, gq_token, gk_batch, gk_head, gk_token, q_batch, q_head, q_token, k_batch, k_head,
    k_token, qo_batch, qo_head, qo_token, ko_batch, ko_head, ko_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr, REST_BLOCK: tl.constexpr, TOKENS: tl.constexpr, TABLE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = n < tokens
    i = tl.arange(0, BLOCK)
    cos, sin = _angles(
        first, second, angle_batch, angle_token, scale, b, n, i, inside, i < HALF, TABLE, ROUND, False,
        q.dtype.element_ty,
    )  # fmt: skip
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    partial += (b * tl.num_programs(0) + tl.program_id(0)) * 2 * DIM
    _heads_backward(
        grad_q, q, q_out, q_weight, partial, cos, sin, Q_HEADS, gq_batch, gq_head, gq_token, q_batch, q_head, q_token,
        qo_batch, qo_head, qo_token, b, n, inside, eps, DIM, HALF, BLOCK, REST, REST_BLOCK,
    )  # fmt: skip
    _heads_backward(
        grad_k, k, k_out, k_weight, partial + DIM, cos, sin, K_HEADS, gk_batch, gk_head, gk_token, k_batch, k_head,
        k_token, ko_batch, ko_head, ko_token, b, n, inside, eps, DIM, HALF, BLOCK, REST, REST_BLOCK,
    )  # fmt: skip


def config(batch: int, tokens: int, half: int) -> dict[str, int]:
    """Tokens a program and warps. A warp's lanes cover a row's half with 16 bytes each, and whole rows."""
    warps = 1 if batch * tokens <= 4096 else 4
    return dict(TOKENS=max(1, 8 * lanes() // next_power_of_2(half)) * warps, num_warps=warps, num_stages=1)


FEW = 64  # tokens of a batch row


def few_config(batch: int, tokens: int, half: int, q_heads: int, kv_heads: int, rest: int) -> dict[str, int] | None:
    """A program a token, an angle a thread: as many heads at a time as leave registers, so that loads overlap.

    None: there are too many tokens for that. Wide heads are worth it for more, since it fills a GPU sooner; where two
    programs share a token, both compute its angles.
    """
    block = next_power_of_2(half)
    if tokens > (FEW if block < 64 or rest else 2048):
        return None
    # One warp where a few columns are left: in place, two would read them while the other writes.
    warps = 1 if rest else max(1, min(4, block // lanes()))
    groups = 2 if tokens > FEW and 1 <= batch * tokens // 132 < 2 else 1
    least = max(1, 8 * lanes() * warps // block)  # 16 bytes a lane
    heads = (max(least, min(2048 // block, next_power_of_2(cdiv(h, groups)))) for h in (q_heads, kv_heads))
    q_block, k_block = heads
    return dict(TOKENS=1, Q_BLOCK=q_block, K_BLOCK=k_block, GROUPS=groups, num_warps=warps, num_stages=1)


def constants(a: Rope) -> dict[str, int]:
    half, rest = a.rotary_dim // 2, a.q.shape[3] - a.rotary_dim
    return dict(
        Q_HEADS=a.q.shape[a.heads_dim], K_HEADS=a.k.shape[a.heads_dim], DIM=a.q.shape[3], HALF=half,
        BLOCK=next_power_of_2(half), REST=rest, REST_BLOCK=next_power_of_2(max(rest, 1)), TABLE=a.table,
        ROUND=a.round and a.q.element_size() == 2,
    )  # fmt: skip


def _angles_of(a: Rope) -> tuple[Any, ...]:
    """From `first` to `eps` of the kernels' parameters."""
    batch_stride = 0 if a.first.shape[0] == 1 else a.first.stride(0)
    scale = None if a.scale == 1 else a.scale
    return a.first, a.second, a.q.shape[3 - a.heads_dim], batch_stride, a.first.stride(1), scale, a.eps


def _strides(heads_dim: int, *tensors: Tensor) -> list[int]:
    return [t.stride(d) for t in tensors for d in (0, heads_dim, 3 - heads_dim)]


def _packed(q: Tensor) -> bool:
    return q.element_size() == 2 and not _gpu.interpreting() and torch.version.hip is None


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(a: Rope, out: Rotated) -> None:
    """Into `out`, by way of tensors whose heads' elements are adjacent."""
    into = Rotated(_rows(out.q), _rows(out.k))
    q, k = into if out.q is a.q else (_rows(a.q), _rows(a.k))
    batch, tokens = q.shape[0], q.shape[3 - a.heads_dim]
    if q.numel() + k.numel() == 0:
        return
    fixed = constants(a)
    options = few_config(batch, tokens, fixed["HALF"], fixed["Q_HEADS"], fixed["K_HEADS"], fixed["REST"])
    if options is None:
        options = config(batch, tokens, fixed["HALF"]) | dict(Q_BLOCK=0, K_BLOCK=0, GROUPS=1)
    v2pe_rope_kernel[(cdiv(tokens, options["TOKENS"]), batch, options["GROUPS"])](
        q, k, *into, a.q_weight, a.k_weight, *_angles_of(a), *_strides(a.heads_dim, q, k, *into), **fixed,
        NORM=a.q_weight is not None, INVERSE=a.inverse, PACKED=_packed(q), **options, enable_fp_fusion=False,
    )  # fmt: skip
    for result, written in zip(out, into):
        if result is not written:
            result.copy_(written)


def v2pe_rope(a: Rope) -> Rotated:
    out = empty_rotated(a)
    _launch(a, out)
    return out


def v2pe_rope_(a: Rope) -> None:
    _launch(a, Rotated(a.q, a.k))


def v2pe_rope_norm_backward(b: NormBackward) -> Gradients:
    a = b.forward
    grad_q, grad_k, q, k = _rows(b.grad_q), _rows(b.grad_k), _rows(a.q), _rows(a.k)
    out = torch.empty_like(q), torch.empty_like(k)
    batch, tokens, width = q.shape[0], q.shape[3 - a.heads_dim], q.shape[3]
    options = config(batch, tokens, a.rotary_dim // 2)
    blocks = cdiv(tokens, options["TOKENS"])
    partial = q.new_empty(batch * blocks, 2, width, dtype=torch.float32)
    if q.numel() + k.numel():
        v2pe_rope_backward_kernel[(blocks, batch)](
            grad_q, grad_k, q, k, *out, a.q_weight, a.k_weight, partial, *_angles_of(a),
            *_strides(a.heads_dim, grad_q, grad_k, q, k, *out), **constants(a), **options, enable_fp_fusion=False,
        )  # fmt: skip
    return Gradients(*out, partial[:, 0].sum(0), partial[:, 1].sum(0))  # in a fixed order: deterministic
