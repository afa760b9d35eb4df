"""Features to bytes and back, and everything that is not such a message."""

import json
import random
import struct
import time
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from ivl_kernels.dvd import Limits, MessageError, VisualFeatures, features

REASONS = {"size", "header", "version", "dtype", "shape", "tokens", "limit", "width", "finite", "fingerprint"}
LIMITS = Limits(size=1 << 16, header=4096, rows=160, tiles=10, width=8, tokens=(16, 4), fingerprint="f" * 64)


def message(tokens=(16, 4, 16), tiles=(2, 1), dtype=torch.bfloat16, scores=True):
    rows = torch.randn(sum(tokens), 8).to(dtype)
    values = torch.rand(len(tokens)) if scores else None
    return VisualFeatures(rows, tokens, tiles, values, "f" * 64, "request 7")


def taken_apart(blob):
    (length,) = struct.unpack("<Q", blob[:8])
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def put_together(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@given(
    tiles=st.lists(st.integers(1, 3), max_size=4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    width=st.integers(0, 9), scores=st.booleans(), request=st.text(max_size=40), seed=st.integers(0, 99),
)  # fmt: skip
def test_there_and_back(tiles, dtype, width, scores, request, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = tuple(torch.where(torch.rand(sum(tiles), generator=generator) < 0.5, 4, 16).tolist())
    rows = torch.randn(sum(tokens), width, generator=generator).to(dtype)
    sent = VisualFeatures(rows, tokens, tuple(tiles), torch.rand(len(tokens)) if scores else None, "f", request)
    blob = sent.to_bytes()
    for form in (blob, bytearray(blob), memoryview(blob)):
        got = VisualFeatures.from_bytes(form)
        assert torch.equal(got.rows, rows) and got.rows.dtype == dtype
        assert (got.tokens, got.tiles, got.fingerprint, got.request) == (tokens, tuple(tiles), "f", request)
        assert (got.scores is None) == (not scores) and (not scores or torch.equal(got.scores, sent.scores))
    if rows.numel():
        assert torch.equal(load(blob)["rows"], rows), "safetensors reads it"


def test_a_copy_and_not_a_view():
    blob = bytearray(message().to_bytes())
    got = VisualFeatures.from_bytes(blob)
    before = got.rows.clone()
    blob[-64:] = bytes(64)
    assert torch.equal(got.rows, before)
    sent = message()
    strided = VisualFeatures(torch.randn(36, 16).bfloat16()[:, ::2], sent.tokens, sent.tiles)
    assert torch.equal(VisualFeatures.from_bytes(strided.to_bytes()).rows, strided.rows)


def test_parts_that_do_not_fit():
    rows = torch.zeros(20, 8)
    for change, text in (
        (dict(rows=rows[0]), r"rows: got shape \[8\]"),
        (dict(tokens=(16,)), "tokens: got 16 in all, expected 20"),
        (dict(tiles=(1,)), "tiles: got 1 in all, expected 2"),
        (dict(scores=torch.zeros(3)), r"scores: got shape \[3\], expected \[2\]"),
    ):
        with pytest.raises(ValueError, match=text):
            VisualFeatures(**{**dict(rows=rows, tokens=(16, 4), tiles=(2,)), **change})
    with pytest.raises(ValueError, match=r"rows: got torch.float64"):
        VisualFeatures(rows.double(), (16, 4), (2,)).to_bytes()
    with pytest.raises(ValueError, match="request: got 300 characters"):
        VisualFeatures(rows, (16, 4), (2,), request="x" * 300).to_bytes()


def header_change(draw, header):
    """One thing that is wrong with a header; returns the reason that the error must have, or several."""
    metadata, rows = header["__metadata__"], header["rows"]
    odd = draw.choice([None, True, -1, 1.5, "8", [], {}, [[]], 10**30, 2**63, "\x00"])
    kind = draw.randrange(16)
    if kind == 0:
        metadata["version"] = draw.choice(["0", "2", "", "1.0", "１"])
        return {"version"}
    if kind == 1:
        del metadata[draw.choice(list(metadata))]
        return {"header"}
    if kind == 2:
        metadata[draw.choice(["extra", "pickle", "Tokens"])] = "1"
        return {"header"}
    if kind == 3:
        metadata[draw.choice(list(metadata))] = draw.choice([1, None, [], {}])
        return {"header"}
    if kind == 4:
        rows["dtype"] = draw.choice(["F64", "I8", "BOOL", "bf16", "", None, 3, ["BF16"], "__reduce__"])
        return {"dtype"}
    if kind == 5:
        rows["shape"] = draw.choice([[36], [36, 9], [35, 8], [1, 36, 8], [2**40, 2**40], [10**30, 8], [-36, -8], odd])
        return {"shape", "width", "tokens"}
    if kind == 6:
        rows["data_offsets"] = draw.choice(
            [[0, 575], [1, 577], [576, 0], [0, 2**64], [0], [0, 576, 0], odd, [True, 576]]
        )
        return {"shape"}
    if kind == 7:
        metadata["tokens"] = draw.choice(
            [
                "[16,4]",
                "[16,16,4,0]",
                "[-16,52]",
                "[16,20]",
                "[18,18]",
                "16",
                "{}",
                "[16.0,4,16]",
                "[true,4,16]",
                "[",
                "",
            ]
        )
        return {"tokens", "header"}
    if kind == 8:
        metadata["tiles"] = draw.choice(["[2]", "[2,2]", "[0,3]", "[3,-0]", "[1e9]", "null", "[[3]]", '["3"]'])
        return {"tokens"}
    if kind == 9:
        metadata["fingerprint"] = draw.choice(["", "e" * 64, "F" * 64, "f" * 63])
        return {"fingerprint"}
    if kind == 10:
        metadata[draw.choice(["request", "fingerprint"])] = "x" * draw.randrange(257, 900)
        return {"limit"}
    if kind == 11:
        header[draw.choice(["row", "bias", "rows2", ""])] = rows
        return {"header"}
    if kind == 12:
        del header["rows"]
        return {"header"}
    if kind == 13:
        header["rows"] = odd
        return {"header"}
    if kind == 14:
        header["scores"] = draw.choice([{**rows, "data_offsets": [576, 588]}, {**header["scores"], "shape": [2]}, odd])
        return {"shape", "size", "header"}
    del header[draw.choice(["__metadata__", "rows"])]
    return {"header"}


def malformed(draw, blob):
    """A broken message, and the reasons that fit."""
    header, data = taken_apart(blob)
    kind = draw.randrange(9)
    if kind == 0:
        return blob[: draw.randrange(len(blob))], REASONS
    if kind == 1:
        return blob + bytes(draw.randrange(1, 50)), {"size"}
    if kind == 2:
        length = draw.choice([0, 1, 7, len(blob), 4097, 2**31, 2**63, 2**64 - 1, draw.randrange(2, 64)])
        return struct.pack("<Q", length) + blob[8:], {"header"}
    if kind == 3:
        return draw.randbytes(draw.randrange(200)), {"size", "header"}
    if kind == 4:
        text = draw.choice(
            [
                b"[]",
                b"null",
                b'"rows"',
                b"{}",
                b"[" * 3000,
                b"{" * 900,
                b"1" * 4000,
                b'{"rows":NaN}',
                b'{"a":1,"a":1}',
                b"\xff\xfe",
            ]
        )
        return put_together(text, data), {"header"}
    if kind == 5:
        at = draw.randrange(36 * 8) * 2
        special = draw.choice([0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF])
        return put_together(header, data[:at] + struct.pack("<H", special) + data[at + 2 :]), {"finite"}
    if kind == 6:
        special = struct.pack("<I", draw.choice([0x7F800000, 0xFF800001, 0x7FC00000]))
        return put_together(header, data[:-4] + special), {"finite"}
    if kind == 7:
        sizes = dict(tokens=(16,) * 11, tiles=(11,)) if draw.random() < 0.5 else dict(tokens=(200,), tiles=(1,))
        return message(**sizes).to_bytes(), {"limit"}
    reasons = header_change(draw, header)
    return put_together(header, data), reasons


def test_ten_thousand_malformed_messages(monkeypatch):
    """Each is a named error; nothing is placed before all but the numbers is good, and no memory is taken."""
    draw, seen = random.Random(0), dict.fromkeys(REASONS, 0)
    placed, numbers = [], features._numbers
    monkeypatch.setattr(features, "_numbers", lambda *args: placed.append(args[0]) or numbers(*args))
    blob = message().to_bytes()
    VisualFeatures.from_bytes(blob, LIMITS)
    tracemalloc.start()
    try:
        for i in range(10_000):
            broken, reasons = malformed(draw, blob)
            placed.clear()
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(MessageError) as caught:
                VisualFeatures.from_bytes(broken, LIMITS)
            reason = caught.value.reason
            assert reason in reasons, (i, reason, reasons, str(caught.value))
            assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
            assert reason in ("finite", "shape") or not placed
            assert tracemalloc.get_traced_memory()[1] - before < LIMITS.size + (1 << 20)
            seen[reason] += 1
    finally:
        tracemalloc.stop()
    assert all(seen.values()) or seen["width"] == 0, seen
    del seen["width"]
    assert all(seen.values()), seen


def test_bits_that_flip():
    """A flipped bit is an error, or changes numbers or a name only: what is read always fits itself and the limits."""
    draw, blob = random.Random(1), message().to_bytes()
    for _ in range(3000):
        broken = bytearray(blob)
        for _ in range(draw.randrange(1, 4)):
            broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
        try:
            got = VisualFeatures.from_bytes(broken, LIMITS)
        except MessageError as error:
            assert error.reason in REASONS
        else:
            assert got.rows.shape == (36, 8) and got.rows.isfinite().all() and got.fingerprint == "f" * 64


def test_width_dtype_and_size():
    blob = message().to_bytes()
    for limits, reason in (
        (Limits(width=9), "width"), (Limits(dtypes=(torch.float32,)), "dtype"), (Limits(size=100), "size"),
        (Limits(header=16), "header"), (Limits(rows=35), "limit"), (Limits(tiles=2), "limit"),
        (Limits(tokens=(16,)), "tokens"),
    ):  # fmt: skip
        with pytest.raises(MessageError) as caught:
            VisualFeatures.from_bytes(blob, limits)
        assert caught.value.reason == reason


def test_a_hop_is_short():
    """CPU to and from bytes of 7 tiles of a 1B model: a bound far above what it takes, for a busy machine."""
    sent = VisualFeatures(torch.randn(1792, 1024).bfloat16(), (256,) * 7, (7,), torch.rand(7), "f" * 64)
    times = []
    for _ in range(15):
        start = time.process_time()
        got = VisualFeatures.from_bytes(sent.to_bytes())
        times.append(time.process_time() - start)
    assert torch.equal(got.rows, sent.rows) and got.rows.nbytes == 3_670_016
    assert min(times) < 2e-3
