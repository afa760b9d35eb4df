"""A model of the pipeline that a split InternVL is: stage times in, throughput and latency out.

    python -m bench.dvd                          # the paper's table, then what a split can give by model
    python -m bench.dvd --stages measured.json   # the same arithmetic for stage times that bench.dvd_measured wrote

Stages of a request of T tiles, k of them compressed:

    encode    v * T                      tower and projector; compression does not change it
    transfer  x0 + bytes / bandwidth     2 bytes * hidden * tokens
    prefill   a + b * tokens             a fixed share and a cost a visual token
    decode    out * (d0 / B + d1)        a step of B running requests takes d0 + d1 * B

At saturation one process serves 1 / (all of them), and a split 1 / max(encode / encoders, transfer,
(prefill + decode) / engines). The simulation adds arrivals, continuous batching, stalls of decoding, credits, the link.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Seconds: a tile, a request, a visual token, a decode step, a decode step and running request; and sizes."""

    v: float
    a: float
    b: float
    d0: float = 0.0
    d1: float = 0.0
    out: int = 1
    hidden: int = 5120
    x0: float = 0.0005
    bandwidth: float = 1.25e9  # bytes a second: 10 Gbit/s
    batch: int = 32
    full: int = 256  # tokens a tile

    def tokens(self, tiles: int, compressed: float = 0) -> float:
        return self.full * tiles - self.full * 3 / 4 * compressed

    def encode(self, tiles: int) -> float:
        return self.v * tiles

    def transfer(self, tokens: float) -> float:
        return self.x0 + 2 * self.hidden * tokens / self.bandwidth

    def prefill(self, tokens: float) -> float:
        return self.a + self.b * tokens

    def decode(self) -> float:
        return self.out * (self.d0 / self.batch + self.d1)


def whole(cost: Cost, tiles: int, compressed: float = 0) -> float:
    """Requests a second of one process at saturation."""
    return 1 / (cost.encode(tiles) + cost.prefill(cost.tokens(tiles, compressed)) + cost.decode())


def split(cost: Cost, tiles: int, compressed: float = 0, encoders: int = 1, engines: int = 1) -> float:
    """Requests a second of the two sides at saturation."""
    tokens = cost.tokens(tiles, compressed)
    language = (cost.prefill(tokens) + cost.decode()) / engines
    return 1 / max(cost.encode(tiles) / encoders, cost.transfer(tokens), language)


@dataclass(frozen=True)
class Served:
    """Requests a second, median time to the first token, median and 99 % quantile of the time a token, in seconds."""

    rate: float
    first: float
    token: float
    slow_token: float


class _Encoders:
    """The vision side of a simulation: starts a request when an encoder and a credit are free."""

    def __init__(
        self, cost: Cost, tiles: int, tokens: float, arrivals: list[float], encoders: int, credits: int
    ) -> None:
        self.encode, self.transfer, self.arrivals, self.credits = (
            cost.encode(tiles),
            cost.transfer(tokens),
            arrivals,
            credits,
        )
        self.free, self.link, self.next = [0.0] * encoders, 0.0, 0
        self.ready: list[tuple[float, int]] = []  # when its rows are at the language engine, request
        self.taken: list[float] = []  # when rows were prefilled

    def until(self, limit: float) -> None:
        while self.next < len(self.arrivals):
            start = max(self.arrivals[self.next], self.free[0])
            if self.next >= self.credits:
                if len(self.taken) <= self.next - self.credits:
                    return
                start = max(start, self.taken[self.next - self.credits])
            if start > limit:
                return
            heapq.heapreplace(self.free, start + self.encode)
            self.link = max(self.link, start + self.encode) + self.transfer
            heapq.heappush(self.ready, (self.link, self.next))
            self.next += 1


