"""Positions and rotary embedding in plain torch."""

from __future__ import annotations

import torch


def cos_sin(
    q: torch.Tensor, first: torch.Tensor, second: torch.Tensor, table: bool, scale: float, rotary_dim: int, round: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B or 1, N, rotary_dim / 2] in the arithmetic type, rounded to the type of `q` when `round`."""
    arithmetic = torch.float64 if q.dtype == torch.float64 else torch.float32
    if table:
        cos, sin = first[..., : rotary_dim // 2], second[..., : rotary_dim // 2]
    else:
        angles = (first[..., None] * second).double()  # the product is rounded to float32, as transformers has it
        cos, sin = angles.cos().float() * scale, angles.sin().float() * scale
    if round:
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return cos.to(arithmetic), sin.to(arithmetic)


def _through(x: torch.Tensor, dtype: torch.dtype, round: bool) -> torch.Tensor:
    return x.to(dtype).to(x.dtype) if round else x


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, round: bool) -> torch.Tensor:
    """`x` and the result in the arithmetic type."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return _through(weight.to(x.dtype) * _through(normed, dtype, round), dtype, round)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, eps: float, round: bool
) -> torch.Tensor:
    dtype, half = x.dtype, cos.shape[-1]
    x = x.to(cos.dtype)
    if weight is not None:
        x = rms_norm(x, weight, eps, dtype, round)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]

    def times(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _through(u * v, dtype, round)

    return torch.cat((times(a, cos) - times(b, sin), times(b, cos) + times(a, sin), rest), -1).to(dtype)


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    table: bool,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    scale: float,
    eps: float,
    rotary_dim: int,
    heads_dim: int,
    round: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`first`, `second`: cos and sin when `table`, else positions and inverse frequencies."""
    cos, sin = cos_sin(q, first, second, table, scale, rotary_dim, round)
    cos, sin = cos.unsqueeze(heads_dim), (-sin if inverse else sin).unsqueeze(heads_dim)
    out = [torch.empty_like(x).copy_(_rotate(x, cos, sin, w, eps, round)) for x, w in ((q, q_weight), (k, k_weight))]
    return out[0], out[1]


def rope_(
    q: torch.Tensor,
    k: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    table: bool,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    scale: float,
    eps: float,
    rotary_dim: int,
    heads_dim: int,
    round: bool,
) -> None:
    out = rope(q, k, first, second, table, q_weight, k_weight, scale, eps, rotary_dim, heads_dim, round, False)
    q.copy_(out[0])
    k.copy_(out[1])


def norm_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    table: bool,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    scale: float,
    eps: float,
    rotary_dim: int,
    heads_dim: int,
    round: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q and k before the norm, and of the two weights (in the arithmetic type)."""
    cos, sin = cos_sin(q, first, second, table, scale, rotary_dim, round)
    cos, sin = cos.unsqueeze(heads_dim), -sin.unsqueeze(heads_dim)
    grads = []
    weight_grads = []
    for grad, x, weight in ((grad_q, q, q_weight), (grad_k, k, k_weight)):
        g = _rotate(grad.to(cos.dtype), cos, sin, None, eps, False)
        wide, w = x.to(cos.dtype), weight.to(cos.dtype)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed = wide * rstd
        weight_grads.append((g * normed).sum((0, 1, 2)))
        dx = rstd * (w * g - normed * (w * g * normed).mean(-1, keepdim=True))
        grads.append(torch.empty_like(x).copy_(dx))
    return grads[0], grads[1], weight_grads[0], weight_grads[1]


def position_limit(deltas: torch.Tensor) -> torch.Tensor:
    """Positions up to it are exact in float32 for a step that is a multiple of 2^-12, and else off by step / 32."""
    limit = torch.ldexp(deltas, torch.tensor(20))
    for j in range(12, -1, -1):
        steps = deltas * 2**j
        limit = torch.where(steps == steps.floor(), 2.0 ** (24 - j), limit)
    return limit


def position_ids(
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    token_id: int,
    deltas: torch.Tensor,
    per_row: bool,
    compress: torch.Tensor | None,
    tile_tokens: int,
    compressed_tokens: int,
    compressed_units: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [B, N], and [5]: images, visual tokens, tiles used (-1: they do not fit the runs), the first image
    whose steps float32 cannot hold (-1: none), the position where it ends."""
    rows, columns = input_ids.shape
    device, total = input_ids.device, rows * columns
    valid = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    visual = ((input_ids == token_id) & valid).reshape(-1)
    text = ((input_ids != token_id) & valid).reshape(-1)
    index = torch.arange(total, device=device)
    fresh = index % max(columns, 1) == 0  # first token of a row or a sample
    if cu_seqlens is not None:
        fresh = fresh | torch.isin(index, cu_seqlens)
    previous = torch.cat((visual.new_zeros(1), visual[:-1])) & ~fresh if total else visual
    starts = visual & ~previous
    image = starts.cumsum(0) - 1  # of every visual token
    images, visuals = int(starts.sum()), int(visual.sum())

    tiles_used = 0
    units = visual.long()
    if compress is not None:
        sizes = torch.where(compress, compressed_tokens, tile_tokens)
        tile_of = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        ends = sizes.cumsum(0)
        run_ends = torch.bincount(image[visual], minlength=images).cumsum(0) if images else ends[:0]
        needed = int((ends <= visuals).sum())
        fits = visuals <= len(tile_of) and bool(torch.isin(run_ends, ends).all())
        tiles_used = needed if fits else -1
        if fits:
            units[visual] = torch.where(compress, compressed_units, 1)[tile_of[:visuals]]

    if images:
        if per_row:
            per_image = deltas[index[starts] // columns]
        else:
            per_image = deltas.expand(images) if len(deltas) == 1 else deltas
        per_image = per_image[image.clamp(0, len(per_image) - 1)][starts]
        run = units.cumsum(0)
        before = run[starts] - units[starts]  # units before each run
        k = (run - before[image.clamp(min=0)]) * visual  # units since the run's first token
        run_units = torch.zeros(images, dtype=torch.int64, device=device).index_add_(0, image[visual], units[visual])
        span = run_units * per_image
        jump = (span - 1e-6 * span.clamp(min=1.0)).ceil().long()
    else:
        per_image, k = deltas.new_ones(1), units
        span, jump = deltas.new_zeros(0), index[:0]

    # Integer steps: 1 at a text token; at the token after an image, what the image spans.
    steps = text.long()
    moved = torch.cat((jump.new_zeros(1), jump.cumsum(0)))  # by the images before
    done = image + 1 - visual.long()  # images ended before this token
    whole = steps.cumsum(0) + moved[done]
    origin = torch.where(fresh, whole - steps, -1).cummax(0).values  # `whole` before the row or sample
    last = whole - origin - 1
    step = per_image[image.clamp(0, len(per_image) - 1)]
    positions = torch.where(visual, last + k * step, last.double())
    positions = torch.where(valid.reshape(-1), positions, 1.0).to(torch.float32).view(rows, columns)

    info = torch.tensor([images, visuals, tiles_used, -1.0, 0.0], dtype=torch.float64)
    if images:
        ends_at = last[starts] + span
        bad = (ends_at > position_limit(per_image)).nonzero()
        if len(bad):
            info[3:] = torch.stack((bad[0, 0].double(), ends_at[bad[0, 0]])).cpu()
    return positions, info
