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


def shipped_shuffle(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Pixel shuffle of [T, h, w, C] in the v2 order, with its two permuted copies."""
    tiles, rows, columns, width = x.shape
    x = x.view(tiles, rows, int(columns * scale), int(width / scale)).permute(0, 2, 1, 3).contiguous()
    x = x.view(tiles, int(columns * scale), int(rows * scale), int(width / scale**2))
    return x.permute(0, 2, 1, 3).contiguous()


def shipped_projector(width: int, hidden: int, merge: int, dropout: float = 0.1) -> nn.Sequential:
    """`mlp1` (merge 2) or `mlp2` (merge 4)."""
    wide = width * merge * merge
    if merge == 2:
        return nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    return nn.Sequential(
        nn.LayerNorm(wide),
        nn.Linear(wide, 2 * hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(2 * hidden, 2 * hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(2 * hidden, hidden),
    )


def shipped_compaction(
    embeds: torch.Tensor, ids: torch.Tensor, compress: torch.Tensor, token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sequence: embeddings [N, H] and ids [N] without what compressed tiles drop, and which tokens stay."""
    keep = torch.ones_like(ids, dtype=torch.bool)
    positions = (ids == token_id).nonzero(as_tuple=True)[0]
    for tile, small in enumerate(compress):
        if small:  # reads the device, tile by tile
            start = positions[tile * 256]
            keep[start + 64 : start + 256] = False
    return embeds[keep], ids[keep], keep


def shipped_packing(
    embeds: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    small: torch.Tensor,
    full: torch.Tensor,
    compress: torch.Tensor,
    token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows the projectors: a batch of one in, packed embeddings [1, N', H] and a mask of ones out."""
    is_image = (ids.squeeze(0) == token_id).int()
    edge = torch.zeros(1, dtype=is_image.dtype, device=is_image.device)
    steps = torch.diff(torch.cat([edge, is_image, edge]))
    lengths = (steps == -1).nonzero().squeeze(1) - (steps == 1).nonzero().squeeze(1)
    if (lengths % 256 != 0).any():
        raise ValueError(f"runs of placeholders: {lengths.tolist()}")
    chosen = [small[tile] if compress[tile] else full[tile] for tile in range(len(compress))]
    batch, length, width = embeds.shape
    embeds, ids, _ = shipped_compaction(
        embeds.reshape(batch * length, width), ids.reshape(batch * length), compress, token_id
    )
    assert mask.min() == 1
    embeds[ids == token_id] = torch.cat(chosen, dim=0)
    embeds = embeds.reshape(batch, -1, width)
    return embeds, torch.ones(embeds.shape[:2], device=embeds.device)


class ShippedFlash(nn.Module):
    """Everything between the vision transformer and the language model, for a batch of one: `generate_flash`."""

    def __init__(
        self, width: int, hidden: int, vocabulary: int, thresholds: tuple[float, float], token_id: int
    ) -> None:
        super().__init__()
        self.router = ShippedRouter(width)
        self.mlp1, self.mlp2 = shipped_projector(width, hidden, 2), shipped_projector(width, hidden, 4)
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.thresholds, self.token_id = thresholds, token_id

    def features(self, vit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both projections of every tile, and the gate."""
        gate = self.router(vit)
        side = int((vit.shape[1] - 1) ** 0.5)
        grid = vit[:, 1:, :].reshape(vit.shape[0], side, side, -1)
        small = shipped_shuffle(grid, 0.25)
        small = self.mlp2(small.reshape(small.shape[0], -1, small.shape[-1]))
        full = shipped_shuffle(grid, 0.5)
        full = self.mlp1(full.reshape(full.shape[0], -1, full.shape[-1]))
        return small, full, gate

    def forward(
        self, vit: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, compress: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`compress` overrides the decision, which is computed all the same."""
        embeds = self.embedding(ids)
        small, full, gate = self.features(vit)
        decided = shipped_decision(gate, *self.thresholds)
        compress = decided if compress is None else compress
        return shipped_packing(embeds, ids, mask, small, full, compress, self.token_id)