def simulate(
    cost: Cost,
    tiles: int,
    compressed: float,
    rate: float,
    *,
    apart: bool,
    encoders: int = 1,
    credits: int = 16,
    count: int = 2400,
    seed: int = 0,
) -> Served:
    """Requests that arrive at random with `rate`; one language engine, which prefills first and decodes all others.

    apart: False: the engine encodes as well, as one process does: an image goes before a token.
    """
    draw, at = random.Random(seed), 0.0
    arrivals = []
    for _ in range(count):
        at += draw.expovariate(rate)
        arrivals.append(at)
    tokens = cost.tokens(tiles, compressed)
    side = _Encoders(cost, tiles, tokens, arrivals, encoders, credits)
    waiting: deque[int] = deque()
    running: dict[int, int] = {}
    first, last = [0.0] * count, [0.0] * count
    clock, arrived, done = 0.0, 0, 0
    while done < count:
        if apart:
            side.until(clock)
            while side.ready and side.ready[0][0] <= clock:
                waiting.append(heapq.heappop(side.ready)[1])
        while not apart and arrived < count and arrivals[arrived] <= clock:
            waiting.append(arrived)
            arrived += 1
        if waiting and len(running) < cost.batch:
            i = waiting.popleft()
            clock += cost.prefill(tokens) + (0.0 if apart else cost.encode(tiles))
            side.taken.append(clock)
            first[i], running[i] = clock, cost.out - 1
        elif running:
            clock += cost.d0 + cost.d1 * len(running)
            running = {i: left - 1 for i, left in running.items()}
        elif apart:
            side.until(float("inf"))
            clock = max(clock, side.ready[0][0])
        else:
            clock = max(clock, arrivals[arrived])
        for i in [i for i, left in running.items() if left <= 0]:
            last[i] = clock
            del running[i]
            done += 1
    ends, low, high = sorted(last), count // 4, 3 * count // 4  # without filling and draining
    firsts = sorted(f - a for f, a in zip(first, arrivals))
    each = sorted((l - f) / max(1, cost.out - 1) for f, l in zip(first, last))
    served = (high - low) / (ends[high] - ends[low])
    return Served(served, firsts[count // 2], each[count // 2], each[int(count * 0.99)])


@dataclass(frozen=True)
class Published:
    """A row of table 18 of arXiv 2508.18265, requests a second: the baseline, the split, the split with ViR."""

    pixels: int
    tiles: int
    baseline: float
    apart: float
    routed: float


PAPER = {
    "38B": (
        Published(448, 1, 12.39, 14.69, 18.62),
        Published(896, 5, 2.71, 5.06, 10.97),
        Published(1344, 10, 1.48, 2.92, 5.14),
    ),
    "241B-A28B": (
        Published(448, 1, 11.29, 14.05, 20.84),
        Published(896, 5, 2.54, 4.73, 8.81),
        Published(1344, 10, 1.37, 2.75, 4.27),
    ),
}


def fitted(rows: tuple[Published, ...]) -> Cost:
    """a and b from the split at 896 and 1344 pixels, v from the baseline there: three numbers from four."""
    one, two = rows[1:]
    b = (1 / two.apart - 1 / one.apart) / (256 * (two.tiles - one.tiles))
    v = sum((1 / row.baseline - 1 / row.apart) / row.tiles for row in (one, two)) / 2
    return Cost(v=v, a=1 / one.apart - b * 256 * one.tiles, b=b, x0=0, bandwidth=1e30)


# TFLOP of the tower a tile and of the language model a token: twice the parameters at work, without attention.
FLOPS = {
    "1B": (0.68, 1.2e-3),
    "2B": (0.68, 3.4e-3),
    "8B": (0.68, 16.4e-3),
    "14B": (0.68, 29.6e-3),
    "30B-A3B": (0.68, 6.6e-3),
    "38B": (11.9, 65.6e-3),
    "241B-A28B": (11.9, 44e-3),
}
TILES, COMPRESSED, TEXT = 13, 8, 128


def by_flops(name: str) -> Cost:
    tile, token = FLOPS[name]
    return Cost(v=tile, a=TEXT * token, b=token, x0=0, bandwidth=1e30)


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def paper_table() -> Iterator[str]:
    """The published rates beside the model's, whose three numbers come from the two larger sizes without ViR."""
    rows = []
    for name, published in PAPER.items():
        cost = fitted(published)
        for row in published:
            base, apart = whole(cost, row.tiles), split(cost, row.tiles, encoders=99)
            half = split(cost, row.tiles, row.tiles * 2 / 3, encoders=99)
            share = (cost.tokens(row.tiles) - (1 / row.routed - cost.a) / cost.b) / (cost.full * 3 / 4 * row.tiles)
            needed = row.routed * cost.encode(row.tiles)
            rows.append([
                name, f"{row.pixels} ({row.tiles})", f"{row.baseline:.2f} / {base:.2f}",
                f"{row.apart / row.baseline:.2f}x / {apart / base:.2f}x", f"{row.routed / row.baseline:.2f}x",
                f"{half / base:.2f}x", f"{share:.2f}" if 0 <= share <= 1 else "does not fit", f"{needed:.1f}",
            ])  # fmt: skip
    head = ["model", "pixels (tiles)", "baseline/s, paper / model", "split, paper / model", "split + ViR, paper",
            "model, half the tokens", "share of tiles compressed that fits", "encoders of its speed"]  # fmt: skip
    return _table(head, rows)


def engine_table() -> Iterator[str]:
    """Gains from one encoder and one language engine by FLOPs, against one engine and against two."""
    rows = []
    for name in FLOPS:
        cost, row = by_flops(name), [name]
        for compressed in (0, COMPRESSED):
            encode, prefill = cost.encode(TILES), cost.prefill(cost.tokens(TILES, compressed))
            gain = split(cost, TILES, compressed) / whole(cost, TILES, compressed)
            row += [f"{encode / (encode + prefill):.0%}", f"{gain:.2f}x", f"{gain / 2:.2f}x", f"{encode / prefill:.2f}"]
        rows.append(row)
    parts = ["encoder's share", "gain", "against two copies", "encoders an engine"]
    return _table(["model", *(f"{p}, {kind}" for kind in ("plain", "Flash") for p in parts)], rows)


def latency_table() -> Iterator[str]:
    """Offered rates of a 38B-like model at 896 pixels, 64 tokens out: one process, two copies, split, split + Flash."""
    cost = replace(fitted(PAPER["38B"]), a=0.02, d0=0.02, d1=0.0003, out=64, bandwidth=1.25e9, x0=0.0005)
    rows = []
    for rate in (2.0, 4.0, 8.0):
        copies = simulate(cost, 5, 0, rate / 2, apart=False)
        for label, served in (
            ("one process", simulate(cost, 5, 0, rate, apart=False)),
            ("two copies of it", replace(copies, rate=2 * copies.rate)),
            ("split", simulate(cost, 5, 0, rate, apart=True)),
            ("split + Flash (3 of 5), two encoders", simulate(cost, 5, 3, rate, apart=True, encoders=2)),
        ):
            times = [f"{1e3 * t:.0f} ms" for t in (served.first, served.token, served.slow_token)]
            rows.append([f"{rate:g}/s", label, f"{served.rate:.2f}/s", *times])
    return _table(["offered", "how", "served", "first token, median", "a token, median", "a token, 99 %"], rows)


def measured_table(path: Path) -> Iterator[str]:
    """The same arithmetic for stage times measured on a machine, a JSON file of `Cost`'s fields, tiles, compressed."""
    found = json.loads(path.read_text())
    known = {field.name for field in fields(Cost)}
    plain, flash = (Cost(**{k: v for k, v in found[kind].items() if k in known}) for kind in ("plain", "flash"))
    tiles, compressed = found["tiles"], found["compressed"]
    rows = []
    for label, cost, small in (("plain", plain, 0), ("Flash", flash, compressed)):
        one, two = whole(cost, tiles, small), split(cost, tiles, small)
        rates = [f"{rate:.4f}/s" for rate in (one, 2 * one, two)]
        rows.append([label, *rates, f"{two / one:.2f}x", f"{two / one / 2:.2f}x"])
    return _table(["", "one process", "two copies", "split", "gain", "against two copies"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=Path, help="stage times that `python -m bench.dvd_measured --stages` wrote")
    options = parser.parse_args()
    tables = [("The paper's table", paper_table()), (f"By FLOPs, {TILES} tiles", engine_table())]
    tables += [("Latency, simulated", latency_table())]
    if options.stages:
        tables.append((f"Stage times of {options.stages.name}", measured_table(options.stages)))
    for title, table in tables:
        print(f"\n### {title}\n", *table, sep="\n")
    print(
        "\nA split gives at most 2x from two engines, and only where its stages balance; most models gain less from it"
    )
    print("than from a second copy of the whole model, which gives 2x.")


if __name__ == "__main__":
    main()
