"""A front for Flash on vLLM: pixels and text in, a streamed answer out; the encoder and the engine in one process.

    pip install fastapi uvicorn prometheus-client vllm
    python docs/examples/dvd_front.py CHECKPOINT  # --trust-remote-code where it brings its own code

    (printf '{"prompt": "What is this?", "images": ["'; base64 -w0 photo.jpg; printf '"]}') |
        curl -N 127.0.0.1:8080/v1/answer --data-binary @-

vLLM loads the language model alone and takes the router's rows as `image_embeds`, whose number it does not know before.
This package's plugin must be on: vLLM's own classes refuse a checkpoint that has a router.
Those are for trusted callers, so this is the only door: a client sends pictures, and a request with anything else in it
is refused, as are the marks of pictures and roles in its text. One door, one machine, no authentication: it binds the
loopback address.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ivl_kernels.dvd import VisionSide, VisualFeatures, content_key
from ivl_kernels.imaging import ImageError, to_rgb
from ivl_kernels.imaging import tile_image as tiling_of

TEMPLATE = "<|im_start|>user\n{images}{prompt}<|im_end|>\n<|im_start|>assistant\n"
MARKS = ("<IMG_CONTEXT>", "<image>", "<video>", "<img>", "</img>", "<|im_start|>", "<|im_end|>")
PLACEHOLDERS = {"internvl": "<IMG_CONTEXT>", "internvl_chat": "<image>"}  # vLLM's, by model_type


class Ask(BaseModel):
    """What a client may send, and nothing else: no embeddings."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(max_length=20_000)
    images: list[str] = Field(default=[], max_length=8)
    max_tokens: int = Field(default=256, ge=1, le=4096)


@dataclass(frozen=True)
class Rules:
    """Limits of a request, and of what is on its way."""

    body: int = 32 << 20  # bytes
    pixels: int = 40_000_000  # of a picture
    tiles: int = 12  # of a picture
    all_tiles: int = 39  # of a request
    credits: int = 2  # encoded, without a first token yet
    queue: int = 16  # waiting for a credit
    seconds: float = 120  # for a request, all in all


class Engine(Protocol):
    """Prompt and rows of each image to pieces of text; closing the iterator ends the generation.

    Raises:
        ValueError: what the engine cannot take.
    """

    def stream(self, prompt: str, images: Sequence[torch.Tensor], tokens: int, name: str) -> AsyncIterator[str]: ...


class VLLM:
    """vLLM in this process: rows are handed over as tensors, not as base64 in JSON."""

    def __init__(self, folder: str, **options: Any) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = AsyncEngineArgs(
            model=folder,
            enable_mm_embeds=True,
            limit_mm_per_prompt={"image": 0, "video": 0},  # no tower
            **options,
        )
        self.engine = AsyncLLM.from_engine_args(args)
        self._aborts: set[asyncio.Task[None]] = set()

    async def stream(self, prompt: str, images: Sequence[torch.Tensor], tokens: int, name: str) -> AsyncIterator[str]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(temperature=0, max_tokens=tokens, output_kind=RequestOutputKind.DELTA)
        given: dict[str, Any] = {"prompt": prompt}
        if images:
            given["multi_modal_data"] = {"image": list(images)}
        finished = False
        try:
            async for output in self.engine.generate(given, sampling, name):
                finished = output.finished
                yield output.outputs[0].text
        except VLLMClientError as error:  # such as a prompt that is too long
            raise ValueError(str(error)) from error
        finally:
            if not finished:  # in a task of its own: this one may be cancelled at each await
                task = asyncio.create_task(self.engine.abort(name))
                self._aborts.add(task)
                task.add_done_callback(self._aborts.discard)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("ivl_requests", "requests by how they ended", ["end"], registry=self.registry)
        self.tiles = Counter("ivl_tiles", "tiles encoded", ["tokens"], registry=self.registry)
        self.bytes = Counter("ivl_row_bytes", "bytes of rows handed to the engine", registry=self.registry)
        self.seconds = Histogram("ivl_seconds", "seconds of a request's stages", ["stage"], registry=self.registry)
        self.waiting = Gauge("ivl_waiting", "requests without a credit", registry=self.registry)


def tiles_of(text: str, rules: Rules, dtype: torch.dtype, side: int) -> tuple[torch.Tensor, str]:
    """The tiles of a picture in base64, and the key of its content. Its size is known before it is decoded."""
    from PIL import Image, ImageOps

    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > rules.pixels:
                raise HTTPException(413, f"images: {opened.width} x {opened.height}, at most {rules.pixels} pixels")
            image = to_rgb(ImageOps.exif_transpose(opened))
    except (ImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"images: not a picture ({str(error)[:100]})") from None
    tiling = tiling_of(image, max_tiles=rules.tiles, tile=side)
    return tiling.pixel_values(dtype), content_key(data, max_tiles=rules.tiles)


