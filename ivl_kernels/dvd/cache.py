"""Visual tokens kept by the content of the image file.

Without Flash an image's rows depend on nothing but the image. With Flash the decision rule compares the tiles of a
request, so an image alone has no rows: kept are each tile's score and its rows at each ratio that was needed so far.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


def content_key(data: bytes, **tiling: Any) -> str:
    """The key of an image: of the bytes of its file, and whatever else decides its tiles (`max_tiles=12`, ...)."""
    digest = hashlib.sha256(json.dumps(tiling, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


@dataclass
class Entry:
    """What is known of an image's tiles.

    Attributes:
        rows: of each tile, by its number of tokens: [tokens, H].
        scores: [t] float32, or None without a router.
    """

    rows: list[dict[int, Tensor]]
    scores: Tensor | None = None

    @property
    def bytes(self) -> int:
        return sum(rows.nbytes for tile in self.rows for rows in tile.values())


@dataclass
class FeatureCache:
    """The least recently used images leave when there is no room.

    Attributes:
        limit: bytes of rows.
        hits, misses: images found, and not found or without the rows that were needed.

    Safe to use from several threads. An entry is never changed: a better one takes its place.
    """

    limit: int = 1 << 30
    hits: int = 0
    misses: int = 0
    _entries: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    _bytes: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        return self._bytes

    def get(self, key: str) -> Entry | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    def put(self, key: str, entry: Entry) -> None:
        with self._lock:
            old = self._entries.pop(key, None)
            self._bytes -= old.bytes if old is not None else 0
            if entry.bytes > self.limit:
                return
            self._entries[key] = entry
            self._bytes += entry.bytes
            while self._bytes > self.limit:
                _, gone = self._entries.popitem(last=False)
                self._bytes -= gone.bytes

    def count(self, hits: int, misses: int) -> None:
        with self._lock:
            self.hits += hits
            self.misses += misses

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0
