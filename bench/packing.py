"""How full rows are, and how fast samples find theirs: `python -m bench.packing [SAMPLES]`.

A mix of text, photographs, several images, documents and videos at 256 tokens a tile; only sizes, no tensors.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from ivl_kernels.packing import Limits, Mixture, PackedStream


def sizes_of(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """(tokens, tiles) of each sample of the mix."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(5, count, p=[0.35, 0.35, 0.15, 0.1, 0.05])
    mean, spread = np.array([6.3, 5.0, 5.8, 6.5, 6.0])[kind], np.array([1.0, 0.8, 0.9, 0.9, 0.8])[kind]
    text = np.minimum(np.exp(rng.normal(mean, spread)).astype(int) + 16, 16000)
    low, high = np.array([0, 1, 1, 2, 8])[kind], np.array([1, 8, 14, 25, 49])[kind]
    tiles = rng.integers(low, high)
    return list(zip((text + 256 * tiles).tolist(), tiles.tolist()))


def main(count: int) -> None:
    sizes = sizes_of(count)
    for limits in (Limits(), Limits(16384, 48), Limits(32768, 128)):
        fits = [i for i, (tokens, tiles) in enumerate(sizes) if tokens <= limits.tokens and tiles <= limits.tiles]
        # Four data sets, drawn by their lengths.
        stream = PackedStream(Mixture([fits[i::4] for i in range(4)]), limits, size=sizes.__getitem__)
        clock = time.perf_counter()
        rows = list(stream)
        seconds = time.perf_counter() - clock
        packed = sorted(i for row in rows for i in row)
        assert packed == fits, "a sample was lost or repeated"
        tokens, tiles = (sum(sizes[i][which] for i in fits) for which in (0, 1))
        print(
            f"{limits.tokens} tokens, {limits.tiles} tiles a row: {len(fits)} samples in {len(rows)} rows, "
            f"{tokens / len(rows) / limits.tokens:.4f} of the tokens and {tiles / len(rows) / limits.tiles:.4f} of the "
            f"tiles used, {len(fits) / seconds:,.0f} samples/s, none lost or repeated"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
