"""The ops of the tile router in plain torch."""

from __future__ import annotations

from torch import Tensor

from .op import FewRows, FewRowsTransposed, Pool, PoolBackward, Pooled, PoolGradients


def tile_pool(a: Pool) -> Pooled:
    """`z` [T, N, C], `u` [T, H, C] -> softmax(z u, over N) z [T, H, C] and the log-denominators [T, H]."""
    z = a.z.to(a.u.dtype)
    scores = a.u @ z.mT
    lse = scores.logsumexp(-1)
    return Pooled((scores - lse.unsqueeze(-1)).exp() @ z, lse)


def tile_pool_backward(b: PoolBackward) -> PoolGradients:
    z, u = b.forward
    wide = z.to(u.dtype)
    weight = (u @ wide.mT - b.lse.unsqueeze(-1)).exp()
    slope = weight * (b.grad @ wide.mT - (b.grad * b.pooled).sum(-1, keepdim=True))
    grad_z = weight.mT @ b.grad + slope.mT @ u if b.need_z else z.new_empty(0)
    return PoolGradients(grad_z.to(z.dtype), slope @ wide)


def few_rows_linear(a: FewRows) -> Tensor:
    """`x` [M, G, K] times `w` [N, K] in G blocks of rows, block g with x[:, g], plus `bias` [N]: [M, N]."""
    blocks = a.w.to(a.x.dtype).unflatten(0, (a.x.shape[1], -1))
    out = (a.x.transpose(0, 1) @ blocks.mT).transpose(0, 1).flatten(1)
    return out if a.bias is None else out + a.bias


def few_rows_linear_transposed(a: FewRowsTransposed) -> Tensor:
    """`x` [M, G, N / G] times block g of the rows of `w` [N, K]: [M, G, K]."""
    blocks = a.w.to(a.x.dtype).unflatten(0, (a.x.shape[1], -1))
    return (a.x.transpose(0, 1) @ blocks).transpose(0, 1).contiguous()
