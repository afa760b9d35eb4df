"""Positions and rotary embedding in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Gradients, Located, NormBackward, Positions, Rope, Rotated, empty_rotated


def cos_sin(a: Rope) -> tuple[Tensor, Tensor]:
    """cos and sin, in the arithmetic type and for all heads, rounded to the type of q when `round`."""
    arithmetic = torch.float64 if a.q.dtype == torch.float64 else torch.float32
    if a.table:
        cos, sin = a.first[..., : a.rotary_dim // 2], a.second[..., : a.rotary_dim // 2]
    else:
        angles = (a.first[..., None] * a.second).double()  # the product is rounded to float32, as transformers has it
        cos, sin = angles.cos().float() * a.scale, angles.sin().float() * a.scale
    if a.round:
        cos, sin = cos.to(a.q.dtype), sin.to(a.q.dtype)
    return cos.to(arithmetic).unsqueeze(a.heads_dim), sin.to(arithmetic).unsqueeze(a.heads_dim)


def _through(x: Tensor, dtype: torch.dtype, round: bool) -> Tensor:
    return x.to(dtype).to(x.dtype) if round else x


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, round: bool) -> Tensor:
    """`x` and the result in the arithmetic type."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return _through(weight.to(x.dtype) * _through(normed, dtype, round), dtype, round)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, round: bool) -> Tensor:
    dtype, half = x.dtype, cos.shape[-1]
    x = x.to(cos.dtype)
    if weight is not None:
        x = rms_norm(x, weight, eps, dtype, round)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]

    def times(u: Tensor, v: Tensor) -> Tensor:
        return _through(u * v, dtype, round)

    return torch.cat((times(a, cos) - times(b, sin), times(b, cos) + times(a, sin), rest), -1).to(dtype)


def v2pe_rope(a: Rope) -> Rotated:
    cos, sin = cos_sin(a)
    sin = -sin if a.inverse else sin
    q, k = (_rotate(x, cos, sin, weight, a.eps, a.round) for x, weight in ((a.q, a.q_weight), (a.k, a.k_weight)))
    out = empty_rotated(a)
    return Rotated(out.q.copy_(q), out.k.copy_(k))


def v2pe_rope_(a: Rope) -> None:
    q, k = v2pe_rope(a)
    a.q.copy_(q)
    a.k.copy_(k)


def v2pe_rope_norm_backward(b: NormBackward) -> Gradients:
    a = b.forward
    cos, sin = cos_sin(a)
    grads = []
    weight_grads = []
    for grad, x, weight in ((b.grad_q, a.q, a.q_weight), (b.grad_k, a.k, a.k_weight)):
        assert weight is not None
        g = _rotate(grad.to(cos.dtype), cos, -sin, None, a.eps, False)
        wide, w = x.to(cos.dtype), weight.to(cos.dtype)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + a.eps)
        normed = wide * rstd
        weight_grads.append((g * normed).sum((0, 1, 2)))
        dx = rstd * (w * g - normed * (w * g * normed).mean(-1, keepdim=True))
        grads.append(torch.empty_like(x).copy_(dx))
    return Gradients(grads[0], grads[1], weight_grads[0], weight_grads[1])


def position_limit(deltas: Tensor) -> Tensor:
    """Positions up to it are exact in float32 for a step that is a multiple of 2^-12, and else off by step / 32."""
    limit = torch.ldexp(deltas, torch.tensor(20, device=deltas.device))
    for j in range(12, -1, -1):
        steps = deltas * 2**j
        limit = torch.where(steps == steps.floor(), 2.0 ** (24 - j), limit)
    return limit


def v2pe_position_ids(a: Positions) -> Located:
    rows, columns = a.input_ids.shape
    device, total = a.input_ids.device, rows * columns
    valid = torch.ones_like(a.input_ids, dtype=torch.bool) if a.mask is None else a.mask
    visual = ((a.input_ids == a.token_id) & valid).reshape(-1)
    text = ((a.input_ids != a.token_id) & valid).reshape(-1)
    index = torch.arange(total, device=device)
    fresh = index % max(columns, 1) == 0  # first token of a row or a sample
    if a.cu_seqlens is not None:
        fresh = fresh | torch.isin(index, a.cu_seqlens)
    previous = torch.cat((visual.new_zeros(1), visual[:-1])) & ~fresh if total else visual
    starts = visual & ~previous
    image = starts.cumsum(0) - 1  # of every visual token
    images, visuals = int(starts.sum()), int(visual.sum())

    tiles_used = 0
    units = visual.long()
    if a.compress is not None:
        sizes = torch.where(a.compress, a.compressed_tokens, a.tile_tokens)
        tile_of = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        ends = sizes.cumsum(0)
        run_ends = torch.bincount(image[visual], minlength=images).cumsum(0) if images else ends[:0]
        needed = int((ends <= visuals).sum())
        fits = visuals <= len(tile_of) and bool(torch.isin(run_ends, ends).all())
        tiles_used = needed if fits else -1
        if fits:
            units[visual] = torch.where(a.compress, a.compressed_units, 1)[tile_of[:visuals]]

    if images:
        if a.per_row:
            per_image = a.deltas[index[starts] // columns]
        else:
            per_image = a.deltas.expand(images) if len(a.deltas) == 1 else a.deltas
        per_image = per_image[image.clamp(0, len(per_image) - 1)][starts]
        run = units.cumsum(0)
        before = run[starts] - units[starts]  # units before each run
        k = (run - before[image.clamp(min=0)]) * visual  # units since the run's first token
        run_units = torch.zeros(images, dtype=torch.int64, device=device).index_add_(0, image[visual], units[visual])
        span = run_units * per_image
        jump = (span - 1e-6 * span.clamp(min=1.0)).ceil().long()
    else:
        per_image, k = a.deltas.new_ones(1), units
        span, jump = a.deltas.new_zeros(0), index[:0]

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

    info = torch.tensor([images, visuals, tiles_used, -1.0, 0.0], dtype=torch.float64, device="cpu")
    if images:
        ends_at = last[starts] + span
        bad = (ends_at > position_limit(per_image)).nonzero()
        if len(bad):
            info[3:] = torch.stack((bad[0, 0].double(), ends_at[bad[0, 0]])).cpu()
    return Located(positions, info.to(device))
