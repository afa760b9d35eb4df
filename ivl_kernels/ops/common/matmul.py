"""Products of tiles in Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..._gpu import float32_precision, interpreting


@triton.jit
def _rounded_to_tf32(x):
    """To nearest: tensor cores cut the operands of `tl.dot` off instead, at 4 times the root mean square error."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def operands(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """The operands of a `tl.dot` as `flags` has them multiplied."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if PRECISION == "tf32":
        a, b = _rounded_to_tf32(a), _rounded_to_tf32(b)
    return a, b


def flags(itemsize: int, target: int) -> dict[str, Any]:
    """How tiles are multiplied: float32 as three tf32 products on NVIDIA, or one where torch may do so."""
    upcast = interpreting()
    precision = float32_precision() if itemsize == 4 and target and not upcast else "ieee"
    return dict(PRECISION=precision, UPCAST=upcast, enable_fp_fusion=True)
