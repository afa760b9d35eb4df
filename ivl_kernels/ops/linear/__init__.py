"""A linear layer: x weight^T + bias."""

from __future__ import annotations

from torch import Tensor

from . import op

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "") -> Tensor:
    """x weight^T + bias, as `torch.nn.functional.linear`.

    Args:
        x: [..., K]; float32, bfloat16, float16 or float64, any strides.
        weight: [N, K], the dtype of `x`, any strides.
        bias: [N] or None, the dtype of `x`.
        backend: force a backend; empty picks the best.

    Returns:
        [..., N], dtype of `x`. Sums are in float32 (float64 for float64 inputs), of chains of at most 128 products, and
        are rounded once. Under `torch.autocast` everything is first cast to its dtype, as for `torch.nn.Linear`.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.

    Gradients flow to `x`, `weight` and `bias`, once (no double backward); only those needed are computed.
    x is kept for the gradient of `weight` alone.
    Deterministic; on a CPU the result does not depend on the number of threads, but a row's last digits may
    on the number of rows.

    Example:
        >>> import torch
        >>> from ivl_kernels.ops import linear
        >>> linear(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4)).tolist()
        [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]
    """
    return op.linear(x, weight, bias, backend)
