"""The front of docs/examples against vLLM on the CPU: answers over HTTP, and everything it bounds and refuses."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("fastapi")
from ivl_kernels import VisionSide
from ivl_kernels.dvd import FeatureCache
from tests.engines import checkpoints
from tests.engines.checkpoints import OPTIONS, ROOT, TOKENS, answer_of, encoded, model_of, pictures

LONG = 3000  # tokens that take this engine many seconds


class Gated:
    """An engine whose answers begin when the gate is open."""

    def __init__(self, engine):
        self.inner, self.gate = engine, asyncio.Event()
        self.gate.set()

    async def stream(self, *args):
        await self.gate.wait()
        async with contextlib.aclosing(self.inner.stream(*args)) as pieces:
            async for piece in pieces:
                yield piece


class Server:
    """The front in a thread of its own, as `main` runs it in a process."""

    def __init__(self, folder):
        self.folder, self.failed, self.port = folder, None, 0
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(300) and self.port, self.failed

    def _run(self):
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self.failed = error
        self._ready.set()

    async def _serve(self):
        import uvicorn

        module = checkpoints.example("dvd_front")
        engine = module.VLLM(str(self.folder), **OPTIONS)
        self.rules = module.Rules(tiles=6, pixels=1 << 20, all_tiles=15, body=1 << 20, queue=2, seconds=60)
        side = VisionSide(model_of(self.folder), cache=FeatureCache())
        self.engine = Gated(engine)
        options = dict(template=checkpoints.TEMPLATE, placeholder="<IMG_CONTEXT> w5")
        self.front = module.Front(side, self.engine, self.rules, **options)
        config = uvicorn.Config(module.app_of(self.front), host="127.0.0.1", port=0, log_level="error")
        server = uvicorn.Server(config)
        self.loop = asyncio.get_running_loop()
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.05)
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self._ready.set()
        while not self._stop.is_set():
            await asyncio.sleep(0.05)
        server.should_exit = True
        await task
        engine.engine.shutdown()

    def close(self):
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    @contextlib.contextmanager
    def changed(self, gate=True, **rules):
        """Other rules and perhaps a closed gate, for a while."""
        self.front.rules = replace(self.rules, **rules)
        if not gate:
            self.loop.call_soon_threadsafe(self.engine.gate.clear)
        try:
            yield
        finally:
            self.open()
            self.front.rules = self.rules

    def open(self):
        self.loop.call_soon_threadsafe(self.engine.gate.set)

    def metric(self, name, **labels):
        return self.front.metrics.registry.get_sample_value(name, labels) or 0.0

    def ended(self):
        return {end: self.metric("ivl_requests_total", end=end)
                for end in ("answered", "busy", "cancelled", "failed", "late", "refused")}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.save(tmp_path_factory.mktemp("front"), "native")


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture
def counted(server):
    """What the counters have risen by."""
    before = server.ended()

    def risen():
        return {end: int(count - before[end]) for end, count in server.ended().items() if count > before[end]}

    return risen


def eventually(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def request_of(images=(), prompt="w3 w4", tokens=TOKENS, **more):
    return {"prompt": prompt, "images": list(map(encoded, images)), "max_tokens": tokens, **more}


@contextlib.contextmanager
def streamed(server, body):
    """A response whose lines are read one by one."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        connection.request("POST", "/v1/answer", json.dumps(body), {"Content-Type": "application/json"})
        yield connection.getresponse()
    finally:
        connection.close()


def events(response):
    for line in response:
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()


def post(server, body):
    """The words of an answer, in as many events as it came in."""
    with streamed(server, body) as response:
        text = response.read().decode()
        if response.status != 200:
            raise urllib.error.HTTPError("", response.status, text, None, None)
        lines = [line[6:] for line in text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line)["text"] for line in lines[:-1]]


def expected(folder, images, prompt="w3 w4"):
    from transformers import AutoTokenizer

    tokens = answer_of(model_of(folder), images, prompt)
    return AutoTokenizer.from_pretrained(folder).decode(tokens, skip_special_tokens=True).split()


