"""Tensor descriptors for the products of tall tiles: bulk copies (TMA) bring what lies in boxes, a thread starts each.

Hopper and Blackwell of data centres, 16-bit types. Of the products of rows in expert order both operands are described.
Those of gate and up gather rows of tokens, which only Blackwell's bulk copies do: on Hopper, only the weights are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.runtime.driver import driver

from ... import _gpu
from ..._triton import Described, describable

TALL = 128  # rows of a tile whose operands are worth a bulk copy


def gathered(
    hidden: Tensor, weights: Tensor, config: dict[str, Any], concatenated: bool, stored: str, target: int
) -> tuple[list[Any], str]:
    """The operands of gate and up, and which of them are described: "", "weights" or "all"."""
    gathers = target == 100
    pairs = None
    if _serves(weights, config, stored) and describable(target, weights, *([hidden] if gathers else [])):
        pairs = _pairs(weights, config, concatenated)
    if pairs is None:
        return [hidden, weights], ""
    return ([_matrix(hidden, 1, config["BK"]), pairs], "all") if gathers else ([hidden, pairs], "weights")


def in_order(
    rows: Tensor, weights: Tensor, config: dict[str, Any], along_k: bool, stored: str, target: int
) -> tuple[list[Any], bool]:
    """The operands of a product of rows in expert order, whole, by halves and by quarters; and whether described."""
    columns = None
    if _serves(weights, config, stored) and describable(target, rows, weights):
        columns = _columns(weights, config, along_k)
    if columns is None:
        return [rows, None, None, weights], False
    return [*(_matrix(rows, config["BM"] >> part, config["BK"]) for part in range(3)), columns], True


def persistent(slots: int, experts: int, inner: int, config: dict[str, Any]) -> bool:
    """Whether a program computes tile after tile at full height, rather than one as short as its rows.

    About 5 steps' time of a tile's beginning and end is hidden behind its neighbours, and 48 rows an expert are
    computed in vain; twice that must be won, since the estimate is one.
    """
    steps = -(-inner // config["BK"])
    return 5 * slots > 96 * experts * (steps + 5)


def _serves(weights: Tensor, config: dict[str, Any], stored: str) -> bool:
    return config["BM"] == TALL and not stored and weights.shape[0] * weights.shape[1] < 2**31


def _columns(weights: Tensor, config: dict[str, Any], along_k: bool) -> Described | None:
    """Of weights [E, N, K] (along_k) by [BN, BK], or [E, K, N] by [BK, BN]; None: a step would cross experts."""
    if not along_k and weights.shape[1] % config["BK"]:
        return None
    sides = (config["BN"], config["BK"]) if along_k else (config["BK"], config["BN"])
    return _matrix(weights.flatten(0, 1), *sides)


def _pairs(weights: Tensor, config: dict[str, Any], concatenated: bool) -> Described | None:
    """Of gates and ups: [E, 2I, H] with all gates first (concatenated), as gate, up, gate, up; or [E, H, 2I]."""
    if not concatenated:
        return _columns(weights, config | dict(BN=2 * config["BN"]), False)
    experts, twice, width = weights.shape
    half = twice // 2
    # Every row, and the one that is I rows further: for a gate's row, its up.
    shape, strides = (experts * twice - half, 2, width), (width, half * width, 1)
    found = Described(weights, shape, strides, (config["BN"], 2, config["BK"]))
    return found if _accepted(found) else None


_ACCEPTED: dict[Any, bool] = {}


def _accepted(described: Described) -> bool:
    """Whether the driver makes this tensor map: its strides do not ascend, as CUDA's documentation has them."""
    key, stand_in = described[1:], _gpu.standing()
    if key not in _ACCEPTED:
        if not described.memory.is_cuda and (stand_in is None or stand_in.kind != "idle"):
            return True
        bytes_16_bits, swizzled_128, unsigned_16_bits = 2, 3, 1
        sides = (list(side) for side in (described.block_shape, described.shape, described.strides))
        try:
            driver.active.utils.fill_tma_descriptor_tiled(
                described.data_ptr(), swizzled_128, bytes_16_bits, unsigned_16_bits, *sides, 0
            )
        except (RuntimeError, AttributeError, TypeError):  # the latter two: another Triton's driver
            _ACCEPTED[key] = False
        else:
            _ACCEPTED[key] = True
    return _ACCEPTED[key]


def _matrix(tensor: Tensor, *block: int) -> Described:
    rows, width = tensor.shape
    return Described(tensor, (rows, width), (width, 1), block)
