"""The tile router as a module, with the parameter names of the InternVL3.5-Flash checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops.tile_router import Attention, Block, Gate, tile_router

__all__ = ["TileRouter"]


class _Pooling(nn.Module):
    def __init__(self, width: int, heads: int, **factory: Any) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.randn(1, width, **factory))
        for i in range(1, 5):
            self.add_module(f"attn{i}", nn.MultiheadAttention(width, heads, batch_first=True, **factory))
            self.add_module(f"norm{i}", nn.LayerNorm(width, **factory))

    def forward(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        """The shipped arithmetic, module by module: one [N, C] tensor a tile -> [T, C]."""
        z = torch.stack([*tiles])
        y: torch.Tensor = self.query_token.unsqueeze(0).expand(len(z), -1, -1)
        masked = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
        for i in (1, 2, 2, 2):
            attention, norm = getattr(self, f"attn{i}"), getattr(self, f"norm{i}")
            y = norm(attention(y, z, z, key_padding_mask=masked)[0])
        return y.squeeze(1)


class _Gating(nn.Module):
    def __init__(self, width: int, dropout: float, **factory: Any) -> None:
        super().__init__()
        for i in range(1, 5):
            block = nn.Sequential(
                nn.Linear(width, 4 * width, **factory),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(4 * width, width, **factory),
                nn.Dropout(dropout),
                nn.LayerNorm(width, **factory),
            )
            self.add_module(f"block{i}", block)
        self.gate = nn.Sequential(nn.LayerNorm(width, **factory), nn.Linear(width, 2, **factory))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The shipped arithmetic, module by module: [T, C] -> probabilities [T, 2]."""
        for i in range(1, 5):
            x = x + getattr(self, f"block{i}")(x)
        return self.gate(x).softmax(-1)


class TileRouter(nn.Module):
    """Gate probabilities of tiles; the state dict is that of a checkpoint's `pooling_before_gating.*` and `gating.*`.

    `attn3`, `attn4`, `norm3` and `norm4` exist in the checkpoints and are never used: they are kept, and get no
    gradient. Dropout acts in train mode, as in the shipped modules.

    Args:
        width: hidden size C of the vision transformer.
        heads: heads of the attentions.
        dropout: probability of the dropouts in the gating blocks.
        folded, backend: as in `ivl_kernels.ops.tile_router`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        width: int,
        heads: int = 16,
        dropout: float = 0.1,
        *,
        folded: bool = True,
        backend: str = "",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pooling_before_gating: nn.Module = _Pooling(width, heads, device=device, dtype=dtype)
        self.gating: nn.Module = _Gating(width, dropout, device=device, dtype=dtype)
        self.folded = folded
        self.backend = backend

    @classmethod
    def from_modules(
        cls, pooling: nn.Module, gating: nn.Module, *, folded: bool = True, backend: str = ""
    ) -> TileRouter:
        """A router over the modules of a loaded Flash model: shares their parameters, dropouts and train mode."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.pooling_before_gating, self.gating = pooling, gating
        self.folded, self.backend = folded, backend
        self.training = gating.training
        return self

    def parameters_of_op(self) -> dict[str, Any]:
        """The arguments of `ops.tile_router` that the parameters make up."""
        pooling, gating = self.pooling_before_gating, self.gating
        attentions = []
        for i in (1, 2):
            attention, norm = getattr(pooling, f"attn{i}"), getattr(pooling, f"norm{i}")
            out = attention.out_proj
            attentions.append(
                Attention(
                    attention.in_proj_weight, attention.in_proj_bias, out.weight, out.bias, norm.weight, norm.bias
                )
            )
        blocks = []
        for i in range(1, 5):
            first, _, drop, second, _, norm = getattr(gating, f"block{i}")
            blocks.append(Block(first.weight, first.bias, second.weight, second.bias, norm.weight, norm.bias))
        norm, linear = gating.gate
        return {
            "query": pooling.query_token,
            "attentions": attentions,
            "blocks": blocks,
            "gate": Gate(norm.weight, norm.bias, linear.weight, linear.bias),
            "heads": pooling.attn1.num_heads,
            "eps": norm.eps,
            "dropout": drop.p if drop.training else 0.0,
        }

    def forward(
        self, z: torch.Tensor, *, skip: int = 0, return_logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`z` [T, skip + N, C] -> probabilities [T, 2], with `return_logits` the logits too; see `ops.tile_router`."""
        return tile_router(
            z,
            **self.parameters_of_op(),
            skip=skip,
            folded=self.folded,
            return_logits=return_logits,
            backend=self.backend,
        )
