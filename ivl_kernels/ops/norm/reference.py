"""RMSNorm and LayerNorm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _normalised(s: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """s without its mean when `center`, over its standard deviation (root mean square), and one over the latter."""
    s = s.to(_arithmetic(s))
    for _ in range(2 if center else 0):  # the second time, what rounding left of the mean
        s = s - s.mean(-1, keepdim=True)
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    return s * rstd, rstd


def norm(
    x: Tensor,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    round: bool,
) -> tuple[Tensor, Tensor]:
    """`round`: the normalised rows are rounded to the dtype of x before the weight."""
    total = x.new_empty(0)
    s = x
    if residual is not None:
        s = total = (residual + (x if layer_scale is None else layer_scale * x)).contiguous()
    y, _ = _normalised(s, eps, center)
    if round:
        y = y.to(x.dtype).to(y.dtype)
    y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).contiguous(), total


def norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    x: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor,
    bias: bool,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum, of x (empty without layer scale), of layer scale (empty without x), weight and bias."""
    wide, width = _arithmetic(total), total.shape[-1]
    normalised, rstd = _normalised(total, eps, center)
    g = grad.to(wide)
    w = g * weight.to(wide)
    ds = w - normalised * (w * normalised).mean(-1, keepdim=True)
    if center:
        ds = ds - w.mean(-1, keepdim=True)
    ds = ds * rstd
    if grad_total is not None:
        ds = ds + grad_total.to(wide)
    dx = total.new_empty(0)
    if layer_scale is not None:
        dx = (ds * layer_scale.to(wide)).to(total.dtype)

    def over_rows(terms: Tensor | None) -> Tensor:
        return total.new_empty(0, dtype=wide) if terms is None else terms.reshape(-1, width).sum(0)

    dscale = over_rows(None if x is None else ds * x.to(wide))
    return ds.to(total.dtype), dx, dscale, over_rows(g * normalised), over_rows(g if bias else None)
