"""Activations in Triton, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327


@triton.jit
def gated(gate, up, GPT_OSS: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """SiLU(gate) * up, or GPT-OSS's: see csrc/include/ivl/gating.h."""
    if GPT_OSS:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1.0) * gate * tl.sigmoid(ALPHA * gate)
    else:
        return gate * tl.sigmoid(gate) * up


@triton.jit
def gated_backward(gate, up, grad, GPT_OSS: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The activation, and the gradients of gate and up."""
    if GPT_OSS:
        g = tl.minimum(gate, LIMIT)
        u = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        s = tl.sigmoid(ALPHA * g)
        grad_gate = tl.where(gate <= LIMIT, grad * u * s * (1.0 + ALPHA * g * (1.0 - s)), 0.0)
        grad_up = tl.where((up >= -LIMIT) & (up <= LIMIT), grad * g * s, 0.0)
        return u * g * s, grad_gate, grad_up
    else:
        s = tl.sigmoid(gate)
        return gate * s * up, grad * up * s * (1.0 + gate * (1.0 - s)), grad * gate * s
