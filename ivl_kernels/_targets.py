"""What is known of the GPUs that kernels are compiled for: one table, read by kernels, build, tests and counters.

A target is named by its compute capability without the dot, 80 for 8.0, and AMD's gfx942 by 0. Imports nothing of the
package, so that the build can read it.

Source: CUDA C++ programming guide, technical specifications per compute capability; AMD CDNA 3 white paper.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Limits of a kind of GPU.

    Attributes:
        capability: its name, see above.
        multiprocessors: of the largest chip of the kind.
        threads: resident on a multiprocessor.
        shared: bytes of shared memory on a multiprocessor.
        shared_block: of them, what one block can have.
        blocks: resident on a multiprocessor.
        pipeline: of `shared_block`, what our software pipelines use.
        large: a block can have enough shared memory for deep steps of large tiles.
    """

    capability: int
    multiprocessors: int
    threads: int
    shared: int
    shared_block: int
    blocks: int
    pipeline: int
    large: bool


_KIB = 1024
TARGETS = {
    target.capability: target
    for target in (
        Target(0, 304, 2048, 64 * _KIB, 64 * _KIB, 32, 60_000, True),
        Target(80, 108, 2048, 164 * _KIB, 163 * _KIB, 32, 160_000, True),
        Target(86, 108, 1536, 100 * _KIB, 99 * _KIB, 16, 96_000, False),
        Target(89, 108, 1536, 100 * _KIB, 99 * _KIB, 24, 96_000, False),
        Target(90, 132, 2048, 228 * _KIB, 227 * _KIB, 32, 220_000, True),
        Target(100, 148, 2048, 228 * _KIB, 227 * _KIB, 32, 220_000, True),
        Target(120, 170, 1536, 100 * _KIB, 99 * _KIB, 24, 96_000, False),
    )
}
NVIDIA = tuple(capability for capability in TARGETS if capability)


@functools.cache
def limits(capability: int) -> Target:
    """The table's row for a GPU: its own, else that of its family's nearest older member, else the smallest."""
    older = [c for c in NVIDIA if c // 10 == capability // 10 and c <= capability]
    if capability in TARGETS or not capability:
        return TARGETS[capability]
    return TARGETS[max(older)] if older else TARGETS[120]