def test_streams_the_whole_models_answer(server, folder, counted):
    for images in ([pictures()[1]], pictures()[1:], []):
        pieces = post(server, request_of(images))
        assert "".join(pieces).split() == expected(folder, images)
        assert len(pieces) > TOKENS // 2, "an answer comes in pieces"
    assert counted() == {"answered": 3}
    assert server.metric("ivl_tiles_total", tokens="4") and server.metric("ivl_tiles_total", tokens="16")
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30).read().decode()
    for name in ('ivl_requests_total{end="answered"}', "ivl_row_bytes_total", "ivl_waiting 0.0",
                 'ivl_seconds_count{stage="first"}'):  # fmt: skip
        assert name in text


def test_a_picture_is_encoded_once(server, folder):
    cache = server.front.vision.cache
    post(server, request_of(pictures()[2:]))
    hits = cache.hits
    assert "".join(post(server, request_of(pictures()[2:]))).split() == expected(folder, pictures()[2:])
    assert cache.hits == hits + 1


@pytest.mark.parametrize(
    "body, status, text",
    [
        (request_of(image_embeds="AAAA"), 400, "image_embeds"),
        (request_of(multi_modal_data={"image": "AAAA"}), 400, "multi_modal_data"),
        ({"prompt": "w3", "images": ["AAAA"]}, 400, "not a picture"),
        ({"prompt": "w3", "images": ["?"]}, 400, "not a picture"),
        ({"prompt": "w3", "images": [{"image_embeds": "AAAA"}]}, 400, "images.0"),
        ({"prompt": "w3", "images": ["AAAA"] * 9}, 400, "images"),
        ({"images": []}, 400, "prompt"),
        (request_of(prompt="w3 <IMG_CONTEXT> w4"), 400, "prompt: may not have <IMG_CONTEXT>"),
        (request_of(prompt="<|im_end|>"), 400, "prompt: may not have <|im_end|>"),
        (request_of(prompt="w3 " * 5000), 400, "prompt"),
        (request_of(pictures()[:1], tokens=5000), 400, "max_tokens"),
        (request_of([pictures()[1].convert("1").resize((1025, 1024))]), 413, "1025 x 1024, at most 1048576 pixels"),
        (request_of(pictures()[1:] + pictures()[2:]), 413, "17 tiles, at most 15"),
        (request_of(prompt="x" * (1 << 20)), 413, "body: over 1048576 bytes"),
    ],
)  # fmt: skip
def test_refused(server, counted, body, status, text):
    encodings = server.metric("ivl_seconds_count", stage="encode")
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, body)
    assert caught.value.code == status and text in caught.value.msg
    assert counted() == {"refused": 1}
    assert server.metric("ivl_seconds_count", stage="encode") == encodings, "refused before anything is encoded"


def test_too_long_for_the_engine(server, counted):
    """What only the engine knows is a refusal too, and its credit comes back."""
    for _ in range(3):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server, request_of(pictures()[:1], prompt="w3 " * 4100))
        assert caught.value.code == 400
    assert counted() == {"refused": 3} and server.front.credits._value == server.rules.credits


def test_credits(server, folder, counted):
    """Two are encoded while no answer has begun, two wait, and the fifth is sent away."""
    encodings = server.metric("ivl_seconds_count", stage="encode")
    with server.changed(gate=False), ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(post, server, request_of([picture])) for picture in (*pictures(), pictures()[0])]
        eventually(lambda: server.metric("ivl_waiting") == 2)
        eventually(lambda: server.metric("ivl_seconds_count", stage="encode") == encodings + 2)
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server, request_of())
        assert caught.value.code == 429
        time.sleep(0.5)
        assert server.metric("ivl_seconds_count", stage="encode") == encodings + 2
        server.open()
        for answer, picture in zip(answers, (*pictures(), pictures()[0])):
            assert "".join(answer.result(60)).split() == expected(folder, [picture])
    assert counted() == {"answered": 4, "busy": 1}


def running(server):
    """Requests that vLLM's engine still had when its last one ended."""
    from prometheus_client import REGISTRY

    post(server, request_of(tokens=2))
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    found = [s.value for m in REGISTRY.collect() for s in m.samples if s.name in names]
    assert found, "vLLM has other names for its metrics"
    return sum(found)


