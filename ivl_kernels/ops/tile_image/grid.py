"""Into how many tiles a photograph is cut.

Source of the rule: `dynamic_preprocess` of InternVL's model cards; transformers' GotOcr2 image processor, which
InternVL uses there, chooses the same grids.
"""

from __future__ import annotations

import functools
import math


@functools.cache
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(
    width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 12, tile: int = 448
) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect ratio is closest to the picture's.

    Among grids equally close, a larger one is taken while the picture has more than half the pixels of that grid.

    Raises:
        ValueError: sizes that are not positive, or min_tiles > max_tiles.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width, height: got {width} x {height}, expected at least 1 x 1")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles, max_tiles: got {min_tiles}, {max_tiles}, expected 1 <= min_tiles <= max_tiles")
    aspect, best, distance = width / height, (1, 1), math.inf
    for columns, rows in _grids(min_tiles, max_tiles):
        away = abs(aspect - columns / rows)
        roomy = width * height > 0.5 * tile * tile * columns * rows
        if away < distance or (away == distance and roomy):
            best, distance = (columns, rows), away
    return best
