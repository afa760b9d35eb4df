"""Tile sizes of the projector's GPU kernels, from its shapes."""

from __future__ import annotations

from ..._targets import limits
from ..._triton import next_power_of_2


def gemm_config(rows: int, columns: int, depth: int, itemsize: int, target: int, keep: bool = False) -> dict:
    """Tile sizes of `pixel_shuffle_mlp_linear_kernel`: the largest tile that still gives most multiprocessors one.

    Three stages where two blocks then share a multiprocessor: one computes while the other is in its epilogue. Not
    where the largest tiles `keep` the sums for a backward, which takes the registers of two.
    """
    # Three tf32 products need the registers of a wider tile; 64 x 128 spills on gfx942.
    shapes = [(64, 64)] if itemsize == 4 else [(128, 128), (64, 128), (64, 64)] if target else [(128, 128), (64, 64)]
    enough = 0.75 * limits(target).multiprocessors
    for BM, BN in shapes:
        if -(-rows // BM) * -(-columns // BN) >= enough:
            break
    BK = 128 // itemsize
    while BK > 16 and 2 * depth <= BK:
        BK //= 2
    limit = limits(target).pipeline
    while BK > 16 and limit // ((BM + BN) * BK * itemsize) < 2:
        BK //= 2
    stage, large = (BM + BN) * BK * itemsize, BM * BN >= 128 * 128
    of_two = (limits(target).shared // 2 - 1024) // stage
    stages = 2 if target == 0 else max(2, min(4, limit // stage, 4 if of_two < 3 or large and keep else of_two))
    warps = 8 if large else 4
    return dict(BM=BM, BN=BN, BK=BK, GROUP=8, num_warps=warps, num_stages=stages)


IMPLICIT_TILES = {2: 2, 4: 7}  # by bytes of an element


def implicit(columns: int, config: dict, itemsize: int, target: int) -> bool:
    """Whether normalising every operand tile again costs less than writing the normalised rows once.

    Each element costs 8 to 11 instructions (float32: 5) for every column tile of the first layer, or its bytes to
    memory once. Tensor cores of Hopper and later would wait for those instructions at any number of column tiles,
    except for float32's three products.
    """
    waits = target in (90, 100) and itemsize < 4
    return not waits and -(-columns // config["BN"]) <= IMPLICIT_TILES[itemsize]


def row_config(rows: int, features: int, channels: int, itemsize: int, target: int, tensors: int) -> dict:
    """R rows a program, which share one reading of the norm's parameters; runs of RUN features stay in one patch.

    A program holds `tensors` float32 values for each element of its rows when registers allow, else of BLOCK features.
    """
    block = next_power_of_2(features)
    threads, values = min(512, max(32, block // 8)), 64  # values: a thread's
    if itemsize == 4:  # more registers a thread where parameters are shared, fewer values where they are not
        threads, values = (min(256, threads), 128) if block <= 4096 else (threads, 32)
    if block > 16384 or (target == 120 and itemsize * tensors == 8 and features == 16384):  # the latter would spill
        block, threads = 1024, 128
    r = max(1, min(8, values // tensors * threads // block, next_power_of_2(rows)))
    run = min(block, channels & -channels)
    return dict(R=r, BLOCK=block, RUN=run, num_warps=max(1, threads // (32 if target else 64)), enable_fp_fusion=True)


def slab_config(rows: int, columns: int) -> tuple[dict, int]:
    """Rows and columns of a program that sums over rows: at most 32 slabs, fixed by the shape, never by the device."""
    block = min(128, next_power_of_2(columns))
    return dict(SLAB=16 * -(-rows // (16 * 32)), BM=16, num_warps=4, enable_fp_fusion=True), block
