"""Records, fakes, backends, gradients and argument checks of positions and rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import FLOAT_NAMES, FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape, check_tensor, describe
from ..._dispatch import Implementation
from ..._library import Op, differentiable, needs_grad
from ..._plan import planned

MAX_HEAD_DIM = 1024


class Rope(NamedTuple):
    q: Tensor
    k: Tensor
    first: Tensor  # cos when `table`, else positions
    second: Tensor  # sin, or inverse frequencies
    table: bool
    q_weight: Tensor | None
    k_weight: Tensor | None
    scale: float
    eps: float
    rotary_dim: int
    heads_dim: int
    round: bool
    inverse: bool = False  # rotate back


class Rotated(NamedTuple):
    q: Tensor
    k: Tensor


class NormBackward(NamedTuple):
    grad_q: Tensor
    grad_k: Tensor
    forward: Rope


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    q_weight: Tensor  # in the arithmetic type, as the next
    k_weight: Tensor


class Positions(NamedTuple):
    input_ids: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    token_id: int
    deltas: Tensor
    per_row: bool
    compress: Tensor | None
    tile_tokens: int
    compressed_tokens: int
    compressed_units: int


class Located(NamedTuple):
    """Positions [B, N], and [5]: images, visual tokens, tiles used (-1: they do not fit the runs), the first image
    whose steps float32 cannot hold (-1: none), the position where it ends."""

    positions: Tensor
    info: Tensor


def empty_rotated(a: Rope) -> Rotated:
    """The results of the rotation, to be written: with the strides of q and k."""
    return Rotated(torch.empty_like(a.q), torch.empty_like(a.k))


def empty_gradients(b: NormBackward) -> Gradients:
    """The results of the norm's backward, to be written."""
    q, k = b.forward.q, b.forward.k
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = [q.new_empty(q.shape[3], dtype=wide) for _ in range(2)]
    return Gradients(torch.empty_like(q), torch.empty_like(k), weights[0], weights[1])


def empty_located(a: Positions) -> Located:
    positions, info = ((a.input_ids.shape, torch.float32), ((5,), torch.float64))
    return Located(*(a.input_ids.new_empty(shape, dtype=dtype) for shape, dtype in (positions, info)))


_BACKENDS = (
    Implementation("cpu", FLOAT_NAMES),
    Implementation("triton", KERNEL_DTYPES),
    Implementation("reference"),
)

_rope = Op("v2pe_rope", Rope, Rotated, key="q", implementations=_BACKENDS, fake=empty_rotated)

_rope_ = Op("v2pe_rope_", Rope, NoneType, key="q", implementations=_BACKENDS, fake=lambda a: None, written=("q", "k"))

_norm_backward = Op(
    "v2pe_rope_norm_backward", NormBackward, Gradients, key="q", implementations=_BACKENDS, fake=empty_gradients
)


def _scan(a: Positions) -> Located:
    from . import triton_positions

    return triton_positions.v2pe_position_ids(a)


_position_ids = Op(
    "v2pe_position_ids",
    Positions,
    Located,
    key="input_ids",
    implementations=(Implementation("cpu"), Implementation("triton", function=_scan), Implementation("reference")),
    fake=empty_located,
)


def _save(a: Rope, _: Rotated) -> Any:
    """The arguments; q and k only where a norm's backward needs them."""
    return (a if a.q_weight is not None else (None, None, *a[2:]),)


def _gradients(saved: tuple[Any], needs: Any, backend: str, grad_q: Tensor, grad_k: Tensor) -> dict[str, Tensor]:
    a = Rope(*saved[0])
    if a.q_weight is None:
        return _rope(a._replace(q=grad_q, k=grad_k, inverse=True), backend)._asdict()
    return _norm_backward(NormBackward(grad_q, grad_k, a), backend)._asdict()


_differentiable = differentiable(_rope, _save, _gradients, zeros=True)


def _check_side(name: str, x: Tensor, q: Tensor, heads_dim: int) -> None:
    check_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(
            f"{name}: got {describe(x)}, expected [B, heads, N, d] (heads_dim=1) or [B, N, heads, d] (heads_dim=2)"
        )
    if x is q:
        if x.dtype not in FLOATS:
            check_dtype(name, x, FLOATS)
        if x.shape[3] % 2 or not 0 < x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: got head_dim {x.shape[3]}, expected an even number up to {MAX_HEAD_DIM}")
        return
    if x.dtype != q.dtype or x.device != q.device:
        check_same(name, x, "q", q)
    if x.shape[0] != q.shape[0] or x.shape[3 - heads_dim] != q.shape[3 - heads_dim] or x.shape[3] != q.shape[3]:
        raise ValueError(f"{name}: got {describe(x)}, expected the batch, tokens and head_dim of q ({describe(q)})")


