"""Experts of a mixture-of-experts layer as a module, with the parameter names of transformers' experts."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.moe_experts import moe_experts

__all__ = ["FusedExperts"]


class FusedExperts(nn.Module):
    """The experts of Qwen3-MoE, or with `gpt_oss=True` of GPT-OSS; the state dict is that of transformers' module.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I, of one expert.
        gpt_oss: interleaved transposed weights, biases and the clamped activation.
        alpha, limit: of GPT-OSS's activation.
        backend: as in `ivl_kernels.ops.moe_experts`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        gpt_oss: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        backend: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.gpt_oss, self.alpha, self.limit, self.backend = gpt_oss, alpha, limit, backend

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *size, device=device, dtype=dtype))

        double = 2 * intermediate_size
        if gpt_oss:
            self.gate_up_proj, self.gate_up_proj_bias = parameter(hidden_size, double), parameter(double)
            self.down_proj, self.down_proj_bias = parameter(intermediate_size, hidden_size), parameter(hidden_size)
        else:
            self.gate_up_proj, self.gate_up_proj_bias = parameter(double, hidden_size), None
            self.down_proj, self.down_proj_bias = parameter(hidden_size, intermediate_size), None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of deviation fan_in^-1/2, zero biases."""
        for matrix, inputs in ((self.gate_up_proj, self.hidden_size), (self.down_proj, self.intermediate_size)):
            nn.init.normal_(matrix, std=inputs**-0.5)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., H], expert ids [S, k] and weights [S, k] of the S flattened tokens; the result's shape
        is that of `hidden_states`."""
        out = moe_experts(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            ids,
            weights,
            self.gate_up_proj,
            self.down_proj,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            activation="gpt_oss" if self.gpt_oss else "silu",
            alpha=self.alpha,
            limit=self.limit,
            layout="interleaved" if self.gpt_oss else "concatenated",
            backend=self.backend,
        )
        return out.view(hidden_states.shape)

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts}, hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"gpt_oss={self.gpt_oss}"
        )
