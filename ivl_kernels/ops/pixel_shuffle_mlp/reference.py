"""The projector in plain torch, float32 inside (float64 for float64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shuffle(x: Tensor, merge: int, height: int, width: int, skip: int, transposed: bool) -> Tensor:
    """x [T, skip + height * width, C] -> [T, height * width / merge^2, C * merge^2]."""
    tiles, channels = x.shape[0], x.shape[2]
    rows, columns = height // merge, width // merge
    x = x[:, skip:].reshape(tiles, rows, merge, columns, merge, channels)
    x = x.permute(0, 3, 1, 2, 4, 5) if transposed else x.permute(0, 1, 3, 2, 4, 5)
    return x.reshape(tiles, rows * columns, merge * merge * channels)


def _compute(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: list[Tensor], biases: list[Tensor], merge: int,
    height: int, width: int, skip: int, transposed: bool, eps: float, tiles: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The result and the inputs of the GELUs, in the dtype of the arguments."""
    y = shuffle(x if tiles is None else x[tiles], merge, height, width, skip, transposed)
    y = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
    pre = []
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        y = F.linear(F.gelu(y) if i else y, weight, bias)
        pre.append(y)
    return y, pre[:-1]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: list[Tensor], biases: list[Tensor], merge: int,
    height: int, width: int, skip: int, transposed: bool, eps: float, tiles: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result [K, cells, H], and when `save` the inputs of the GELUs side by side [K * cells, sum of widths]."""
    y, pre = _compute(
        _wide(x), _wide(norm_weight), _wide(norm_bias), [_wide(w) for w in weights], [_wide(b) for b in biases],
        merge, height, width, skip, transposed, eps, tiles,
    )  # fmt: skip
    kept = torch.cat([p.flatten(0, 1) for p in pre], 1).to(x.dtype) if save and pre else x.new_empty(0, 0)
    return y.to(x.dtype), kept


def forward_into(
    out: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: list[Tensor], biases: list[Tensor],
    merge: int, height: int, width: int, skip: int, transposed: bool, eps: float, tiles: Tensor | None,
    starts: Tensor, save: bool,
) -> Tensor:  # fmt: skip
    """Tile k of the result goes to rows starts[k], starts[k] + 1, ... of `out`."""
    y, kept = forward(
        x, norm_weight, norm_bias, weights, biases, merge, height, width, skip, transposed, eps, tiles, save
    )
    out[starts[:, None] + torch.arange(y.shape[1], device=x.device)] = y
    return kept


def _unshuffle(y: Tensor, merge: int, height: int, width: int, skip: int, transposed: bool) -> Tensor:
    """The reverse of `shuffle`, zero at the skipped tokens."""
    tiles, channels, rows, columns = y.shape[0], y.shape[2] // merge**2, height // merge, width // merge
    if transposed:
        y = y.reshape(tiles, columns, rows, merge, merge, channels).permute(0, 2, 3, 1, 4, 5)
    else:
        y = y.reshape(tiles, rows, columns, merge, merge, channels).permute(0, 1, 3, 2, 4, 5)
    return F.pad(y.reshape(tiles, height * width, channels), (0, 0, skip, 0))


def backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: list[Tensor], biases: list[Tensor],
    pre: Tensor, merge: int, height: int, width: int, skip: int, transposed: bool, eps: float, tiles: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, norm_weight, norm_bias, the weights and the biases; an empty tensor where not needed."""
    y = shuffle(_wide(x if tiles is None else x[tiles]), merge, height, width, skip, transposed).flatten(0, 1)
    scale = (y.var(1, correction=0, keepdim=True) + eps).rsqrt()
    centred = (y - y.mean(1, keepdim=True)) * scale
    dz = _wide(grad).reshape(y.shape[0], grad.shape[-1])
    weight_grads: list[Tensor] = []
    bias_grads: list[Tensor] = []
    column = pre.shape[1]
    for i in range(len(weights) - 1, -1, -1):
        bias_grads.insert(0, dz.sum(0))
        if i == 0:
            weight_grads.insert(0, dz.t() @ (centred * _wide(norm_weight) + _wide(norm_bias)))
            break
        z = _wide(pre[:, column - weights[i].shape[1] : column])
        column -= weights[i].shape[1]
        weight_grads.insert(0, dz.t() @ F.gelu(z))
        slope = 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5
        dz = dz @ _wide(weights[i]) * slope
    dy = dz @ _wide(weights[0])
    g = dy * _wide(norm_weight)
    dx = (g - g.mean(1, keepdim=True) - centred * (g * centred).mean(1, keepdim=True)) * scale
    count = (x if tiles is None else tiles).shape[0]
    dx = _unshuffle(dx.view(count, height * width // merge**2, dx.shape[1]), merge, height, width, skip, transposed)
    if tiles is not None:
        dx = dx.new_zeros(x.shape).index_add(0, tiles, dx)
    found = [dx, (dy * centred).sum(0), dy.sum(0), *weight_grads, *bias_grads]
    return [g.to(x.dtype, copy=True) if need else x.new_empty(0) for g, need in zip(found, needs)]
