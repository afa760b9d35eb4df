"""Rounding of float32 operands of one tf32 product, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded_to_tf32(x):
    """To nearest: tensor cores cut the operands of `tl.dot` off instead, at 4 times the root mean square error."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
