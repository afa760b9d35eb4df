"""The ops, in the order of the forward pass. Each folder holds one: its `__init__` documents the public functions."""

from .attention import attention
from .linear import linear
from .linear_logprob import LogProb, RowPlan, linear_candidates, linear_ce, linear_kl, linear_logprob, row_plan
from .mlp import gated_mlp, mlp
from .moe_experts import moe_experts, moe_experts_list
from .moe_routing import Dispatch, moe_dispatch, moe_routing
from .norm import layer_norm, rms_norm
from .pixel_shuffle_mlp import pixel_shuffle_mlp
from .tile_image import choose_grid, tile_image, tile_images
from .tile_router import select_tiles, tile_router
from .token_packing import PackedTokens, embed_text, pack_tokens, place_rows
from .v2pe_rope import rope_frequencies, v2pe_position_ids, v2pe_rope, v2pe_rope_

__all__ = [
    "Dispatch",
    "LogProb",
    "PackedTokens",
    "RowPlan",
    "attention",
    "choose_grid",
    "embed_text",
    "gated_mlp",
    "layer_norm",
    "linear",
    "linear_candidates",
    "linear_ce",
    "linear_kl",
    "linear_logprob",
    "mlp",
    "moe_dispatch",
    "moe_experts",
    "moe_experts_list",
    "moe_routing",
    "pack_tokens",
    "pixel_shuffle_mlp",
    "place_rows",
    "rms_norm",
    "rope_frequencies",
    "row_plan",
    "select_tiles",
    "tile_image",
    "tile_images",
    "tile_router",
    "v2pe_position_ids",
    "v2pe_rope",
    "v2pe_rope_",
]
