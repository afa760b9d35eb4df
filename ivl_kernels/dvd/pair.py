"""Both sides in processes of their own on one host, for batch work: pipes, no port, and no pickle of what is sent.

While the language side generates, the vision side encodes the next requests, at most `credits` of them: a credit is
taken before a request is encoded, and comes back when its answer has a first token.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from .features import VisualFeatures
from .language import LanguageSide
from .vision import VisionSide


class SideDied(RuntimeError):
    """The process that had a request, or would have got it, is gone.

    Attributes:
        side: "vision" or "language".
    """

    def __init__(self, side: str, what: str) -> None:
        super().__init__(f"the {side} side's process died {what}")
        self.side = side


def _send(connection: Connection, head: dict[str, Any], data: bytes | memoryview = b"") -> None:
    connection.send_bytes(b"".join([json.dumps(head).encode(), b"\n", data]))


def _receive(connection: Connection) -> tuple[dict[str, Any], memoryview]:
    blob = connection.recv_bytes()
    end = blob.index(b"\n")
    return json.loads(blob[:end]), memoryview(blob)[end + 1 :]


def _settle(threads: int, cores: Sequence[int]) -> None:
    torch.set_num_threads(threads)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _serve(connection: Connection, answer: Callable[[dict[str, Any], memoryview], None]) -> None:
    """Answer until the other end is closed; what a request raises is told to it."""
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        _send(connection, {"ready": True})
        while True:
            head, data = _receive(connection)
            try:
                answer(head, data)
            except Exception as error:
                _send(connection, {"id": head["id"], "error": f"{type(error).__name__}: {error}"})


def _vision_process(factory: Callable[[], VisionSide], connection: Connection, threads: int, cores: list[int]) -> None:
    _settle(threads, cores)
    side = factory()

    def answer(head: dict[str, Any], data: memoryview) -> None:
        images: list[Tensor] = []
        if head["images"]:
            pixels = torch.frombuffer(bytearray(data), dtype=getattr(torch, head["dtype"])).view(head["shape"])
            images = list(pixels.split(head["images"]))
        (features,) = side.encode([images], names=[str(head["id"])])
        _send(connection, {"id": head["id"]}, features.to_bytes())

    _serve(connection, answer)


class _Tokens:
    """A streamer for `generate` that sends each token; the first one says that the prompt is done with."""

    def __init__(self, connection: Connection, request: int) -> None:
        self.connection, self.request, self.prompt = connection, request, True

    def put(self, value: Tensor) -> None:
        if self.prompt:
            self.prompt = False
        else:
            _send(self.connection, {"id": self.request, "token": int(value)})

    def end(self) -> None:
        pass


def _language_process(
    factory: Callable[[], LanguageSide], connection: Connection, threads: int, cores: list[int]
) -> None:
    _settle(threads, cores)
    side = factory()

    def answer(head: dict[str, Any], data: memoryview) -> None:
        features = VisualFeatures.from_bytes(data, side.limits) if len(data) else None
        ids = torch.tensor([head["ids"]])
        streamer = _Tokens(connection, head["id"])
        output = side.generate(ids, features, streamer=streamer, **head["options"])[0].tolist()
        new = output[len(head["ids"]) :] if output[: len(head["ids"])] == head["ids"] else output
        _send(connection, {"id": head["id"], "tokens": new})

    _serve(connection, answer)


@dataclass
class _Request:
    head: dict[str, Any]
    images: list[Tensor]
    future: Future[list[int]]
    on_token: Callable[[int], None] | None
    blob: bytes | None = None
    credit: bool = False


@dataclass
class _Side:
    """A process, the end of its pipe, and the request that it has."""

    name: str
    process: Any
    connection: Connection
    request: _Request | None = None
    ready: bool = False
    dead: bool = False
    waiting: deque[_Request] = field(default_factory=deque)

    @property
    def free(self) -> bool:
        return self.ready and not self.dead and self.request is None


class Pair:
    """A vision process and a language process.

    Args:
        vision, language: make the sides, in their processes: functions of an importable module.
        credits: requests encoded, or being encoded, whose answer has no first token yet.
        threads: of torch, in each process.
        cores: to run on, of each process; empty: wherever.

    A process that dies fails the requests that it had, and those that would need it, with `SideDied`, at once; what
    the other one can still finish is finished. Nothing is tried again: make a new pair.
    """

    def __init__(
        self,
        vision: Callable[[], VisionSide],
        language: Callable[[], LanguageSide],
        *,
        credits: int = 2,
        threads: int = 1,
        cores: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> None:
        if credits < 1:
            raise ValueError(f"credits: got {credits}, expected at least 1")
        self._lock = threading.Lock()
        self._credits, self._next, self._closing = credits, 0, False
        self._most_alive = self._alive = 0
        context = multiprocessing.get_context("spawn")
        sides = []
        for name, main, factory, where in (
            ("vision", _vision_process, vision, cores[0]),
            ("language", _language_process, language, cores[1]),
        ):
            mine, theirs = context.Pipe()
            process = context.Process(target=main, args=(factory, theirs, threads, list(where)), daemon=True)
            process.start()
            theirs.close()
            sides.append(_Side(name, process, mine))
        self.vision, self.language = sides
        self._woken, self._wake = context.Pipe(duplex=False)
        self._pump = threading.Thread(target=self._run, daemon=True)
        self._pump.start()

    def submit(
        self,
        input_ids: Sequence[int],
        images: Sequence[Tensor] = (),
        *,
        on_token: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Future[list[int]]:
        """Ask; the future has the new tokens, and can be cancelled until the request is encoded.

        Args:
            input_ids: with the placeholders of all tiles.
            images: [t, 3, tile, tile] each.
            on_token: called with each token, in a thread of this object.
            options: of generate, as JSON has them.

        Raises (the future):
            SideDied: a process is gone.
            RuntimeError: what the side raised.
        """
        future: Future[list[int]] = Future()
        with self._lock:
            head = {"id": self._next, "ids": list(map(int, input_ids)), "options": options}
            self._next += 1
            if self._closing:
                raise RuntimeError("submit: the pair is closed")
            request = _Request(head, list(images), future, on_token)
            (self.vision if request.images else self.language).waiting.append(request)
        self._wake.send_bytes(b"w")
        return future

    @property
    def most_alive(self) -> int:
        """Bytes of encoded features that were alive at once, at most, between the processes."""
        return self._most_alive

    def close(self) -> None:
        """End both processes; requests that are not answered fail."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake.send_bytes(b"w")
        self._pump.join()
        for side in (self.vision, self.language):
            side.connection.close()
            side.process.join(2)
            if side.process.is_alive():
                side.process.kill()
                side.process.join()
        self._wake.close()
        self._woken.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            open_ends: list[Any] = [side.connection for side in (self.vision, self.language) if not side.dead]
            for end in wait([*open_ends, self._woken]):
                if end is self._woken:
                    self._woken.recv_bytes()
                    continue
                side = self.vision if end is self.vision.connection else self.language
                try:
                    self._take(side, *_receive(side.connection))
                except (EOFError, OSError):
                    self._bury(side)
            with self._lock:
                if self._closing:
                    break
                self._hand_out()
        with self._lock:
            for side in (self.vision, self.language):
                left = [*side.waiting, *([side.request] if side.request else [])]
                for request in left:
                    _fail(request, RuntimeError("the pair was closed before this request was answered"))

    def _hand_out(self) -> None:
        vision, language = self.vision, self.language
        for side in (vision, language):
            if side.dead and (side.waiting or (side is language and vision.waiting)):
                self._died(side)
        while vision.free and vision.waiting and self._credits:
            request = vision.waiting.popleft()
            if not request.future.set_running_or_notify_cancel():
                continue
            self._credits -= 1
            request.credit = True
            pixels = torch.cat(request.images).contiguous()
            head = {"id": request.head["id"], "images": [len(image) for image in request.images]}
            head |= {"dtype": str(pixels.dtype).removeprefix("torch."), "shape": list(pixels.shape)}
            request.images = []
            self._give(vision, request, head, memoryview(pixels.view(-1).view(torch.uint8).numpy()))
        while language.free and language.waiting:
            request = language.waiting.popleft()
            if request.blob is None and not request.future.set_running_or_notify_cancel():
                continue
            blob, request.blob = request.blob, None
            self._give(language, request, request.head, blob or b"")
            self._alive -= len(blob or b"")

    def _give(self, side: _Side, request: _Request, head: dict[str, Any], data: bytes | memoryview) -> None:
        side.request = request
        try:
            _send(side.connection, head, data)
        except OSError:
            self._died(side)

    def _take(self, side: _Side, head: dict[str, Any], data: memoryview) -> None:
        if head.get("ready"):
            side.ready = True
            return
        request = side.request
        assert request is not None and request.head["id"] == head["id"]
        if "token" in head:
            self._give_credit_back(request)
            if request.on_token is not None:
                request.on_token(head["token"])
            return
        with self._lock:
            side.request = None
            if "error" in head:
                self._give_credit_back(request)
                _fail(request, RuntimeError(f"{side.name} side: {head['error']}"))
            elif side is self.vision:
                request.blob = bytes(data)
                self._alive += len(data)
                self._most_alive = max(self._most_alive, self._alive)
                self.language.waiting.append(request)
            else:
                self._give_credit_back(request)
                request.future.set_result(head["tokens"])

    def _give_credit_back(self, request: _Request) -> None:
        if request.credit:
            request.credit = False
            self._credits += 1

    def _bury(self, side: _Side) -> None:
        with self._lock:
            self._died(side)

    def _died(self, side: _Side) -> None:
        side.dead = True
        if side.request is not None:
            self._give_credit_back(side.request)
            doing = "while it encoded this request" if side is self.vision else "while it answered this request"
            _fail(side.request, SideDied(side.name, doing))
            side.request = None
        lost = [*side.waiting]
        side.waiting.clear()
        if side is self.language:  # what is not encoded yet would wait for nobody
            lost += self.vision.waiting
            self.vision.waiting.clear()
        for request in lost:
            self._give_credit_back(request)
            _fail(request, SideDied(side.name, "before this request came to it"))


def _fail(request: _Request, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # it was cancelled
        request.future.set_exception(error)
