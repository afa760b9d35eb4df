"""Many encoders and one language side on Ray, for batch work: rows travel through the object store.

    pip install ray && python docs/examples/dvd_ray.py CHECKPOINT IMAGE...

Ray stores what it is told to, and spills to disk when that is too much: `credits` bounds what is encoded and not yet
answered. It listens on every interface, whatever address it is given: run it where nobody else can reach it. Its wire
format is cloudpickle; what the actors exchange here are the checked bytes of `VisualFeatures`.
"""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


class Encoder:
    """An actor with the vision side of a checkpoint."""

    def __init__(self, folder: str, threads: int, trust: bool) -> None:
        import torch

        import ivl_kernels

        torch.set_num_threads(threads)
        self.side = ivl_kernels.VisionSide.from_pretrained(folder, trust_remote_code=trust)
        ivl_kernels.patch(self.side.model)

    def encode(self, path: str) -> bytes:
        from ivl_kernels import imaging

        tiling = imaging.tile_image(imaging.load_image(path), tile=self.side.tile_pixels)
        weight = next(self.side.model.parameters())
        (features,) = self.side.encode([[tiling.pixel_values(weight.dtype)]], names=[os.path.basename(path)])
        return features.to_bytes()


class Answerer:
    """An actor with the language side."""

    def __init__(self, folder: str, threads: int, trust: bool) -> None:
        import torch
        from transformers import AutoTokenizer

        import ivl_kernels

        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        token = self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        self.side = ivl_kernels.LanguageSide.from_pretrained(folder, token_id=token, trust_remote_code=trust)
        ivl_kernels.patch(self.side.model)

    def answer(self, blob: bytes, question: str, tokens: int) -> tuple[str, str]:
        from ivl_kernels import VisualFeatures

        features = VisualFeatures.from_bytes(blob, self.side.limits)
        image = f"<img>{'<IMG_CONTEXT>' * self.side.tokens_a_tile * len(features.tokens)}</img>\n"
        text = f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        made = self.side.generate(ids, features, max_new_tokens=tokens, do_sample=False)[0].tolist()
        prompt = ids[0].tolist()
        new = made[len(prompt) :] if made[: len(prompt)] == prompt else made  # remote code returns no prompt
        return features.request, self.tokenizer.decode(new, skip_special_tokens=True)


def answers(
    ray: Any, encoders: list[Any], answerer: Any, paths: Iterable[str], question: str, tokens: int, credits: int
) -> Iterator[tuple[str, str]]:
    """In the order of the paths, with at most `credits` of them on their way. A reference travels, not the bytes."""
    flying: deque[Any] = deque()
    for i, path in enumerate(paths):
        if len(flying) == credits:
            yield ray.get(flying.popleft(), timeout=600)
        blob = encoders[i % len(encoders)].encode.remote(path)
        flying.append(answerer.answer.remote(blob, question, tokens))
    while flying:
        yield ray.get(flying.popleft(), timeout=600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--encoders", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--credits", type=int, default=4)
    parser.add_argument("--trust-remote-code", action="store_true")
    o = parser.parse_args()
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        cores, wanted = ray.cluster_resources()["CPU"], (o.encoders + 1) * o.threads
        if wanted > cores:  # an actor without cores would never start
            parser.error(f"--encoders, --threads: they need {wanted} cores, Ray has {cores:g}")
        encoder, answerer = (ray.remote(num_cpus=o.threads)(kind) for kind in (Encoder, Answerer))
        given = o.folder, o.threads, o.trust_remote_code
        encoders = [encoder.remote(*given) for _ in range(o.encoders)]
        last = answerer.remote(*given)
        for name, text in answers(ray, encoders, last, o.images, o.question, o.tokens, o.credits):
            print(f"{name}: {text}", flush=True)
    finally:
        ray.shutdown()  # and not `ray stop`, which ends every Ray of the machine


if __name__ == "__main__":
    main()