class Front:
    """The path of a request: picture -> tiles -> credit -> rows -> engine -> text."""

    def __init__(
        self,
        vision: VisionSide,
        engine: Engine,
        rules: Rules,
        *,
        template: str = TEMPLATE,
        placeholder: str = "<image>",
    ) -> None:
        self.vision, self.engine, self.rules = vision, engine, rules
        self.template, self.placeholder = template, placeholder
        self.metrics = Metrics()
        self.credits = asyncio.Semaphore(rules.credits)
        self.encoder = ThreadPoolExecutor(1)  # one pass at a time, off the event loop
        self.waiting = 0

    def parse(self, body: bytes) -> Ask:
        """What a client may send, and nothing else."""
        try:
            ask = Ask.model_validate_json(body)
        except ValidationError as error:
            raise HTTPException(400, [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]) from None
        found = [mark for mark in (self.placeholder, *MARKS) if mark in ask.prompt]
        if found:
            raise HTTPException(400, f"prompt: may not have {found[0]} in it")
        return ask

    async def _timed(self, stage: str, function: Any, *args: Any) -> Any:
        with self.metrics.seconds.labels(stage).time():
            return await asyncio.get_running_loop().run_in_executor(self.encoder, function, *args)

    def _cut(self, ask: Ask) -> list[tuple[torch.Tensor, str]]:
        weight = next(self.vision.model.parameters())
        found = [tiles_of(text, self.rules, weight.dtype, self.vision.tile_pixels) for text in ask.images]
        count = sum(len(tiles) for tiles, _ in found)
        if count > self.rules.all_tiles:
            raise HTTPException(413, f"images: {count} tiles, at most {self.rules.all_tiles}")
        return found

    def _encode(self, images: list[tuple[torch.Tensor, str]], name: str) -> VisualFeatures:
        tiles, keys = [t for t, _ in images], [k for _, k in images]
        keyed = {"keys": [keys]} if self.vision.cache is not None else {}
        (features,) = self.vision.encode([tiles], names=[name], **keyed)
        return features

    async def _rows(self, ask: Ask, name: str) -> list[torch.Tensor]:
        features = await self._timed("encode", self._encode, await self._timed("cut", self._cut, ask), name)
        for tokens in features.tokens:
            self.metrics.tiles.labels(str(tokens)).inc()
        self.metrics.bytes.inc(features.rows.nbytes)
        return features.images()

    async def answer(self, ask: Ask) -> AsyncIterator[str]:
        """Pieces of text. What is wrong with a request is raised before the first one."""
        if self.waiting >= self.rules.queue:
            self.metrics.requests.labels("busy").inc()
            raise HTTPException(429, "busy")
        name, start, held, end = uuid.uuid4().hex, time.monotonic(), False, "cancelled"
        deadline = start + self.rules.seconds
        try:
            async with asyncio.timeout(self.rules.seconds):
                self.waiting += 1
                self.metrics.waiting.set(self.waiting)
                try:
                    await self.credits.acquire()
                    held = True
                finally:
                    self.waiting -= 1
                    self.metrics.waiting.set(self.waiting)
                self.metrics.seconds.labels("credit").observe(time.monotonic() - start)
                rows = await self._rows(ask, name) if ask.images else []
            marks = f"{self.placeholder}\n" * len(rows)
            prompt = self.template.format(images=marks, prompt=ask.prompt)
            pieces = self.engine.stream(prompt, rows, ask.max_tokens, name)
            try:
                while True:
                    async with asyncio.timeout(deadline - time.monotonic()):
                        piece = await anext(pieces)
                    if held:  # the prompt is done with: the next request may be encoded
                        held = False
                        self.credits.release()
                        self.metrics.seconds.labels("first").observe(time.monotonic() - start)
                    yield piece
            except StopAsyncIteration:
                end = "answered"
            finally:
                await pieces.aclose()  # type: ignore[attr-defined]
        except TimeoutError:
            end = "late"
            raise HTTPException(504, f"no answer within {self.rules.seconds:g} s") from None
        except HTTPException:
            end = "refused"
            raise
        except ValueError as error:  # the engine's, of what it cannot take
            end = "refused"
            raise HTTPException(400, str(error)[:300]) from None
        except Exception:
            end = "failed"
            raise
        finally:
            if held:
                self.credits.release()
            self.metrics.requests.labels(end).inc()
            self.metrics.seconds.labels("all").observe(time.monotonic() - start)


async def body_of(request: Request, most: int) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise HTTPException(413, f"body: over {most} bytes")
    return bytes(data)


async def first_of(pieces: AsyncIterator[str], request: Request) -> str | None:
    """The first piece, "" where there is none, or None where the client leaves before it: nobody waits for it then."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def first() -> str:
        return await anext(pieces, "")

    tasks = [asyncio.create_task(first()), asyncio.create_task(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
    return None if tasks[0].cancelled() else tasks[0].result()


def app_of(front: Front) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/answer")
    async def answer(request: Request) -> Response:
        try:
            ask = front.parse(await body_of(request, front.rules.body))
        except HTTPException:
            front.metrics.requests.labels("refused").inc()
            raise
        pieces = front.answer(ask)
        first = await first_of(pieces, request)  # what is refused is refused with a status
        if first is None:
            return Response(status_code=499)  # nobody reads it

        async def lines() -> AsyncIterator[str]:
            try:
                yield f"data: {json.dumps({'text': first})}\n\n"
                async for piece in pieces:
                    yield f"data: {json.dumps({'text': piece})}\n\n"
                yield "data: [DONE]\n\n"
            except HTTPException as error:
                yield f"data: {json.dumps({'error': error.detail})}\n\n"
            finally:
                await pieces.aclose()  # type: ignore[attr-defined]

        return StreamingResponse(lines(), media_type="text/event-stream")

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(front.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vllm", type=json.loads, default={}, metavar="JSON", help="options of its AsyncEngineArgs")
    parser.add_argument("--trust-remote-code", action="store_true")
    o = parser.parse_args()
    import uvicorn

    import ivl_kernels
    from ivl_kernels.dvd import FeatureCache

    trust = {"trust_remote_code": o.trust_remote_code}
    vision = VisionSide.from_pretrained(o.folder, device=o.device, cache=FeatureCache(), **trust)
    ivl_kernels.patch(vision.model)
    engine = VLLM(o.folder, **trust, **o.vllm)
    front = Front(vision, engine, Rules(), placeholder=PLACEHOLDERS[vision.model.config.model_type])
    try:
        uvicorn.run(app_of(front), host="127.0.0.1", port=o.port)
    finally:
        engine.engine.shutdown()


if __name__ == "__main__":
    main()