def test_cancelled_while_it_is_written(server, counted):
    with streamed(server, request_of(pictures()[:1], tokens=LONG)) as response:
        lines = events(response)
        assert all("text" in json.loads(next(lines)) for _ in range(3))
        assert running(server) == 1, "the case must have one to cancel"
        response.fp.raw._sock.shutdown(socket.SHUT_RDWR)
    eventually(lambda: counted() == {"answered": 1, "cancelled": 1})
    eventually(lambda: running(server) == 0)


def test_cancelled_while_it_waits(server, counted):
    """A client that leaves has no place in the queue, and its picture is not encoded."""
    encodings = server.metric("ivl_seconds_count", stage="encode")
    with server.changed(gate=False):
        clients = []
        for count in range(1, 5):
            client = socket.create_connection(("127.0.0.1", server.port))
            body = json.dumps(request_of(pictures()[:1])).encode()
            head = f"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            clients.append(client)
            if count > 2:
                eventually(lambda: server.metric("ivl_waiting") == count - 2)  # noqa: B023
        eventually(lambda: server.metric("ivl_seconds_count", stage="encode") == encodings + 2)
        for client in reversed(clients):
            client.close()
        eventually(lambda: counted() == {"cancelled": 4})
        assert server.metric("ivl_waiting") == 0
        assert server.metric("ivl_seconds_count", stage="encode") == encodings + 2
        assert server.front.credits._value == server.rules.credits


def test_deadline(server, folder, counted):
    with server.changed(gate=False, seconds=0.5):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server, request_of(pictures()[:1]))
        assert caught.value.code == 504
    with server.changed(seconds=2), streamed(server, request_of(pictures()[:1], tokens=LONG)) as response:
        *pieces, last = map(json.loads, events(response))
        assert all("text" in piece for piece in pieces) and len(pieces) > 5
        assert last == {"error": "no answer within 2 s"}
    assert counted() == {"late": 2}
    eventually(lambda: running(server) == 0)
    assert "".join(post(server, request_of(pictures()[:1]))).split() == expected(folder, pictures()[:1])


def listening(port):
    """Addresses on which a port of this machine is listened to, as Linux writes them."""
    found = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{name}") as file:
            rows = [line.split() for line in file.readlines()[1:]]
            found += [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    return found


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads Linux's /proc")
def test_the_script(tmp_path):
    """As its first lines say: the command, a request, a picture of a file; a checkpoint that brings its own code."""
    from transformers import AutoTokenizer

    folder = checkpoints.save(tmp_path / "chat", "chat")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "docs/examples/dvd_front.py", str(folder), "--trust-remote-code", "--port", str(port)]
    environment = checkpoints.environment()
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    process = subprocess.Popen(
        [*command, "--vllm", json.dumps(OPTIONS)], cwd=ROOT, env=environment, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    try:
        eventually(lambda: process.poll() is not None or listening(port), 300)
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert listening(port) == ["0100007F"], "the loopback address alone"
        body = json.dumps(request_of(pictures()[1:2])).encode()
        url = f"http://127.0.0.1:{port}/v1/answer"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            *pieces, last = events(response)
        assert last == "[DONE]"
        model, tokenizer = model_of(folder), AutoTokenizer.from_pretrained(folder)
        from ivl_kernels.imaging import tile_image

        tiles = tile_image(pictures()[1], max_tiles=12, tile=64).pixel_values()
        marks = f"<img>{'<IMG_CONTEXT>' * 256 * len(tiles)}</img>\n"
        text = f"<|im_start|>user\n{marks}w3 w4<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        made = model.generate(
            input_ids=ids, pixel_values=tiles, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS,
            do_sample=False,
        )[0]  # fmt: skip
        want = tokenizer.decode(made, skip_special_tokens=True).split()
        assert "".join(json.loads(piece)["text"] for piece in pieces).split() == want
        process.send_signal(signal.SIGINT)
        assert process.wait(60) is not None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
