"""Schemas, fakes, backends, gradients and argument checks of positions and rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..._checks import FLOAT_NAMES, FLOATS, KERNEL_DTYPES, check_dtype, check_same, check_shape, check_tensor, describe
from ..._positional import Implementation, Op

Pair = tuple[torch.Tensor, torch.Tensor]
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

MAX_HEAD_DIM = 1024

_ANGLES = (
    "Tensor first, Tensor second, bool table, Tensor{0} q_weight, Tensor{0} k_weight, float scale, float eps, "
    "int rotary_dim, int heads_dim, bool round"
)


def _implementations(function: str) -> tuple[Implementation, ...]:
    return (
        Implementation("native", f"native:{function}", ("cpu",), FLOAT_NAMES),
        Implementation("triton", f"triton:{function}", ("cuda", "hip"), KERNEL_DTYPES),
        Implementation("reference", f"reference:{function}"),
    )


_rope = Op(
    f"v2pe_rope(Tensor q, Tensor k, {_ANGLES.format('?')}, bool inverse, str backend) -> (Tensor, Tensor)",
    package=__package__,
    key="q",
    implementations=_implementations("rope"),
    fake=lambda q, k, *rest: (torch.empty_like(q), torch.empty_like(k)),
)

_rope_ = Op(
    f"v2pe_rope_(Tensor(a!) q, Tensor(b!) k, {_ANGLES.format('?')}, str backend) -> ()",
    package=__package__,
    key="q",
    implementations=_implementations("rope_"),
    fake=lambda *args: None,
)


def _fake_norm_backward(grad_q: torch.Tensor, grad_k: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *_: Any) -> Four:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = [q.new_empty(q.shape[3], dtype=wide) for _ in range(2)]
    return torch.empty_like(q), torch.empty_like(k), weights[0], weights[1]


_norm_backward = Op(
    f"v2pe_rope_norm_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, {_ANGLES.format('')}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    package=__package__,
    key="q",
    implementations=_implementations("norm_backward"),
    fake=_fake_norm_backward,
)

_position_ids = Op(
    "v2pe_position_ids(Tensor input_ids, Tensor? mask, Tensor? cu_seqlens, int token_id, Tensor deltas, bool per_row, "
    "Tensor? compress, int tile_tokens, int compressed_tokens, int compressed_units, str backend) -> (Tensor, Tensor)",
    package=__package__,
    key="input_ids",
    reads_host=True,
    implementations=(
        Implementation("native", "native:position_ids", ("cpu",)),
        Implementation("reference", "reference:position_ids"),
    ),
    fake=lambda input_ids, *rest: (
        input_ids.new_empty(input_ids.shape, dtype=torch.float32),
        torch.empty(5, dtype=torch.float64),
    ),
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        options: tuple[Any, ...],
    ) -> Pair:
        table, scale, eps, rotary_dim, heads_dim, round, backend = options
        ctx.options = options
        if q_weight is None:
            ctx.save_for_backward(first, second)
        else:
            ctx.save_for_backward(first, second, q, k, q_weight, k_weight)
        return _rope(
            q, k, first, second, table, q_weight, k_weight, scale, eps, rotary_dim, heads_dim, round, False, backend
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_q, grad_k = grads
        first, second, *saved = ctx.saved_tensors
        table, scale, eps, rotary_dim, heads_dim, round, backend = ctx.options
        if not saved:
            rest = (scale, eps, rotary_dim, heads_dim, round, True, backend)
            dq, dk = _rope(grad_q, grad_k, first, second, table, None, None, *rest)
            return dq, dk, None, None, None, None, None
        q, k, q_weight, k_weight = saved
        dq, dk, dq_weight, dk_weight = _norm_backward(
            grad_q, grad_k, q, k, first, second, table, q_weight, k_weight, scale, eps, rotary_dim, heads_dim, round,
            backend,
        )  # fmt: skip
        return dq, dk, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), None, None, None


def _check_side(name: str, x: torch.Tensor, q: torch.Tensor, heads_dim: int) -> None:
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


def _check_row(name: str, x: torch.Tensor, q: torch.Tensor, batch: int, tokens: int, dtypes: Sequence[Any]) -> None:
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
    q: torch.Tensor,
    positions: torch.Tensor | None,
    inv_freq: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary_dim: int | None,
    heads_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, bool, int]:
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


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor | None,
    inv_freq: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    scale: float,
    rotary_dim: int | None,
    heads_dim: int,
    rounding: str,
    inplace: bool,
    backend: str,
) -> Pair:
    if heads_dim not in (1, 2):
        raise ValueError(f"heads_dim: got {heads_dim}, expected 1 ([B, heads, N, d]) or 2 ([B, N, heads, d])")
    if rounding not in ("transformers", "float32"):
        raise ValueError(f"rounding: got {rounding!r}, expected 'transformers' or 'float32'")
    _check_side("q", q, q, heads_dim)
    _check_side("k", k, q, heads_dim)
    first, second, table, rotary_dim = _angles(q, positions, inv_freq, cos, sin, rotary_dim, heads_dim)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight, k_weight: got one of them, expected both or none")
    needs_grad = q.requires_grad or k.requires_grad
    if q_weight is not None and k_weight is not None:
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            check_shape(name, weight, (q.shape[3],))
            check_same(name, weight, "q", q)
        q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
        needs_grad = needs_grad or q_weight.requires_grad or k_weight.requires_grad
    needs_grad = needs_grad and torch.is_grad_enabled()
    round = rounding == "transformers"
    if inplace:
        if needs_grad:
            raise RuntimeError("v2pe_rope_: q, k or a weight requires gradients; use v2pe_rope, or torch.no_grad()")
        for name, x in (("q", q), ("k", k)):
            if 0 in x.stride() and any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape)):
                raise ValueError(
                    f"{name}: got an expanded tensor (strides {x.stride()}), it cannot be written in place"
                )
        _rope_(q, k, first, second, table, q_weight, k_weight, scale, eps, rotary_dim, heads_dim, round, backend)
        return q, k
    if needs_grad:
        options = (table, scale, eps, rotary_dim, heads_dim, round, backend)
        return _Rope.apply(q, k, q_weight, k_weight, first, second, options)
    return _rope(
        q, k, first, second, table, q_weight, k_weight, scale, eps, rotary_dim, heads_dim, round, False, backend
    )


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
    delta: float | str | torch.Tensor | Sequence[float | str], images: int | None, generator: torch.Generator | None
) -> tuple[torch.Tensor, bool]:
    """float64 steps on the CPU, and whether there is one a row."""
    if images is not None:
        device = generator.device if generator else None
        drawn = torch.randint(len(DELTAS), (images,), generator=generator, device=device)
        return torch.tensor([float(d) for d in DELTAS], dtype=torch.float64)[drawn.cpu()], False
    if isinstance(delta, torch.Tensor):
        per_row = delta.dim() == 2 and delta.shape[1] == 1
        if delta.dim() > 1 and not per_row:
            raise ValueError(f"delta: got {describe(delta)}, expected a scalar, [images] or [B, 1]")
        values = delta.detach().to("cpu", torch.float64).reshape(-1)
        if len(values) and not bool(((values > 0) & (values <= 1)).all()):
            raise ValueError(f"delta: got values from {values.min()} to {values.max()}, expected numbers in (0, 1]")
        return values, per_row
    if isinstance(delta, Sequence) and not isinstance(delta, str):
        return torch.tensor([parse_delta(d) for d in delta], dtype=torch.float64), False
    return torch.tensor([parse_delta(delta)], dtype=torch.float64), False


def _one_for_all(delta: float | str | torch.Tensor | Sequence[float | str], deltas: torch.Tensor) -> bool:
    """Whether the only step of `deltas` is meant for all images."""
    return len(deltas) == 1 and not (isinstance(delta, torch.Tensor) and delta.dim() == 1)


def image_steps(
    delta: float | str | torch.Tensor | Sequence[float | str], row_of_image: torch.Tensor, rows: int
) -> torch.Tensor:
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


def position_ids(
    input_ids: torch.Tensor,
    token_id: int,
    delta: float | str | torch.Tensor | Sequence[float | str],
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    compress: torch.Tensor | None,
    tile_tokens: int,
    compressed_tokens: int,
    compressed_step: str,
    generator: torch.Generator | None,
    backend: str,
) -> torch.Tensor:
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
    deltas, per_row = _deltas(delta, images, generator)
    if per_row and len(deltas) != input_ids.shape[0]:
        raise ValueError(f"delta: got {len(deltas)} rows, expected {input_ids.shape[0]} as input_ids")
    scalar = not per_row and _one_for_all(delta, deltas)
    units = tile_tokens // compressed_tokens if compressed_step == "span" else 1
    positions, info = _position_ids(
        input_ids, mask, cu_seqlens, token_id, _padded(deltas).to(input_ids.device), per_row, compress, tile_tokens,
        compressed_tokens, units, backend,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return positions
    found, visual, tiles, bad, end = info.tolist()
    if not per_row and not scalar and found != len(deltas):
        raise ValueError(f"delta: got {len(deltas)} values, expected one for each of the {int(found)} images")
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


def _padded(deltas: torch.Tensor) -> torch.Tensor:
    return deltas if len(deltas) else deltas.new_ones(1)


def count_images(
    input_ids: torch.Tensor, token_id: int, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> int:
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
