"""Mixture-of-experts feed-forward: every token through its k experts, and the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import op

__all__ = ["moe_experts", "moe_experts_list"]


def moe_experts(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    layout: str = "concatenated",
    backend: str = "",
) -> Tensor:
    """Sum over each token's experts of weight * down(activation(gate_up(token))), in the checkpoint's own layout.

    With g, u the gate and up parts of hidden @ gate_up + gate_up_bias, the activation is

    * "silu" (Qwen3-MoE): g * sigmoid(g) * u
    * "gpt_oss": g' * sigmoid(alpha * g') * (u' + 1) with g' = min(g, limit), u' = clamp(u, -limit, limit)

    Args:
        hidden: [S, H] tokens; float32, bfloat16, float16 or float64.
        ids: [S, k] int64 or int32 expert ids. An id outside 0 to E - 1 (expert parallelism uses E) contributes zero.
        weights: [S, k] routing weights, any floating dtype.
        gate_up: [E, 2I, H] with the gate rows first ("concatenated"), or [E, H, 2I] with columns g0, u0, g1, u1, ...
            ("interleaved", GPT-OSS); contiguous, the dtype of `hidden`, or float32 beside 16-bit tokens: rounded to
            their dtype as it is read.
        down: [E, H, I] ("concatenated") or [E, I, H] ("interleaved"); contiguous, the dtype of `gate_up`.
        gate_up_bias: [E, 2I] in the order of gate_up's rows or columns, or None.
        down_bias: [E, H] or None.
        gate_up_scales, down_scales: of matrices in few bits, which are read as they are stored. Those are rows of
            output in either layout, which then says the order of gate and up alone; H and I are multiples of 32. MXFP4:
            gate_up [E, 2I, H / 32, 16] and down [E, H, I / 32, 16] uint8 with scales [E, rows, blocks] uint8. FP8
            ("concatenated" only): gate_up [E, 2I, H] and down [E, H, I] float8_e4m3fn with float32 scales
            [E, ceil(rows / 128), ceil(columns / 128)]. `formats` says what the bytes mean.
        activation: "silu" or "gpt_oss".
        alpha, limit: of the "gpt_oss" activation.
        layout: "concatenated" or "interleaved".
        backend: force a backend; empty picks the best.

    Returns:
        [S, H], dtype of `hidden`. Sums are in float32 (float64 for float64 inputs), each token's in the order of its
        choices. Under `torch.autocast`, from 2 E slots on, the products are of its dtype, as for linear layers; with
        fewer they are of the weights'. float32 matrices are not copied: GPUs round a tile as they read it (the C++
        kernels do hold a rounded copy, for the length of a call).

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit.

    Gradients flow to `hidden`, `weights`, `gate_up`, `down` and the biases; only those needed are computed. What the
    forward keeps for them is one [S * k, 2I] tensor; without gradients it keeps nothing. Matrices in few bits get none
    and may not require any. Deterministic.
    The reference backend reads the expert counts from the device, the others do not.
    Source: transformers `Qwen3MoeExperts` and `GptOssExperts`.
    """
    return op.moe_experts(
        hidden, ids, weights, gate_up, down, gate_up_bias, down_bias, gate_up_scales, down_scales, activation, alpha,
        limit, layout, backend,
    )  # fmt: skip


def moe_experts_list(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    *,
    backend: str = "",
) -> Tensor:
    """`moe_experts` with one tensor a matrix, for models that keep a list of experts: nothing is stacked or copied.

    Args:
        hidden, ids, weights: as in `moe_experts`.
        gate, up: E tensors [I, H] each, the dtype of `hidden`, contiguous.
        down: E tensors [H, I].
        backend: force a backend; only the C++ kernels and the reference serve lists. On a GPU stack the experts once
            and call `moe_experts`: the reference stacks them at every call and waits for the device.

    Returns:
        [S, H], the activation is "silu". Errors, gradients and determinism as in `moe_experts`; the matrices of an
        expert that no token chose get None, not zeros (in compiled graphs zeros).
    """
    return op.moe_experts_list(hidden, ids, weights, gate, up, down, backend)
