"""The ops, in the order of the forward pass. Each folder holds one: its `__init__` documents the public functions."""

from .token_packing import place_rows

__all__ = ["place_rows"]
