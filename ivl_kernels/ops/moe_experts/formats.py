"""Experts stored in few bits: what their bytes mean, in plain torch.

* MXFP4: 32 neighbouring values of a row share a scale. A value is E2M1 (sign, two bits of exponent, one of mantissa:
  0, 0.5, 1, 1.5, 2, 3, 4, 6), two a byte, the first in the low half. A scale is E8M0: byte b is 2^(b - 127), 0 is
  2^-127, and 255, which the specification calls NaN, is infinity, as in transformers.
* FP8: 128 x 128 values share a scale. A value is E4M3 without infinities (`torch.float8_e4m3fn`), a scale a float32.

Matrices are rows of output by columns of input, whatever the layout that a model gives its expanded weights.
Sources: OCP Microscaling Formats (MX) 1.0; transformers `convert_moe_packed_tensors`, `FP8Experts`.
"""

from __future__ import annotations

import torch

from ..._checks import check_dtype, check_same, check_shape, describe

__all__ = ["FORMATS", "check", "columns", "dequantise", "quantise"]

FORMATS = ("mxfp4", "fp8")
MXFP4_BLOCK, FP8_BLOCK = 32, 128
MXFP4_DTYPE, FP8_DTYPE = torch.uint8, torch.float8_e4m3fn
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def format_of(values: torch.Tensor) -> str:
    """ "mxfp4", "fp8", or "" for weights that are not quantised."""
    return {MXFP4_DTYPE: "mxfp4", FP8_DTYPE: "fp8"}.get(values.dtype, "")


def columns(values: torch.Tensor) -> int:
    """Length of a row."""
    return values.shape[-2] * MXFP4_BLOCK if values.dtype == MXFP4_DTYPE else values.shape[-1]


def check(
    name: str, values: torch.Tensor, scales: torch.Tensor | None, shape: tuple[int | str, int | str, int]
) -> None:
    """Raise unless these are quantised matrices [experts, rows, columns], contiguous, with their scales.

    shape: a name for a size that is free; the number of columns is known.
    """
    experts, rows, width = shape
    if width % MXFP4_BLOCK:
        raise ValueError(
            f"{name}: got {describe(values)}, but {format_of(values)} experts need widths that are multiples of 32, "
            f"not {width}"
        )
    if scales is None:
        raise ValueError(f"{name}_scales: got None, expected the scales of {describe(values)}")
    if values.dtype == MXFP4_DTYPE:
        check_shape(name, values, (experts, rows, width // MXFP4_BLOCK, MXFP4_BLOCK // 2))
        check_shape(f"{name}_scales", scales, values.shape[:-1])
        check_dtype(f"{name}_scales", scales, (torch.uint8,))
    else:
        check_shape(name, values, (experts, rows, width))
        blocks = [-(-size // FP8_BLOCK) for size in values.shape[1:]]
        check_shape(f"{name}_scales", scales, (values.shape[0], *blocks))
        check_dtype(f"{name}_scales", scales, (torch.float32,))
    check_same(f"{name}_scales", scales, name, values, dtype=False)


def dequantise(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights that quantised ones stand for.

    Args:
        values: [..., rows, blocks, 16] uint8 (MXFP4) or [..., rows, columns] float8_e4m3fn (FP8).
        scales: [..., rows, blocks] uint8, or [..., ceil(rows / 128), ceil(columns / 128)] float32.
        dtype: of the result. MXFP4 is exact in bfloat16, as far as its exponents reach; FP8 is rounded once.

    Returns:
        [..., rows, columns].
    """
    if values.dtype == MXFP4_DTYPE:
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=values.device)
        pairs = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2)
        # The product with a power of two in float32 is exact; float64 keeps it where float32 would overflow.
        wide = table.to(torch.promote_types(dtype, torch.float32))[pairs.int()]
        return torch.ldexp(wide, scales.int().unsqueeze(-1) - 127).to(dtype).flatten(-2)
    wide = values.to(torch.promote_types(dtype, torch.float32))
    return (wide * _spread(scales, wide)).to(dtype)


def _spread(scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """FP8's scales, one for each of the elements [..., rows, columns]."""
    for dim in (-2, -1):
        scales = scales.repeat_interleave(FP8_BLOCK, dim=dim, output_size=scales.shape[dim] * FP8_BLOCK)
    return scales[..., : like.shape[-2], : like.shape[-1]]


def quantise(weight: torch.Tensor, to: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of `weight` [..., rows, columns], as `dequantise` takes them.

    "mxfp4": of a block's largest value 2^e m, 1 <= m < 2, both scales that fit are tried, the one that would clip the
    largest and the one that would not, and what is nearer in the sum of squares is kept. "fp8": the largest value of a
    block becomes 448. Roundings are to the nearest, ties to even. What was quantised before comes back bit for bit in
    what it stands for.

    Raises:
        ValueError: columns that are no multiple of 32, values that are not finite or (mxfp4) too large.
    """
    if to not in FORMATS:
        raise ValueError(f"to: got {to!r}, expected one of {', '.join(FORMATS)}")
    if weight.dim() < 2 or weight.shape[-1] % MXFP4_BLOCK:
        raise ValueError(f"weight: got {describe(weight)}, expected [..., rows, columns] with columns a multiple of 32")
    wide = weight.detach().float()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError(f"weight: got {describe(weight)} with values that are not finite")
    return _to_mxfp4(wide) if to == "mxfp4" else _to_fp8(wide)


def _to_mxfp4(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = wide.unflatten(-1, (-1, MXFP4_BLOCK))
    largest = blocks.abs().amax(-1)
    if bool((largest >= 2.0**125).any()):
        raise ValueError(f"weight: got values up to {float(largest.amax())}, expected less than 2^125 for mxfp4")
    # 2^(exponent - 1) <= largest < 2^exponent: times 2^(3 - exponent) it is in [4, 8), and in [2, 4) after one more.
    exponent = torch.frexp(largest).exponent
    best = None
    for shift in (3, 2):
        scale = (exponent - shift).clamp(-127, 125).int()
        codes = _nearest(torch.ldexp(blocks, -scale.unsqueeze(-1)))
        error = (_decode(codes) - torch.ldexp(blocks, -scale.unsqueeze(-1))).square().sum(-1)
        error = torch.ldexp(error.double(), 2 * scale.int())
        if best is None:
            best = codes, scale, error
        else:
            better = error < best[2]
            best = torch.where(better.unsqueeze(-1), codes, best[0]), torch.where(better, scale, best[1]), error
    codes, scale, _ = best  # type: ignore[misc]
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4, (scale + 127).to(torch.uint8)


def _nearest(scaled: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest E2M1 values, ties to the even code, what is beyond 6 becomes 6."""
    size = scaled.abs()
    # Steps are 0.5 below 2, 1 below 4, 2 beyond; `round` takes ties to even, which are the even codes.
    code = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return code.clamp(max=7).to(torch.uint8) | (torch.signbit(scaled).to(torch.uint8) << 3)


def _decode(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)[codes.int()]


def _to_fp8(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = wide.shape[-2:]
    padded = torch.nn.functional.pad(wide, (0, -width % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    largest = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK)).abs().amax((-3, -1))
    scales = torch.where(largest > 0, largest / torch.finfo(FP8_DTYPE).max, 1.0)
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    limit = torch.finfo(FP8_DTYPE).max
    return (wide / _spread(scales, wide)).clamp(-limit, limit).to(FP8_DTYPE), scales
