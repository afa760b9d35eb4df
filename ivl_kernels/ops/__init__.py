"""The ops, in the order of the forward pass. Each folder holds one: its `__init__` documents the public functions."""

from .moe_experts import moe_experts
from .moe_routing import Dispatch, moe_dispatch, moe_routing
from .token_packing import place_rows

__all__ = ["Dispatch", "moe_dispatch", "moe_experts", "moe_routing", "place_rows"]
