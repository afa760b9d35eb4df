"""RMSNorm and LayerNorm of rows, with the residual connection and the layer scale that precede them."""

from __future__ import annotations

from torch import Tensor

from . import op

__all__ = ["layer_norm", "rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    rounding: str = "before_weight",
    backend: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension, optionally of `residual + layer_scale * x`: x is read and written once.

    With s = x, or s = residual + x, or s = residual + layer_scale * x::

        y = weight * s / sqrt(mean(s^2) + eps)

    Args:
        x: [..., C] float32, bfloat16, float16 or float64; any strides.
        weight: [C], the dtype of x; with rounding="after_weight" also float32.
        eps: added to the mean square.
        residual: the shape and dtype of x.
        layer_scale: [C], the dtype of x; only with `residual`.
        rounding: where 16-bit results are rounded. "before_weight": after the normalisation, and the product with the
            weight again (Qwen, Llama, InternViT-6B); "after_weight": once, after the product (GPT-OSS). In float32
            both are the same.
        backend: force a backend; empty picks the best.

    Returns:
        y like x, contiguous; with `residual`: (y, s), where s is bit-identical to what torch's `residual + x` or
        `residual + layer_scale * x` gives in the dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written then.

    Gradients flow to x, residual, layer_scale and weight, once (no double backward). s is kept for the backward and
    nothing else of its size (x itself when layer_scale needs gradients). Deterministic; on the CPU also independent of
    the number of threads. Under `torch.autocast` the dtype of x stays.
    Source: `Qwen3RMSNorm`, `GptOssRMSNorm` and `InternVLVisionRMSNorm` of transformers.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> rms_norm(x, torch.ones(2), residual=torch.zeros(1, 2))
        (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    return op.norm(op.Norm(x, residual, layer_scale, weight, None, eps, False, op.rounds(rounding)), backend)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    backend: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension, optionally of `residual + layer_scale * x`: x is read and written once.

    With s as in `rms_norm`::

        y = weight * (s - mean(s)) / sqrt(variance(s) + eps) + bias

    Args:
        x: [..., C] float32, bfloat16, float16 or float64; any strides.
        weight, bias: [C], the dtype of x or float32; no bias: None.
        eps: added to the variance (1e-6 in InternViT; torch's default is 1e-5).
        residual: the shape and dtype of x.
        layer_scale: [C], the dtype of x; only with `residual`.
        backend: force a backend; empty picks the best.

    Returns:
        y like x, contiguous, rounded once; with `residual`: (y, s) as `rms_norm` returns it.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written then.

    Gradients flow to x, residual, layer_scale, weight and bias, once (no double backward); saved and determinism as in
    `rms_norm`. The variance is the mean of the squared differences from the mean, so rows far from zero lose nothing.
    Source: `torch.nn.functional.layer_norm` and `InternVLVisionLayer` of transformers.
    """
    return op.norm(op.Norm(x, residual, layer_scale, weight, bias, eps, True, False), backend)