def _check_row(name: str, x: Tensor, q: Tensor, batch: int, tokens: int, dtypes: Sequence[Any]) -> None:
    check_tensor(name, x)
    if x.device != q.device:
        check_same(name, x, "q", q, dtype=False)
    if x.dtype not in dtypes:
        check_dtype(name, x, dtypes)
    if x.shape[0] not in (1, batch) or x.shape[1] != tokens:
        raise ValueError(f"{name}: got {describe(x)}, expected [{batch} or 1, {tokens}, ...] as q")
    if x.requires_grad:
        raise ValueError(f"{name}: it requires gradients, but they flow only to q, k and the weights; pass .detach()")


def _angles(
    q: Tensor,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotary_dim: int | None,
    heads_dim: int,
) -> tuple[Tensor, Tensor, bool, int]:
    """(positions, inverse frequencies, False, rotary_dim) or (cos, sin, True, rotary_dim), checked."""
    batch, tokens, width = q.shape[0], q.shape[3 - heads_dim], q.shape[3]
    if cos is not None and sin is not None and positions is None and inv_freq is None:
        if rotary_dim is None:
            rotary_dim = width
        if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[2] not in (rotary_dim, rotary_dim // 2):
            raise ValueError(
                f"cos, sin: got {describe(cos)} and {describe(sin)}, expected two of [B or 1, N, {rotary_dim} or "
                f"{rotary_dim // 2}] (rotary_dim={rotary_dim})"
            )
        allowed = (torch.float32, q.dtype)
        _check_row("cos", cos, q, batch, tokens, allowed)
        _check_row("sin", sin, q, batch, tokens, (cos.dtype,))
        if cos.stride() != sin.stride() or cos.stride(2) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        first, second, table = cos, sin, True
    elif positions is not None and inv_freq is not None and cos is None and sin is None:
        check_shape("inv_freq", inv_freq, ("rotary_dim / 2",))
        check_dtype("inv_freq", inv_freq, (torch.float32,))
        check_same("inv_freq", inv_freq, "q", q, dtype=False)
        if rotary_dim not in (None, 2 * inv_freq.shape[0]):
            raise ValueError(f"rotary_dim: got {rotary_dim}, expected 2 * {inv_freq.shape[0]} (the length of inv_freq)")
        rotary_dim = 2 * inv_freq.shape[0]
        check_tensor("positions", positions)
        if positions.dim() == 1:
            positions = positions.unsqueeze(0)
        check_shape("positions", positions, ("B or 1", "N"))
        integers = (torch.int32, torch.int64)
        _check_row("positions", positions, q, batch, tokens, (torch.float32, *integers))
        first, second, table = positions.float(), inv_freq.contiguous(), False
    else:
        names = {"positions": positions, "inv_freq": inv_freq, "cos": cos, "sin": sin}
        given = ", ".join(name for name, value in names.items() if value is not None) or "none of them"
        raise ValueError(f"{', '.join(names)}: got {given}, expected positions and inv_freq, or cos and sin")
    if not 0 < rotary_dim <= width or rotary_dim % 2:
        raise ValueError(f"rotary_dim: got {rotary_dim}, expected an even number up to head_dim {width}")
    return first, second, table, rotary_dim


def _rope_arguments(
    q: Tensor,
    k: Tensor,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    scale: float,
    rotary_dim: int | None,
    heads_dim: int,
    rounding: str,
) -> Rope:
    """The record, checked."""
    if heads_dim not in (1, 2):
        raise ValueError(f"heads_dim: got {heads_dim}, expected 1 ([B, heads, N, d]) or 2 ([B, N, heads, d])")
    if rounding not in ("transformers", "float32"):
        raise ValueError(f"rounding: got {rounding!r}, expected 'transformers' or 'float32'")
    _check_side("q", q, q, heads_dim)
    _check_side("k", k, q, heads_dim)
    first, second, table, rotary_dim = _angles(q, positions, inv_freq, cos, sin, rotary_dim, heads_dim)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight, k_weight: got one of them, expected both or none")
    if q_weight is not None and k_weight is not None:
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            check_shape(name, weight, (q.shape[3],))
            check_same(name, weight, "q", q)
        q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    round = rounding == "transformers"
    return Rope(q, k, first, second, table, q_weight, k_weight, scale, eps, rotary_dim, heads_dim, round)


@planned
def rope(*arguments: Any) -> Rotated:
    """As `v2pe_rope`, whose arguments these are in order."""
    *tensors, backend = arguments
    return _differentiable(_rope_arguments(*tensors), backend)


@planned
def rope_(*arguments: Any) -> Rotated:
    """As `v2pe_rope_`, whose arguments these are in order."""
    *tensors, backend = arguments
    a = _rope_arguments(*tensors)
    if needs_grad((a.q, a.k, a.q_weight, a.k_weight)):
        raise RuntimeError("v2pe_rope_: q, k or a weight requires gradients; use v2pe_rope, or torch.no_grad()")
    for name, x in (("q", a.q), ("k", a.k)):
        if 0 in x.stride() and any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape)):
            raise ValueError(f"{name}: got an expanded tensor (strides {x.stride()}), it cannot be written in place")
    _rope_(a, backend)
    return Rotated(a.q, a.k)


