"""RMSNorm and LayerNorm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Gradients, Norm, NormBackward, Normed


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _normalised(s: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """s without its mean when `center`, over its standard deviation (root mean square), and one over the latter."""
    s = s.to(_arithmetic(s))
    for _ in range(2 if center else 0):  # the second time, what rounding left of the mean
        s = s - s.mean(-1, keepdim=True)
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    return s * rstd, rstd


def norm(a: Norm) -> Normed:
    total = a.x.new_empty(0)
    s = a.x
    if a.residual is not None:
        s = total = (a.residual + (a.x if a.layer_scale is None else a.layer_scale * a.x)).contiguous()
    y, _ = _normalised(s, a.eps, a.center)
    if a.round:
        y = y.to(a.x.dtype).to(y.dtype)
    y = y * a.weight.to(y.dtype)
    if a.bias is not None:
        y = y + a.bias.to(y.dtype)
    return Normed(y.to(a.x.dtype).contiguous(), total)


def norm_backward(b: NormBackward) -> Gradients:
    dtype, width, wide = b.total.dtype, b.total.shape[-1], _arithmetic(b.total)
    normalised, rstd = _normalised(b.total, b.eps, b.center)
    g = b.grad.to(wide)
    w = g * b.weight.to(wide)
    ds = w - normalised * (w * normalised).mean(-1, keepdim=True)
    if b.center:
        ds = ds - w.mean(-1, keepdim=True)
    ds = ds * rstd
    if b.grad_total is not None:
        ds = ds + b.grad_total.to(wide)
    dx = b.total.new_empty(0)
    if b.layer_scale is not None:
        dx = (ds * b.layer_scale.to(wide)).to(dtype)

    def over_rows(terms: Tensor | None) -> Tensor:
        return ds.new_empty(0) if terms is None else terms.reshape(-1, width).sum(0)

    dscale = over_rows(None if b.x is None else ds * b.x.to(wide))
    return Gradients(ds.to(dtype), dx, dscale, over_rows(g * normalised), over_rows(g if b.bias else None))
