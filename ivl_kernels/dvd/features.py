"""What the vision side hands to the language side, and its bytes: safetensors, checked whole before anything is made.

The format is that of safetensors: the length of a JSON header (8 bytes, little endian), the header, the numbers. It is
read here and not by that library, since nothing of a message that came from elsewhere may be trusted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VERSION = 1
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Exponents of all ones: infinities and what is no number. By dtype: integers of the same size, that mask.
_SPECIAL = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}
_METADATA = ("format", "version", "request", "fingerprint", "tokens", "tiles")
_CHUNK = 1 << 18  # numbers that are looked at at a time
_TEXT = 256  # characters of a request's name and of a fingerprint


class MessageError(ValueError):
    """A message that is not what was expected.

    Attributes:
        reason: one word for counters: size, header, version, dtype, shape, tokens, limit, width, finite, fingerprint.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"message: {text}")
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """What a receiver takes.

    Attributes:
        size: bytes of a message.
        header: bytes of its JSON header.
        rows: visual tokens of a request.
        tiles: of a request.
        width: of a row; None: any.
        tokens: what a tile may have, such as (256, 64); None: any.
        dtypes: of the rows.
        fingerprint: of weights and rules; None: any.
    """

    size: int = 128 << 20
    header: int = 64 << 10
    rows: int = 64 * 256
    tiles: int = 128
    width: int | None = None
    tokens: tuple[int, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    fingerprint: str | None = None


@dataclass(frozen=True)
class VisualFeatures:
    """The visual tokens of one request.

    Attributes:
        rows: [N, H] tile after tile, the thumbnail of an image last; what the language model takes as embeddings.
        tokens: of each tile.
        tiles: of each image.
        scores: [T] float32, of each tile the probability that compressing it is harmless; None without a router.
        fingerprint: of the weights and rules that made the rows.
        request: whatever the sender calls it.

    Raises:
        ValueError: the parts do not fit each other.
    """

    rows: Tensor
    tokens: tuple[int, ...]
    tiles: tuple[int, ...]
    scores: Tensor | None = None
    fingerprint: str = ""
    request: str = ""

    def __post_init__(self) -> None:
        if self.rows.dim() != 2:
            raise ValueError(f"rows: got shape {list(self.rows.shape)}, expected [N, H]")
        if sum(self.tokens) != len(self.rows):
            raise ValueError(f"tokens: got {sum(self.tokens)} in all, expected {len(self.rows)}: one a row")
        if sum(self.tiles) != len(self.tokens):
            raise ValueError(
                f"tiles: got {sum(self.tiles)} in all, expected {len(self.tokens)}: one for each of tokens"
            )
        if self.scores is not None and self.scores.shape != (len(self.tokens),):
            raise ValueError(f"scores: got shape {list(self.scores.shape)}, expected [{len(self.tokens)}]")

    def images(self) -> list[Tensor]:
        """[n, H] of each image: what engines take as ready embeddings of an image."""
        counts, first = [], 0
        for tiles in self.tiles:
            counts.append(sum(self.tokens[first : first + tiles]))
            first += tiles
        return list(self.rows.split(counts)) if counts else []

    def to_bytes(self) -> bytes:
        """safetensors bytes: tensors `rows` and `scores`, the rest in the header's metadata.

        Raises:
            ValueError: rows of another dtype than bfloat16, float16 or float32; a text of over 256 characters.
        """
        if self.rows.dtype not in _NAMES:
            raise ValueError(f"rows: got {self.rows.dtype}, expected bfloat16, float16 or float32")
        for name in ("request", "fingerprint"):
            if len(getattr(self, name)) > _TEXT:
                raise ValueError(f"{name}: got {len(getattr(self, name))} characters, expected at most {_TEXT}")
        values = ("ivl-visual-features", str(VERSION), self.request, self.fingerprint)
        lists = (json.dumps(self.tokens), json.dumps(self.tiles))
        header: dict[str, Any] = {"__metadata__": dict(zip(_METADATA, (*values, *lists)))}
        parts, end = [], 0
        for name, tensor in (("rows", self.rows), ("scores", self.scores)):
            if tensor is not None:
                tensor = tensor.detach().to("cpu", torch.float32 if name == "scores" else None).contiguous()
                begin, end = end, end + tensor.nbytes
                entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
                header[name] = entry
                parts.append(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return b"".join([struct.pack("<Q", len(text)), text, *parts])

    @classmethod
    def from_bytes(
        cls, blob: bytes | bytearray | memoryview, limits: Limits | None = None, *, device: Any = "cpu"
    ) -> VisualFeatures:
        """Read a message. All else is checked before memory for its numbers is taken, which is that of the message.

        Args:
            blob: what `to_bytes` made, here or elsewhere; it is copied.
            limits: what is taken; `LanguageSide.limits` are those of a model.
            device: where the tensors are to be.

        Raises:
            MessageError: anything in it is not as expected; its `reason` says in a word what.
        """
        limits = limits or Limits()
        view = memoryview(blob).cast("B")
        header, data = _header(view, limits)
        metadata = _metadata(header.pop("__metadata__", None))
        tokens = _counts("tokens", metadata["tokens"], limits.tiles)
        tiles = _counts("tiles", metadata["tiles"], limits.tiles)
        spans = _spans(header, len(data))
        shape, dtype, begin, end = spans["rows"]
        _check_rows(shape, dtype, tokens, tiles, limits)
        if limits.fingerprint is not None and metadata["fingerprint"] != limits.fingerprint:
            raise MessageError(
                "fingerprint",
                f"got features of weights and rules {metadata['fingerprint']!r:.80}, expected {limits.fingerprint!r}: "
                "another checkpoint, or other thresholds",
            )
        rows = _numbers("rows", data[begin:end], dtype).view(shape)
        scores = None
        if "scores" in spans:
            shape, dtype, begin, end = spans["scores"]
            if shape != (len(tokens),) or dtype != torch.float32:
                raise MessageError("shape", f"scores: got {dtype} {list(shape)}, expected float32 [{len(tokens)}]")
            scores = _numbers("scores", data[begin:end], dtype)
        return cls(
            rows.to(device),
            tokens,
            tiles,
            None if scores is None else scores.to(device),
            metadata["fingerprint"],
            metadata["request"],
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError("header", f"{what}: not the expected JSON ({str(error):.80})") from None


def _header(view: memoryview, limits: Limits) -> tuple[dict[str, Any], memoryview]:
    if len(view) > limits.size:
        raise MessageError("size", f"got {len(view)} bytes, expected at most {limits.size}")
    if len(view) < 8:
        raise MessageError("size", f"got {len(view)} bytes, expected at least 8")
    (length,) = struct.unpack("<Q", view[:8])
    if length > min(limits.header, len(view) - 8):
        most = min(limits.header, len(view) - 8)
        raise MessageError("header", f"got a header of {length} bytes, expected at most {most}")
    found = _json(bytes(view[8 : 8 + length]), "header")
    if not isinstance(found, dict):
        raise MessageError("header", f"header: got a {type(found).__name__}, expected an object")
    return found, view[8 + length :]


def _metadata(found: Any) -> dict[str, str]:
    """All texts that there must be, and no other."""
    if not isinstance(found, dict) or set(found) != set(_METADATA) or not all(type(v) is str for v in found.values()):
        raise MessageError("header", f"metadata: expected the texts {', '.join(_METADATA)} and no others")
    if found["format"] != "ivl-visual-features" or found["version"] != str(VERSION):
        got = f"{found['format']!r:.40} version {found['version']!r:.20}"
        raise MessageError("version", f"got {got}, expected 'ivl-visual-features' version '{VERSION}'")
    for name in ("request", "fingerprint"):
        if len(found[name]) > _TEXT:
            raise MessageError("limit", f"{name}: got {len(found[name])} characters, expected at most {_TEXT}")
    return found


def _counts(name: str, text: str, most: int) -> tuple[int, ...]:
    found = _json(text, name)
    if not isinstance(found, list) or not all(type(v) is int and v > 0 for v in found):
        raise MessageError("tokens", f"{name}: expected a list of positive integers")
    if len(found) > most:
        raise MessageError("limit", f"{name}: got {len(found)}, expected at most {most}")
    return tuple(found)


def _is_size(n: Any) -> bool:
    return type(n) is int and 0 <= n < 1 << 40


def _spans(header: dict[str, Any], size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, int, int]]:
    """Shape, dtype, begin and end of `rows` and, where there are, `scores`: one after the other, and nothing else."""
    if "rows" not in header or not set(header) <= {"rows", "scores"}:
        raise MessageError("header", f"got tensors {', '.join(sorted(header))[:80]}, expected rows and perhaps scores")
    spans: dict[str, tuple[tuple[int, ...], torch.dtype, int, int]] = {}
    at = 0
    for name in ("rows", "scores"):
        if name not in header:
            continue
        entry = header[name]
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise MessageError("header", f"{name}: expected dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            raise MessageError("dtype", f"{name}: got {entry['dtype']!r:.40}, expected one of {', '.join(_DTYPES)}")
        dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or not all(map(_is_size, shape)):
            raise MessageError("shape", f"{name}: got shape {shape!r:.80}, expected one or two sizes")
        expected = dtype.itemsize
        for n in shape:
            expected *= n
        if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int] or offsets != [at, at + expected]:
            raise MessageError("shape", f"{name}: got offsets {offsets!r:.80}, expected [{at}, {at + expected}]")
        at += expected
        spans[name] = (tuple(shape), dtype, *offsets)
    if at != size:
        raise MessageError("size", f"got {size} bytes of numbers, expected {at}")
    return spans


def _check_rows(
    shape: tuple[int, ...], dtype: torch.dtype, tokens: Sequence[int], tiles: Sequence[int], limits: Limits
) -> None:
    if dtype not in limits.dtypes:
        wanted = ", ".join(_NAMES[d] for d in limits.dtypes)
        raise MessageError("dtype", f"rows: got {_NAMES[dtype]}, expected one of {wanted}")
    if len(shape) != 2:
        raise MessageError("shape", f"rows: got shape {list(shape)}, expected [N, H]")
    if shape[0] > limits.rows:
        raise MessageError("limit", f"rows: got {shape[0]}, expected at most {limits.rows}")
    if limits.width is not None and shape[1] != limits.width:
        raise MessageError("width", f"rows: got {shape[1]} wide, expected {limits.width}")
    if sum(tokens) != shape[0]:
        raise MessageError("tokens", f"tokens: got {sum(tokens)} in all for {shape[0]} rows")
    if sum(tiles) != len(tokens):
        raise MessageError("tokens", f"tiles: got {sum(tiles)} in all for {len(tokens)} counts of tokens")
    wrong = [] if limits.tokens is None else [n for n in tokens if n not in limits.tokens]
    if wrong:
        raise MessageError("tokens", f"tokens: got a tile of {wrong[0]}, expected one of {limits.tokens}")


def _numbers(name: str, data: memoryview, dtype: torch.dtype) -> Tensor:
    """A copy of finite numbers."""
    if not len(data):
        return torch.empty(0, dtype=dtype)
    numbers = torch.frombuffer(bytearray(data), dtype=dtype)
    integers, mask = _SPECIAL[dtype]
    if any(int(part.bitwise_and(mask).amax()) == mask for part in numbers.view(integers).split(_CHUNK)):
        raise MessageError("finite", f"{name}: got infinities or NaN, expected finite numbers")
    return numbers