DELTAS = tuple(Fraction(1, 2**j) for j in range(9))


def parse_delta(value: float | str) -> float:
    """A step in (0, 1] from a number or a fraction such as "1/16"."""
    try:
        number = float(Fraction(value)) if isinstance(value, str) else float(value)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        expected = "a number in (0, 1], a fraction such as '1/16' or 'random'"
        raise ValueError(f"delta: got {value!r}, expected {expected}") from error
    if not 0 < number <= 1:
        raise ValueError(f"delta: got {value!r}, expected a number in (0, 1]")
    return number


def _deltas(
    delta: float | str | Tensor | Sequence[float | str], images: int | None, generator: torch.Generator | None
) -> tuple[Tensor, bool]:
    """float64 steps on the CPU, and whether there is one a row."""
    if images is not None:
        device = generator.device if generator else None
        drawn = torch.randint(len(DELTAS), (images,), generator=generator, device=device)
        return torch.tensor([float(d) for d in DELTAS], dtype=torch.float64, device="cpu")[drawn.cpu()], False
    if isinstance(delta, Tensor):
        per_row = delta.dim() == 2 and delta.shape[1] == 1
        if delta.dim() > 1 and not per_row:
            raise ValueError(f"delta: got {describe(delta)}, expected a scalar, [images] or [B, 1]")
        values = delta.detach().to("cpu", torch.float64).reshape(-1)
        if len(values) and not bool(((values > 0) & (values <= 1)).all()):
            raise ValueError(f"delta: got values from {values.min()} to {values.max()}, expected numbers in (0, 1]")
        return values, per_row
    if isinstance(delta, Sequence) and not isinstance(delta, str):
        return torch.tensor([parse_delta(d) for d in delta], dtype=torch.float64, device="cpu"), False
    return torch.tensor([parse_delta(delta)], dtype=torch.float64, device="cpu"), False


def _one_for_all(delta: float | str | Tensor | Sequence[float | str], deltas: Tensor) -> bool:
    """Whether the only step of `deltas` is meant for all images."""
    return len(deltas) == 1 and not (isinstance(delta, Tensor) and delta.dim() == 1)


