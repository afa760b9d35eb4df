"""Experts in few bits as a module: the tensors of the stored format are its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.moe_experts import formats, moe_experts

__all__ = ["QuantisedExperts"]


class QuantisedExperts(nn.Module):
    """Drop-in module for the stacked experts of Qwen3-MoE and GPT-OSS, with weights in MXFP4 or block FP8.

    Parameters, which get no gradients, for "mxfp4" as checkpoints have them: `gate_up_proj_blocks` [E, 2I, H / 32, 16],
    `gate_up_proj_scales` [E, 2I, H / 32], `down_proj_blocks` [E, H, I / 32, 16], `down_proj_scales` [E, H, I / 32], all
    uint8. For "fp8": `gate_up_proj_values` [E, 2I, H] and `down_proj_values` [E, H, I] float8_e4m3fn, and
    `gate_up_proj_scale_inv` and `down_proj_scale_inv` float32, one a block of 128 x 128. With biases also
    `gate_up_proj_bias` [E, 2I] and `down_proj_bias` [E, H], which get some. Rows of gate_up are g0, u0, g1, u1, ...
    where `interleaved`, else gates first.

    Args:
        num_experts: E.
        hidden_size: H, a multiple of 32.
        intermediate_size: I, of one expert, a multiple of 32.
        quantisation: "mxfp4" or "fp8".
        activation: as of `moe_experts`.
        interleaved: the order of gate_up's rows; "mxfp4" only.
        bias: whether there are biases.
        alpha, limit: of GPT-OSS's activation.
        backend: as of `moe_experts`.
        device: of the parameters.
        dtype: of the biases.
        prefix: before the names of the stored tensors. transformers before 5.16 takes apart whatever begins with
            "gate_up_proj" or "down_proj" when it saves a Qwen3-MoE.

    Raises:
        ValueError: a width that is no multiple of 32; an option that is not known.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        quantisation: str = "mxfp4",
        activation: str = "silu",
        interleaved: bool = False,
        bias: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        backend: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if quantisation not in formats.FORMATS:
            raise ValueError(f"quantisation: got {quantisation!r}, expected one of {', '.join(formats.FORMATS)}")
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if size % formats.MXFP4_BLOCK:
                raise ValueError(f"{name}: got {size}, expected a multiple of {formats.MXFP4_BLOCK}")
        if interleaved and quantisation == "fp8":
            raise ValueError("interleaved: got True, but blocks of fp8 would hold gates and ups with one scale")
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.quantisation, self.activation, self.interleaved = quantisation, activation, interleaved
        self.alpha, self.limit, self.backend, self.prefix = alpha, limit, backend, prefix
        for name, shape in (
            ("gate_up_proj", (num_experts, 2 * intermediate_size, hidden_size)),
            ("down_proj", (num_experts, hidden_size, intermediate_size)),
        ):
            for parameter, (stored_shape, kind) in stored(prefix + name, shape, quantisation).items():
                value = torch.empty(stored_shape, dtype=kind, device=device)
                self.register_parameter(parameter, nn.Parameter(value, requires_grad=False))
            value = torch.zeros(shape[:2], dtype=dtype, device=device) if bias else None
            self.register_parameter(f"{name}_bias", None if value is None else nn.Parameter(value))

    def parts(self, name: str) -> list[str]:
        """Names of the parameters that hold values and scales of "gate_up_proj" or "down_proj"."""
        return list(stored(self.prefix + name, (0, 0, 0), self.quantisation))

    def tensors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and scales of "gate_up_proj" or "down_proj"."""
        values, scales = (self._parameters[part] for part in self.parts(name))
        assert values is not None and scales is not None
        return values, scales

    def expanded(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights of "gate_up_proj" or "down_proj" that the stored ones stand for: [E, rows, columns]."""
        return formats.dequantise(*self.tensors(name), dtype)

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [..., H], expert ids [S, k] of the S flattened tokens, and their weights [S, k], or those of
        all experts [S, E]; the result has the shape and dtype of `hidden_states`."""
        ids, weights = router_indices, routing_weights
        if weights.shape[1] != ids.shape[1]:  # of all experts: transformers 4
            weights = weights.gather(1, ids.clamp(max=self.num_experts - 1))
        gate_up, gate_up_scales = self.tensors("gate_up_proj")
        down, down_scales = self.tensors("down_proj")
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        biases = [
            None if bias is None else bias.to(hidden.dtype) for bias in (self.gate_up_proj_bias, self.down_proj_bias)
        ]
        out = moe_experts(
            hidden, ids, weights, gate_up, down, gate_up_bias=biases[0], down_bias=biases[1],
            gate_up_scales=gate_up_scales, down_scales=down_scales, activation=self.activation, alpha=self.alpha,
            limit=self.limit, layout="interleaved" if self.interleaved else "concatenated", backend=self.backend,
        )  # fmt: skip
        return out.view(hidden_states.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts as any module, but what is stored keeps its dtype: `to(torch.bfloat16)` casts the biases."""
        kept = {id(tensor) for name in ("gate_up_proj", "down_proj") for tensor in self.tensors(name)}

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            return fn(tensor.view(torch.uint8)).view(tensor.dtype) if id(tensor) in kept else fn(tensor)

        return super()._apply(apply, recurse)

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts}, hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"quantisation={self.quantisation}, activation={self.activation}"
        )


def stored(name: str, shape: tuple[int, int, int], quantisation: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of the tensors in which matrices `name` [experts, rows, columns] are stored."""
    experts, rows, columns = shape
    if quantisation == "mxfp4":
        blocks = experts, rows, columns // formats.MXFP4_BLOCK
        size = (*blocks, formats.MXFP4_BLOCK // 2)
        return {f"{name}_blocks": (size, formats.MXFP4_DTYPE), f"{name}_scales": (blocks, torch.uint8)}
    blocks = experts, -(-rows // formats.FP8_BLOCK), -(-columns // formats.FP8_BLOCK)
    return {f"{name}_values": (shape, formats.FP8_DTYPE), f"{name}_scale_inv": (blocks, torch.float32)}
