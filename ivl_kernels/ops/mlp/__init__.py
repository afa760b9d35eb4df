"""The MLPs of transformer layers: GELU between two linear layers, and SwiGLU."""

from __future__ import annotations

from torch import Tensor

from . import op

__all__ = ["gated_mlp", "mlp"]


def mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    backend: str = "",
) -> Tensor:
    """gelu(x up^T + up_bias) down^T + down_bias, with the exact (erf) GELU.

    Args:
        x: [..., C] float32, bfloat16, float16 or float64; any strides.
        up: [F, C], the dtype of x.
        down: [H, F], the dtype of x.
        up_bias, down_bias: [F] and [H], the dtype of x, or None.
        backend: force a backend; empty picks the best.

    Returns:
        [..., H], the dtype of x. Sums are in float32 (float64 for float64); without gradients no [..., F] is in memory,
        but some rows of it at a time. Under `torch.autocast` everything is first cast to its dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been computed then.

    Gradients flow to x, weights and biases, once (no double backward); only those needed are computed. Kept for them:
    the weights, the input of the GELU and, for the gradient of `up`, x. Deterministic; on the CPU independent of the
    number of threads.
    Source: `InternVLVisionMLP` of transformers, `InternMLP` of the checkpoints.

    Example:
        >>> import torch
        >>> from ivl_kernels.ops import mlp
        >>> mlp(torch.zeros(2, 3), torch.ones(4, 3), torch.ones(1, 4), down_bias=torch.ones(1)).tolist()
        [[1.0], [1.0]]
    """
    return op.mlp(op.Mlp(x, None, up, up_bias, down, down_bias, keep=False), backend)


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, backend: str = "") -> Tensor:
    """(silu(x gate^T) * (x up^T)) down^T: SwiGLU without biases.

    Args:
        x: [..., C] float32, bfloat16, float16 or float64; any strides.
        gate, up: [F, C], the dtype of x.
        down: [H, F], the dtype of x.
        backend: force a backend; empty picks the best.

    Returns, raises, gradients: as `mlp`; gate and up are one product on the CPU.
    Source: `Qwen2MLP`, `Qwen3MLP` of transformers.
    """
    return op.mlp(op.Mlp(x, gate, up, None, down, None, keep=False), backend)
