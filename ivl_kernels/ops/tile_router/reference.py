"""The tile router in plain torch, and the decision rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for the rest: what the router computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_pool(z: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`z` [T, N, C], `u` [T, H, C] -> softmax(z u, over N) z [T, H, C] and the log-denominators [T, H]."""
    z = z.to(u.dtype)
    scores = u @ z.mT
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp() @ z, lse


def tile_pool_backward(
    z: torch.Tensor, u: torch.Tensor, pooled: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor, need_z: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `z` (empty unless needed) and `u`."""
    wide = z.to(u.dtype)
    weight = (u @ wide.mT - lse.unsqueeze(-1)).exp()
    slope = weight * (grad @ wide.mT - (grad * pooled).sum(-1, keepdim=True))
    grad_z = weight.mT @ grad + slope.mT @ u if need_z else z.new_empty(0)
    return grad_z.to(z.dtype), slope @ wide


def few_rows_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x` [M, G, K] times `w` [N, K] in G blocks of rows, block g with x[:, g], plus `bias` [N]: [M, N]."""
    blocks = w.to(x.dtype).unflatten(0, (x.shape[1], -1))
    out = (x.transpose(0, 1) @ blocks.mT).transpose(0, 1).flatten(1)
    return out if bias is None else out + bias


def few_rows_linear_transposed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`x` [M, G, N / G] times block g of the rows of `w` [N, K]: [M, G, K]."""
    blocks = w.to(x.dtype).unflatten(0, (x.shape[1], -1))
    return (x.transpose(0, 1) @ blocks).transpose(0, 1).contiguous()


def shipped_attention(
    y: torch.Tensor, z: torch.Tensor, in_weight, in_bias, out_weight, out_bias, heads: int
) -> torch.Tensor:
    """`nn.MultiheadAttention` as the remote code calls it (no folding, every rounding in the model's dtype): [T, C]."""
    out, _ = F.multi_head_attention_forward(
        y.unsqueeze(0), z.transpose(0, 1), z.transpose(0, 1), z.shape[2], heads, in_weight, in_bias, None, None,
        False, 0.0, out_weight, out_bias, training=False,
        key_padding_mask=torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device),
    )  # fmt: skip
    return out[0]


def group_quantile(scores: torch.Tensor, groups: torch.Tensor, q: float) -> torch.Tensor:
    """For each tile the q-quantile (linear interpolation, as `torch.quantile`) of the scores of its group: [T]."""
    by_score = scores.argsort(stable=True)
    order = by_score[groups[by_score].argsort(stable=True)]
    ids = groups[order]
    first = torch.searchsorted(ids, groups)
    last = torch.searchsorted(ids, groups, right=True) - 1
    ordered = scores[order]
    rank = q * (last - first).to(scores.dtype)
    below = ordered[first + rank.floor().long()]
    above = ordered[first + rank.ceil().long()]
    # NaN sorts last: one in a group makes the group's quantile NaN.
    return torch.where(ordered[last].isnan(), torch.nan, torch.lerp(below, above, rank - rank.floor()))


def most_harmless(scores: torch.Tensor, groups: torch.Tensor, budget: int, tokens: tuple[int, int]) -> torch.Tensor:
    """The fewest tiles, highest scores first and earlier tiles first on ties, that bring each group within budget."""
    by_score = scores.nan_to_num(nan=-torch.inf).argsort(stable=True, descending=True)
    order = by_score[groups[by_score].argsort(stable=True)]
    ids = groups[order]
    first = torch.searchsorted(ids, ids)
    count = torch.searchsorted(ids, ids, right=True) - first
    full, small = tokens
    excess = (count * full - budget).clamp(min=0)
    wanted = (excess + (full - small) - 1) // (full - small)
    place = torch.arange(len(ids), device=ids.device) - first
    return torch.zeros_like(ids, dtype=torch.bool).scatter(0, order, place < wanted)