def image_steps(delta: float | str | Tensor | Sequence[float | str], row_of_image: Tensor, rows: int) -> Tensor:
    """[images] float64 on the CPU, the step of each image of a batch of that many rows; see `v2pe_position_ids`."""
    images = len(row_of_image)
    deltas, per_row = _deltas(delta, images if isinstance(delta, str) and delta == "random" else None, None)
    if per_row:
        if rows % len(deltas):
            raise ValueError(f"delta: got {len(deltas)} rows, expected {rows} as input_ids")
        return deltas.repeat_interleave(rows // len(deltas))[row_of_image]
    if _one_for_all(delta, deltas):
        return deltas.expand(images)
    if len(deltas) != images:
        raise ValueError(f"delta: got {len(deltas)} values, expected one for each of the {images} images")
    return deltas


class _Steps(NamedTuple):
    """Located tokens, and what the host knows of the steps."""

    located: Located
    per_row: bool
    scalar: bool
    given: int


@planned
def _locate(
    input_ids: Tensor,
    token_id: int,
    delta: float | str | Tensor | Sequence[float | str],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    compress: Tensor | None,
    tile_tokens: int,
    compressed_tokens: int,
    compressed_step: str,
    generator: torch.Generator | None,
    backend: str,
) -> _Steps:
    check_shape("input_ids", input_ids, ("B", "N"))
    check_dtype("input_ids", input_ids, (torch.int64,))
    mask = None
    if attention_mask is not None:
        check_shape("attention_mask", attention_mask, input_ids.shape)
        check_same("attention_mask", attention_mask, "input_ids", input_ids, dtype=False)
        mask = attention_mask.to(torch.bool)
    if cu_seqlens is not None:
        check_shape("cu_seqlens", cu_seqlens, ("segments + 1",))
        check_same("cu_seqlens", cu_seqlens, "input_ids", input_ids, dtype=False)
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    if compressed_step not in ("span", "same"):
        raise ValueError(f"compressed_step: got {compressed_step!r}, expected 'span' or 'same'")
    if compressed_tokens < 1 or tile_tokens % compressed_tokens:
        raise ValueError(f"compressed_tokens: got {compressed_tokens}, expected a divisor of tile_tokens {tile_tokens}")
    if compress is not None:
        check_shape("compress", compress, ("T",))
        check_dtype("compress", compress, (torch.bool,))
        check_same("compress", compress, "input_ids", input_ids, dtype=False)
        compress = compress.contiguous()
    images = None
    if isinstance(delta, str) and delta == "random":
        images = count_images(input_ids, token_id, mask, cu_seqlens)
    if images is None and isinstance(delta, (str, int, float)):  # nothing is copied to the device
        steps = torch.full((1,), parse_delta(delta), dtype=torch.float64, device=input_ids.device)
        deltas, per_row, scalar = steps, False, True
    else:
        deltas, per_row = _deltas(delta, images, generator)
        steps = (deltas if len(deltas) else deltas.new_ones(1)).to(input_ids.device, non_blocking=True)
        scalar = not per_row and _one_for_all(delta, deltas)
    if per_row and len(deltas) != input_ids.shape[0]:
        raise ValueError(f"delta: got {len(deltas)} rows, expected {input_ids.shape[0]} as input_ids")
    units = tile_tokens // compressed_tokens if compressed_step == "span" else 1
    tokens = (tile_tokens, compressed_tokens, units)
    a = Positions(input_ids, mask, cu_seqlens, token_id, steps, per_row, compress, *tokens)
    return _Steps(_position_ids(a, backend), per_row, scalar, len(deltas))


def position_ids(
    input_ids: Tensor,
    token_id: int,
    delta: float | str | Tensor | Sequence[float | str],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    compress: Tensor | None,
    tile_tokens: int,
    compressed_tokens: int,
    compressed_step: str,
    generator: torch.Generator | None,
    check: bool,
    backend: str,
) -> Tensor:
    (positions, info), per_row, scalar, given = _locate(
        input_ids, token_id, delta, attention_mask, cu_seqlens, compress, tile_tokens, compressed_tokens,
        compressed_step, generator, backend,
    )  # fmt: skip
    if not check or torch.compiler.is_compiling():
        return positions
    found, visual, tiles, bad, end = info.tolist()
    if not per_row and not scalar and found != given:
        raise ValueError(f"delta: got {given} values, expected one for each of the {int(found)} images")
    if compress is not None and tiles != len(compress):
        raise ValueError(
            f"compress: got {len(compress)} tiles that do not fit the {int(visual)} placeholder tokens of the "
            f"{int(found)} images ({tile_tokens} tokens a tile, {compressed_tokens} when compressed)"
        )
    if bad >= 0:
        raise ValueError(
            f"delta: image {int(bad)} ends at position {end:g}, where float32 cannot hold its steps exactly; use a "
            "larger delta or a shorter input"
        )
    return positions


def count_images(input_ids: Tensor, token_id: int, mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Runs of the placeholder."""
    visual = input_ids == token_id
    if mask is not None:
        visual = visual & mask
    before = torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    if cu_seqlens is not None:
        before = before.reshape(-1).clone()
        before[cu_seqlens[cu_seqlens < before.numel()]] = False
        before = before.view_as(visual)
    return int((visual & ~before).sum())
