"""What InternVL3.5-Flash ships, written as its remote code computes it: the yardstick of tests and benchmarks.

Operation for operation the eager path, in the model's dtype and with its waste; nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

ROUTER_HEADS = 16


class ShippedPooling(nn.Module):
    """Single-query attention over the tokens of a tile: attn1 once, then attn2 and norm2 three times."""

    def __init__(self, width: int, heads: int = ROUTER_HEADS) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.randn(1, width))
        for i in range(1, 5):
            self.add_module(f"attn{i}", nn.MultiheadAttention(width, heads, batch_first=True))
            self.add_module(f"norm{i}", nn.LayerNorm(width))

    def forward(self, tiles: list[torch.Tensor]) -> torch.Tensor:
        """`tiles`: one [tokens, C] tensor each; the result is [T, C]."""
        longest = max(tile.shape[0] for tile in tiles)
        padded = tiles[0].new_zeros(len(tiles), longest, tiles[0].shape[1])
        mask = torch.ones(len(tiles), longest, dtype=torch.bool, device=padded.device)
        for i, tile in enumerate(tiles):
            padded[i, : tile.shape[0]] = tile
            mask[i, : tile.shape[0]] = False
        y = self.query_token.unsqueeze(0).expand(len(tiles), -1, -1)
        for attention, norm in (
            (self.attn1, self.norm1),
            (self.attn2, self.norm2),
            (self.attn2, self.norm2),
            (self.attn2, self.norm2),
        ):
            y = norm(attention(y, padded, padded, key_padding_mask=mask)[0])
        return y.squeeze(1)


class ShippedGating(nn.Module):
    """Four residual blocks, each run through torch's checkpoint, then the two-way gate."""

    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        for i in range(1, 5):
            block = nn.Sequential(
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(4 * width, width),
                nn.Dropout(dropout),
                nn.LayerNorm(width),
            )
            self.add_module(f"block{i}", block)
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (self.block1, self.block2, self.block3, self.block4):
            # The remote code leaves use_reentrant out: this is its default, without the warning.
            x = x + checkpoint(block, x, use_reentrant=True)
        return torch.softmax(self.gate(x), dim=-1)


class ShippedRouter(nn.Module):
    """From the output of the vision transformer to the gate probabilities."""

    def __init__(self, width: int, heads: int = ROUTER_HEADS, dropout: float = 0.1) -> None:
        super().__init__()
        self.pooling_before_gating = ShippedPooling(width, heads)
        self.gating = ShippedGating(width, dropout)

    def forward(self, vit: torch.Tensor, skip: int = 1) -> torch.Tensor:
        """`vit` [T, skip + tokens, C], the class token in front; the result is [T, 2]."""
        z = vit[:, skip:, :]
        tokens = z.shape[1]
        flat = z.reshape(-1, z.shape[-1])
        tiles = [torch.cat([tile], dim=0) for tile in flat.split([tokens] * z.shape[0])]
        return self.gating(self.pooling_before_gating(tiles))


def shipped_decision(gate: torch.Tensor, relative_threshold: float, absolute_threshold: float) -> torch.Tensor:
    """Tiles to compress, [T] bool, from the gate probabilities [T, 2]: the released rule, in the gate's dtype."""
    scores = gate[:, 0]
    threshold = torch.quantile(scores.float(), relative_threshold)
    return (scores > threshold) & (scores >= absolute_threshold)
