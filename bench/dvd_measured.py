"""What a split does on this machine: gaps between tokens while pictures are encoded, the hop, and the stages' times.

    python -m bench.dvd_measured                      # gaps and hop
    python -m bench.dvd_measured --stages stages.json  # times for `python -m bench.dvd --stages`

The model is random, of a few layers at 448 pixels a tile. Gaps: an answer is being written while requests of 13 tiles
are encoded, by the same thread between its tokens, by a second thread of the same process, and by a process of its own,
with one core for each process.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import ivl_kernels
from bench.dvd import Cost
from bench.measure import quantile
from ivl_kernels.dvd import LanguageSide, VisionSide, VisualFeatures
from ivl_kernels.dvd.pair import Pair
from ivl_kernels.testing import tiny

TILES, TOKENS, TOKEN = 13, 160, tiny.IMAGE_TOKEN


@functools.cache
def model() -> Any:
    text = tiny.text_config(
        hidden_size=512, num_hidden_layers=6, num_attention_heads=8, head_dim=64, intermediate_size=1536
    )
    vision = tiny.vision_config(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, image_size=(448, 448),
        patch_size=(14, 14),
    )  # fmt: skip
    made = tiny.native_model(text=text, vision=vision)
    ivl_kernels.patch(made)
    return made


def vision_side() -> VisionSide:
    return VisionSide(model(), fingerprint="bench")


def language_side() -> LanguageSide:
    torch.set_grad_enabled(False)
    return LanguageSide(model(), fingerprint="bench")


class Clock:
    """A streamer that notes when each token came, and may do something after each."""

    def __init__(self, after: Callable[[int], None] = lambda count: None) -> None:
        self.times: list[float] = []
        self.after = after

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        self.after(len(self.times))

    def end(self) -> None:
        pass

    @property
    def gaps(self) -> list[float]:
        times = self.times[2:]  # the prompt, the first token
        return [1e3 * (b - a) for a, b in zip(times, times[1:])]


PROMPT = list(range(1, 65))


def generate(side: LanguageSide, clock: Clock) -> list[float]:
    ids = torch.tensor([PROMPT])
    side.generate(ids, streamer=clock, max_new_tokens=TOKENS, do_sample=False)
    return clock.gaps


def one_thread(vision: VisionSide, language: LanguageSide, tiles: torch.Tensor) -> list[float]:
    def after(count: int) -> None:
        if count % 50 == 25:
            vision.encode([[tiles]])

    return generate(language, Clock(after))


def two_threads(vision: VisionSide, language: LanguageSide, tiles: torch.Tensor) -> list[float]:
    stop = threading.Event()

    def encode() -> None:
        while not stop.is_set():
            vision.encode([[tiles]])

    thread = threading.Thread(target=encode)
    thread.start()
    try:
        return generate(language, Clock())
    finally:
        stop.set()
        thread.join()


def two_processes(tiles: torch.Tensor) -> list[float]:
    cores = sorted(os.sched_getaffinity(0))
    where = ((cores[0],), (cores[-1],)) if len(cores) > 1 else ((), ())
    clock = Clock()
    with Pair(vision_side, language_side, credits=64, cores=where) as pair:
        pair.submit(PROMPT, max_new_tokens=2).result(120)
        image = [*PROMPT[:4], *[TOKEN] * (TILES * 256), 5]
        pair.submit(image, [tiles], max_new_tokens=1).result(120)
        clock.put(None)
        answer = pair.submit(PROMPT, on_token=clock.put, max_new_tokens=TOKENS, do_sample=False)
        others = [pair.submit(image, [tiles], max_new_tokens=1) for _ in range(8)]
        answer.result(200)
        for other in others:
            other.cancel()
    return clock.gaps


def gaps() -> None:
    vision, language = vision_side(), language_side()
    tiles = torch.randn(TILES, 3, 448, 448)
    vision.encode([[tiles]])
    found = {
        "nothing encoded": generate(language, Clock()),
        "one thread": one_thread(vision, language, tiles),
        "two threads": two_threads(vision, language, tiles),
        "two processes, a core each": two_processes(tiles),
    }
    apart = quantile(found["two processes, a core each"], 0.99)
    print(f"\n| {TILES} tiles are encoded by | gap, median | gap, 99 % | 99 % over that of two processes |")
    print("| --- | --- | --- | --- |")
    for name, values in found.items():
        slow = quantile(values, 0.99)
        print(f"| {name} | {statistics.median(values):.1f} ms | {slow:.1f} ms | {slow / apart:.2f} |")


def best(function: Callable[[], Any], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def prefill(tokens: int) -> Callable[[], Any]:
    embeds = torch.randn(1, tokens, 512)
    return lambda: model()(inputs_embeds=embeds, logits_to_keep=1)


def hop() -> None:
    """The message of 7 tiles, 3.67 MB, beside the two stages that it is between, of the model above."""
    vision, tiles = vision_side(), torch.randn(7, 3, 448, 448)
    (sent,) = vision.encode([[tiles]])
    blob = sent.to_bytes()
    assert torch.equal(VisualFeatures.from_bytes(blob).rows, sent.rows)
    times: dict[str, list[float]] = {"to bytes": [], "from bytes": []}
    for _ in range(50):
        for name, function in (("to bytes", sent.to_bytes), ("from bytes", lambda: VisualFeatures.from_bytes(blob))):
            start = time.process_time()
            function()
            times[name].append(1e3 * (time.process_time() - start))
    with torch.no_grad():
        one, two = 1e3 * best(lambda: vision.encode([[tiles]])), 1e3 * best(prefill(len(sent.rows) + len(PROMPT)))
    both = sum(map(statistics.median, times.values()))
    text = ", ".join(f"{name} {statistics.median(values):.2f} ms" for name, values in times.items())
    print(f"hop of {sent.rows.nbytes / 1e6:.2f} MB, CPU time: {text}; encoded in {one:.0f} ms, prefilled in ", end="")
    print(f"{two:.0f} ms: {both / min(one, two):.2%} of the shorter stage")


def stages(path: Path) -> None:
    """v, a, b and d1 of the model above; Flash has the same costs, with fewer tokens."""
    vision, language = vision_side(), language_side()
    tiles = torch.randn(4, 3, 448, 448)
    v = best(lambda: vision.encode([[tiles]])) / 4
    short, long = best(prefill(64)), best(prefill(64 + 1024))
    ids = torch.tensor([PROMPT])
    one, more = (best(lambda n=n: language.generate(ids, max_new_tokens=n, do_sample=False)) for n in (1, 33))  # type: ignore[misc]
    b = (long - short) / 1024
    cost = asdict(Cost(v=v, a=short, b=b, d1=(more - one) / 32, out=32, hidden=512, batch=1))
    path.write_text(json.dumps({"plain": cost, "flash": cost, "tiles": TILES, "compressed": 8}, indent=1))
    print(f"a tile {1e3 * v:.0f} ms, prompt {1e3 * short:.1f} ms, a visual token {1e6 * b:.0f} us, ", end="")
    print(f"a token {1e3 * cost['d1']:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load average {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
    if options.stages:
        stages(options.stages)
    else:
        hop()
        gaps()


if __name__ == "__main__":
    main()
