"""Which samples share a row: a mixture of data sets, and best-fit packing of its stream under two limits."""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info


class Limits(NamedTuple):
    """What a row holds at most; the defaults are those of InternVL3.5's scripts.

    Attributes:
        tokens: tokens a row, visual ones included.
        tiles: tiles a row; 0: rows without images only.
    """

    tokens: int = 32768
    tiles: int = 96


class TooLarge(ValueError):
    """A sample that fits no row."""


@dataclass(slots=True)
class _Open:
    tokens: int
    tiles: int
    items: list[Any]
    number: int  # of its first item: ties go to the older row

    def key(self) -> tuple[int, int, int]:
        return self.tokens, self.tiles, -self.number


class Packer:
    """Search, Pack and Maintain: best fit over a bounded number of open rows.

    Search: of the open rows that can take the sample, the one with the most tokens, then the most tiles. Pack: it goes
    to the end of that row, or opens a row. Maintain: a row with no token left is finished; of more than `rows` open
    ones the one with the most tokens is. A row that can take no more tiles stays open for text, which is worth 4 to 9 %
    of fill; InternVL finishes it.

    Args:
        limits: of a row.
        rows: open rows at most (InternVL3.5: 20).

    Raises:
        ValueError: limits or `rows` that are too small to be meant.

    Nothing is lost or repeated: every item pushed is in exactly one row, in the order of pushing within it. One push
    costs O(rows). Source: InternVL2.5 (arXiv 2412.05271), section 4.2; its code sorts by tiles alone and scans.
    """

    def __init__(self, limits: Limits = Limits(), *, rows: int = 20) -> None:  # noqa: B008 (immutable)
        if limits.tokens < 1 or limits.tiles < 0:
            raise ValueError(f"limits: got {limits}, expected at least 1 token and 0 tiles")
        if rows < 1:
            raise ValueError(f"rows: got {rows}, expected at least 1")
        self.limits, self.rows = limits, rows
        self._open: list[_Open] = []
        self._keys: list[tuple[int, int, int]] = []  # of `_open`, ascending
        self._pushed = 0

    def push(self, item: Any, tokens: int, tiles: int = 0) -> list[Any] | None:
        """Place one sample; the row that this finished, or None.

        Raises:
            TooLarge: more tokens or tiles than a row takes (cut it first), or fewer than none. It was not placed.
        """
        most, most_tiles = self.limits
        if not 0 < tokens <= most or not 0 <= tiles <= most_tiles:
            raise TooLarge(f"sample: got {tokens} tokens and {tiles} tiles, expected 1 to {most} and 0 to {most_tiles}")
        self._pushed += 1
        keys, rows = self._keys, self._open
        at = bisect_right(keys, (most - tokens, most_tiles - tiles, 1)) - 1
        while at >= 0 and (rows[at].tiles + tiles > most_tiles or rows[at].tokens + tokens > most):
            at -= 1
        if at < 0:
            row = _Open(tokens, tiles, [item], self._pushed)
        else:
            del keys[at]
            row = rows.pop(at)
            row.tokens += tokens
            row.tiles += tiles
            row.items.append(item)
        if row.tokens == most:
            return row.items
        key = row.key()
        at = bisect_right(keys, key)
        keys.insert(at, key)
        rows.insert(at, row)
        return self._pop() if len(rows) > self.rows else None

    def _pop(self) -> list[Any]:
        self._keys.pop()
        return self._open.pop().items

    def flush(self) -> list[list[Any]]:
        """The open rows, most tokens first; none is open afterwards."""
        left = []
        while self._open:
            left.append(self._pop())
        return left

    def __len__(self) -> int:
        """Samples in open rows."""
        return sum(len(row.items) for row in self._open)

    def state_dict(self) -> dict[str, Any]:
        """The open rows with their samples."""
        rows = [(row.tokens, row.tiles, list(row.items), row.number) for row in self._open]
        return {"open": rows, "pushed": self._pushed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._open, self._keys = [], []
        for tokens, tiles, items, number in state["open"]:
            insort(self._open, _Open(tokens, tiles, list(items), number), key=_Open.key)
        self._keys = [row.key() for row in self._open]
        self._pushed = state["pushed"]


class Mixture:
    """Select: draws a data set by its weight, then that data set's next sample.

    Args:
        datasets: indexable, with a length.
        weights: of the draw, one a data set; None: their lengths.
        seed: of the draws and of the orders.
        shuffle: each data set in a new random order every epoch; False: as it lies.
        repeat: a data set that ends begins again, for ever; False: it is drawn no more, and the stream ends with the
            last one: every sample exactly once.
        rank, world: this process takes every `world`-th draw. All ranks make the same draws, so they share nothing
            and lose nothing. Workers of a DataLoader divide a rank's draws further.

    Raises:
        ValueError: weights that do not fit, an empty data set that would repeat, a rank outside the world.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[Any]],
        weights: Sequence[float] | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        repeat: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank: got {rank} of {world}, expected 0 <= rank < world")
        sizes = [len(data) for data in datasets]
        weights = [float(size) for size in sizes] if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(datasets):
            raise ValueError(f"weights: got {len(weights)} for {len(datasets)} data sets, expected one each")
        if not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError(f"weights: got {weights}, expected finite numbers of at least 0")
        idle = [i for i, (size, weight) in enumerate(zip(sizes, weights)) if not weight and size and not repeat]
        if idle:
            raise ValueError(f"weights: got 0 for data set {idle[0]}, which would never be drawn; leave it out")
        if repeat and not all(sizes):
            raise ValueError(f"datasets: number {sizes.index(0)} is empty and cannot repeat")
        self._datasets, self._sizes, self._weights = list(datasets), sizes, weights
        self._seed, self._shuffle, self._repeat = seed, shuffle, repeat
        self._rank, self._world = rank, world
        self._restart()

    def _restart(self) -> None:
        self._rng = np.random.default_rng(self._seed)
        self._at = [0] * len(self._sizes)
        self._epochs = [0] * len(self._sizes)
        self._draws = 0
        self._ended = False
        self._orders: list[Any] = [self._order(i) for i in range(len(self._sizes))]
        self._draw_from()

    def _order(self, i: int) -> Any:
        if not self._shuffle:
            return range(self._sizes[i])
        return np.random.default_rng((self._seed, i, self._epochs[i])).permutation(self._sizes[i])

    def _draw_from(self) -> None:
        """The data sets that have samples left, and their weights summed up."""
        self._live = [i for i, size in enumerate(self._sizes) if self._at[i] < size and self._weights[i]]
        total, self._upto = 0.0, []
        for i in self._live:
            total += self._weights[i]
            self._upto.append(total)

    def _draw(self) -> tuple[int, int]:
        pick = bisect_right(self._upto, self._rng.random() * self._upto[-1]) if len(self._live) > 1 else 0
        i = self._live[min(pick, len(self._live) - 1)]
        index = int(self._orders[i][self._at[i]])
        self._at[i] += 1
        self._draws += 1
        if self._at[i] == self._sizes[i]:
            if self._repeat:
                self._at[i] = 0
                self._epochs[i] += 1
                self._orders[i] = self._order(i)
            else:
                self._draw_from()
        return i, index

    def __iter__(self) -> Iterator[Any]:
        """From where the mixture is: a mixture that has ended starts again from the beginning."""
        if self._ended:
            self._restart()
        worker = get_worker_info()
        rank, world = self._rank, self._world
        if worker is not None:
            rank, world = rank * worker.num_workers + worker.id, world * worker.num_workers
        while self._live:
            mine = self._draws % world == rank
            i, index = self._draw()
            if mine:
                yield self._datasets[i][index]
        self._ended = True

    def state_dict(self) -> dict[str, Any]:
        """Where the mixture is; the data sets, weights and seed are the caller's to give again."""
        rng = self._rng.bit_generator.state
        state = {"rng": rng, "at": list(self._at), "epochs": list(self._epochs)}
        return {**state, "draws": self._draws, "ended": self._ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError: a state of another number of data sets, or of longer ones."""
        if len(state["at"]) != len(self._sizes) or any(at > size for at, size in zip(state["at"], self._sizes)):
            raise ValueError(f"state: got places {state['at']} for data sets of {self._sizes} samples")
        self._rng.bit_generator.state = state["rng"]
        self._at, self._epochs, self._draws = list(state["at"]), list(state["epochs"]), state["draws"]
        self._ended = state["ended"]
        self._orders = [self._order(i) for i in range(len(self._sizes))]
        self._draw_from()


def _size(sample: Any) -> tuple[int, int]:
    return sample.tokens, sample.tiles


class PackedStream(IterableDataset):  # type: ignore[type-arg]
    """Rows of samples from a stream of samples: what a DataLoader with `batch_size=None` (or a loop) takes.

    Args:
        source: the samples; with `state_dict` and `load_state_dict` (a `Mixture`) it is resumed by them, otherwise by
            passing over what was taken, so it must give the same samples again.
        limits, rows: as of `Packer`.
        size: (tokens, tiles) of a sample; None: its attributes of these names. Samples may be anything, so also keys
            of what the collator loads later.
        cut: makes pieces that fit of a sample (`packing.cut`); None: one too large raises.
        finish: give the rows that are still open when the source ends.

    Raises (while iterating):
        TooLarge: a sample that fits no row.

    Each sample is in exactly one row. `state_dict` may be taken between any two rows; it holds the samples of the open
    rows, so keep samples small or make them keys.
    """

    def __init__(
        self,
        source: Iterable[Any],
        limits: Limits = Limits(),  # noqa: B008 (immutable)
        *,
        rows: int = 20,
        size: Callable[[Any], tuple[int, int]] | None = None,
        cut: Callable[[Any], Iterable[Any]] | None = None,
        finish: bool = True,
    ) -> None:
        self.source, self.size, self.cut, self.finish = source, size or _size, cut, finish
        self.packer = Packer(limits, rows=rows)
        self._ready: list[list[Any]] = []
        self._taken, self._ended = 0, False

    def __iter__(self) -> Iterator[list[Any]]:
        """From where the stream is; one that has ended begins anew."""
        yield from self._drain()
        if not self._ended:
            skip = 0 if hasattr(self.source, "state_dict") else self._taken
            for sample in itertools.islice(self.source, skip, None):
                self._taken += 1
                for piece in (sample,) if self.cut is None else self.cut(sample):
                    row = self.packer.push(piece, *self.size(piece))
                    if row is not None:
                        self._ready.append(row)
                yield from self._drain()
            self._ended = True
            if self.finish:
                self._ready += self.packer.flush()
            yield from self._drain()
        self._ended, self._taken = False, 0

    def _drain(self) -> Iterator[list[Any]]:
        while self._ready:
            yield self._ready.pop(0)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"packer": self.packer.state_dict(), "ready": list(self._ready)}
        state |= {"taken": self._taken, "ended": self._ended}
        if hasattr(self.source, "state_dict"):
            state["source"] = self.source.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError: the source of the state could be resumed and this one cannot, or the reverse."""
        if ("source" in state) != hasattr(self.source, "load_state_dict"):
            raise ValueError(f"state: of another kind of source than {type(self.source).__name__}")
        self.packer.load_state_dict(state["packer"])
        self._ready, self._taken, self._ended = list(state["ready"]), state["taken"], state["ended"]
        if "source" in state:
            self.source.load_state_dict(state["source"])  # type: ignore[attr-defined]
