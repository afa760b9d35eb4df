"""The projector in plain torch, float32 inside (float64 for float64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Projected, Projector, ProjectorBackward, ProjectorInto, empty_pre


def shuffle(x: Tensor, merge: int, height: int, width: int, skip: int, transposed: bool) -> Tensor:
    """x [T, skip + height * width, C] -> [T, height * width / merge^2, C * merge^2]."""
    tiles, channels = x.shape[0], x.shape[2]
    rows, columns = height // merge, width // merge
    x = x[:, skip:].reshape(tiles, rows, merge, columns, merge, channels)
    x = x.permute(0, 3, 1, 2, 4, 5) if transposed else x.permute(0, 1, 3, 2, 4, 5)
    return x.reshape(tiles, rows * columns, merge * merge * channels)


def _chosen(a: Projector) -> Tensor:
    return a.x if a.tiles is None else a.x[a.tiles]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def pixel_shuffle_mlp(a: Projector) -> Projected:
    y = shuffle(_wide(_chosen(a)), *a.geometry[:5])
    y = F.layer_norm(y, y.shape[-1:], _wide(a.norm_weight), _wide(a.norm_bias), a.eps)
    pre = []
    for i, (weight, bias) in enumerate(zip(a.weights, a.biases)):
        y = F.linear(F.gelu(y) if i else y, _wide(weight), _wide(bias))
        pre.append(y)
    kept = [p.flatten(0, 1) for p in pre[:-1]] if a.keep else []
    return Projected(y.to(a.x.dtype), torch.cat(kept, 1).to(a.x.dtype) if kept else empty_pre(a))


def pixel_shuffle_mlp_into_(a: ProjectorInto) -> Tensor:
    y, kept = pixel_shuffle_mlp(a.forward)
    a.out[a.starts[:, None] + torch.arange(y.shape[1], device=y.device)] = y
    return kept


def _unshuffle(y: Tensor, a: Projector) -> Tensor:
    """The reverse of `shuffle`, zero at the skipped tokens."""
    tiles, merge = y.shape[0], a.merge
    channels, rows, columns = y.shape[2] // merge**2, a.height // merge, a.width // merge
    if a.transposed:
        y = y.reshape(tiles, columns, rows, merge, merge, channels).permute(0, 2, 3, 1, 4, 5)
    else:
        y = y.reshape(tiles, rows, columns, merge, merge, channels).permute(0, 1, 3, 2, 4, 5)
    return F.pad(y.reshape(tiles, a.height * a.width, channels), (0, 0, a.skip, 0))


def pixel_shuffle_mlp_backward(b: ProjectorBackward) -> list[Tensor]:
    a = b.forward
    y = shuffle(_wide(_chosen(a)), *a.geometry[:5]).flatten(0, 1)
    scale = (y.var(1, correction=0, keepdim=True) + a.eps).rsqrt()
    centred = (y - y.mean(1, keepdim=True)) * scale
    dz = _wide(b.grad).reshape(y.shape[0], b.grad.shape[-1])
    weight_grads: list[Tensor] = []
    bias_grads: list[Tensor] = []
    column = b.pre.shape[1]
    for i in range(len(a.weights) - 1, -1, -1):
        bias_grads.insert(0, dz.sum(0))
        if i == 0:
            weight_grads.insert(0, dz.t() @ (centred * _wide(a.norm_weight) + _wide(a.norm_bias)))
            break
        z = _wide(b.pre[:, column - a.weights[i].shape[1] : column])
        column -= a.weights[i].shape[1]
        weight_grads.insert(0, dz.t() @ F.gelu(z))
        slope = 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5
        dz = dz @ _wide(a.weights[i]) * slope
    dy = dz @ _wide(a.weights[0])
    g = dy * _wide(a.norm_weight)
    dx = (g - g.mean(1, keepdim=True) - centred * (g * centred).mean(1, keepdim=True)) * scale
    dx = _unshuffle(dx.view(a.selected, a.cells, dx.shape[1]), a)
    if a.tiles is not None:
        dx = dx.new_zeros(a.x.shape).index_add(0, a.tiles, dx)
    found = [dx, (dy * centred).sum(0), dy.sum(0), *weight_grads, *bias_grads]
    return [g.to(a.x.dtype, copy=True) if need else a.x.new_empty(0) for g, need in zip(found, b.needs)]
