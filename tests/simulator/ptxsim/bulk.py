"""Bulk copies of tensors (TMA, sm_90): what a tensor map describes, tiled, between global and shared memory of one CTA.

A copy to shared memory writes at a time nobody knows before the end of its mbarrier's phase. So the bytes are in nobody's
hands from its start until a thread has seen that end, and then in those warps' that saw it, until a barrier tells all.
"""
import re, struct
from dataclasses import dataclass
import numpy as np
from .parse import PtxError, GBASE, PARWIN, split_top
from .mem import SimError, WARPGROUP, MAPPED, INIT, LOADED, STORED
from .mbarrier import barrier_at

i32, i64 = np.int32, np.int64
SWIZZLES = {0: 1, 1: 2, 2: 4, 3: 8}                          # CU_TENSOR_MAP_SWIZZLE_*: units of 16 bytes of a row of the pattern
MAP = struct.Struct('<4sBBBxQ5Q4Q5H')                        # ours: the real one is not public
MAGIC = b'tmap'


@dataclass
class TensorMap:
    """Stands for a CUtensorMap of a tensor: sizes and strides as torch has them, sides of the box, CU_TENSOR_MAP_SWIZZLE_*."""
    tensor: object
    shape: tuple
    strides: tuple
    box: tuple
    swizzle: int = 0
    nan: bool = False                                        # what is outside reads as NaN, not 0

    def pack(self, address):
        size = self.tensor.element_size() if hasattr(self.tensor, 'element_size') else self.tensor.itemsize
        shape, strides, box = (tuple(int(v) for v in reversed(x)) for x in (self.shape, self.strides, self.box))
        n, rows = len(shape), [s * size for s in strides[1:]]
        if not 1 <= n <= 5 or len(strides) != n or len(box) != n: raise PtxError(f'{self}: sizes, strides and box differ in length')
        if strides[0] != 1 or address % 16 or any(s % 16 or not 0 < s < 2**40 for s in rows):
            raise PtxError(f'tensor map: strides {self.strides} of {size} bytes from {address:#x} are not multiples of 16 bytes')
        if any(not 0 < x <= 2**32 for x in shape) or any(not 0 < x <= 256 for x in box): raise PtxError(f'tensor map: {self.shape} by boxes {self.box}')
        if box[0] * size % 16 or self.swizzle and box[0] * size > 16 * SWIZZLES[self.swizzle]:
            raise PtxError(f'tensor map: rows of {box[0] * size} bytes in a box, swizzle {self.swizzle}')
        fill = lambda v, k: [*v, *[0] * (k - len(v))]
        return MAP.pack(MAGIC, n, size, self.swizzle | self.nan << 4, address, *fill(shape, 5), *fill(rows, 4), *fill(box, 5)).ljust(128, b'\0')


class Map:
    """A tensor map read back."""
    def __init__(self, raw, ins):
        magic, n, self.size, how, self.base, *rest = MAP.unpack_from(raw)
        if magic != MAGIC: raise SimError(f'no tensor map at the address of {ins}')
        self.shape, self.rows, self.box, self.swizzle, self.nan = rest[:n], [self.size, *rest[5:4 + n]], rest[9:9 + n], how & 15, how >> 4
        self.bytes = int(np.prod(self.box)) * self.size

    def gather(self):
        """Single rows from here on, four at a time."""
        if len(self.box) != 2 or self.box[1] != 1: raise SimError(f'rows gathered by boxes of {self.box}')
        self.bytes *= 4; return self

    def global_rows(self, coordinates):
        """Offsets from the base [rows] of rows of a box, which of them exist, and the first and last byte of each that do."""
        if len(coordinates) > len(self.box):
            j = np.array(coordinates[1:]); at, ok = j * self.rows[1], (j >= 0) & (j < self.shape[1])
        else: at, ok = np.zeros(1, i64), np.ones(1, bool)
        for c, n, stride, side in reversed([*zip(coordinates, self.shape, self.rows, self.box)][1:] if len(coordinates) == len(self.box) else []):
            j = c + np.arange(side); at = (at[:, None] + j * stride).reshape(-1); ok = (ok[:, None] & (j >= 0) & (j < n)).reshape(-1)
        first, last = max(0, -coordinates[0]), min(self.box[0], self.shape[0] - coordinates[0])
        return at + coordinates[0] * self.size, ok & (first < last), first * self.size, last * self.size

    def units(self, address):
        """Shared addresses of the 16-byte units of a box, in its order."""
        a = address + np.arange(self.bytes // 16) * 16
        return a ^ (a >> 7 & SWIZZLES[self.swizzle] - 1) * 16


class Flight:
    """A copy to shared memory. `seen`: warps that know it is done."""
    def __init__(self, bulk, number, cta, units, data, ins):
        self.bulk, self.number, self.cta, self.units, self.data, self.ins = bulk, number, cta, units, data, ins
        self.done, self.seen = False, np.zeros(32, bool)

    def observe(self, warps):
        S = self.bulk.X.S
        if not self.done: self.done = True; S.mem.reshape(-1, 16)[self.units] = self.data; S.init.reshape(-1, 16)[self.units] = True
        self.seen[warps] = True
        return self.number in self.bulk.flights


class Bulk:
    """The bulk copies of a batch. Of 16-byte units of shared memory: the number of the copy that nobody but some may touch."""

    def __init__(self, X):
        self.X, self.flights, self.number = X, {}, 0
        self.owner = np.zeros(len(X.S.mem) // 16, i32)
        self.groups, self.queue = np.zeros(X.T, i64), []     # of copies to global memory: groups committed by lane; (lane, group, units)
        X.S.bulk = self

    def barrier(self, ctas):
        """All threads of these CTAs (None: all) know what one of them knew."""
        for f in [f for f in self.flights.values() if f.done and (ctas is None or f.cta in ctas)]:
            mine = f.units[self.owner[f.units] == f.number]; self.owner[mine] = 0; del self.flights[f.number]

    def touch(self, units, lanes, ins):
        """Somebody reads or writes units."""
        n = self.owner[units]
        for k in np.unique(n[n > 0]):
            f = self.flights[int(k)]; mine = n == k
            if not f.done: self.X.fault(f'access to shared memory that a bulk copy in flight writes ({f.ins})', mine, lanes, ins)
            bad = mine & ~f.seen[self.X.warp if lanes is None else self.X.warp[lanes]]
            if bad.any(): self.X.race(bad, lanes, ins, 'access to what a bulk copy wrote, whose mbarrier the warp did not wait for and a thread waited for')

    def map_at(self, address, ins):
        X = self.X
        if address >> 40 == PARWIN >> 40: raw = X.kparams[address - PARWIN:address - PARWIN + 128]
        else:
            off = address - GBASE
            if not 0 <= off <= len(X.G.mem) - 128 or (X.G.sh[off:off + 128] & MAPPED == 0).any(): raise SimError(f'tensor map outside all tensors at {ins}')
            raw = X.G.mem[off:off + 128].tobytes()
        if address % 64 or len(raw) < 128: raise SimError(f'no tensor map at the address of {ins}')
        return Map(raw, ins)

    def move(self, m, coordinates, lane, ins, kind):
        """Byte offsets in global memory [rows, bytes] of what exists of a box, its rows and columns; checked and counted."""
        X, G = self.X, self.X.G
        at, ok, first, last = m.global_rows(coordinates)
        at = at[ok] + m.base - GBASE + first; n = last - first
        if not len(at): return None, ok, first, last
        if (at < 0).any() or (at + n > G.size).any(): X.fault(f'{kind} outside all tensors: {G.describe(int(at.min()))}', np.ones(1, bool), [lane], ins)
        i = at[:, None] + np.arange(n); sh = G.sh[i]
        need = MAPPED | (INIT if kind == 'load' else 0)
        if (sh & need != need).any():
            bad = i[sh & need != need][:1]
            X.fault(f'{"uninitialised" if G.sh[bad[0]] & MAPPED else "out-of-bounds"} bulk {kind}: {G.describe(int(bad[0]))}', np.ones(1, bool), [lane], ins)
        G.sh[i] = sh | (LOADED if kind == 'load' else STORED | INIT)
        sectors = int(((at + n - 1 >> 5) - (at >> 5) + 1).sum()); t = G.find(int(at[0])).ctr
        for k, v in (('bytes', i.size), ('sectors', sectors)): X.c[f'global_{kind}_{k}'] += v; t[f'{kind}_{k}'] += v
        X.c[f'global_{kind}_bytes_unique_in_warp'] += i.size; X.line(ins, 'global_sectors', sectors); X.line(ins, 'global_bytes', i.size)
        if X.L.cta_sectors: X.sectors[kind].append(np.unique((int(X.cta[lane]) << 40) | i >> 5))
        return i, ok, first, last

    def load(self, m, coordinates, address, barrier, lane, ins):
        X, S = self.X, self.X.S; cta = int(X.cta[lane])
        if address % 128 or address + m.bytes > S.size: raise SimError(f'bad shared address {address} of {m.bytes} bytes at {ins}')
        u = (m.units(address) + cta * S.pitch) // 16; lanes = np.full(len(u), lane)
        self.touch(u, lanes, ins)
        if S.reading[u].any(): X.fault('bulk copy over shared memory that a product in flight reads', S.reading[u] > 0, lanes, ins)
        if S.unfenced[u].any(): X.fault('bulk copy over shared memory written without a fence.proxy.async since', S.unfenced[u], lanes, ins)
        if S.check:
            me, w, r = X.warp[lane] + 1, S.wr.reshape(-1, 16), S.rd.reshape(-1, 16)
            bad = ((w[u] != 0) & (w[u] != me) | (r[u] != 0) & (r[u] != me) & (r[u] != WARPGROUP + X.warp[lane] // 4)).any(1)
            if bad.any(): X.race(bad, lanes, ins, 'bulk copy over a word accessed')
            w[u] = 0; r[u] = 0
        i, ok, first, last = self.move(m, coordinates, lane, ins, 'load')
        data = np.zeros((len(ok), m.box[0] * m.size), np.uint8)
        if m.nan: data[:] = 0xFF; data[:, m.size - 1::m.size] = 0x7F
        if i is not None: rows = data[ok]; rows[:, first:last] = X.G.mem[i]; data[ok] = rows
        self.number += 1
        flight = self.flights[self.number] = Flight(self, self.number, cta, u, data.reshape(-1, 16), ins)
        S.init.reshape(-1, 16)[u] = False; self.owner[u] = self.number
        barrier.until(flight); barrier.bytes -= m.bytes; barrier.settle()
        X.c['bulk_load_bytes'] += m.bytes

    def store(self, m, coordinates, address, lane, ins):
        X, S = self.X, self.X.S
        if address % 128: raise SimError(f'bad shared address {address} at {ins}')
        a = m.units(address); lanes = np.full(len(a), lane)
        u = X.shared_index(a, lanes, 16, ins, True)
        if S.unfenced[u].any(): X.fault('bulk copy of shared memory written without a fence.proxy.async since', S.unfenced[u], lanes, ins)
        S.reading[u] += 1; self.queue.append((lane, self.groups[lane], u, ins))
        i, ok, first, last = self.move(m, coordinates, lane, ins, 'store')
        if i is not None: X.G.mem[i] = S.mem.reshape(-1, 16)[u].reshape(len(ok), -1)[ok, first:last]
        X.c['bulk_store_bytes'] += m.bytes

    def commit(self): self.groups[slice(None) if self.X.m is None else self.X.m] += 1

    def wait(self, n):
        """The copies to global memory of all but the n latest groups of the active lanes have read their source."""
        X, keep = self.X, []
        for lane, group, u, ins in self.queue:
            if X.m is not None and not X.m[lane] or group >= self.groups[lane] - n: keep.append((lane, group, u, ins)); continue
            X.S.reading[u] -= 1
            if X.S.check: X.S.dirty[X.cta[lane]] = True; X.S.note_read(u, X.warp[np.full(len(u), lane)], 16)
        self.queue = keep

    def finish(self):
        """At the end of the CTAs."""
        late = next((f.ins for f in self.flights.values() if not f.done), None) or next((e[3] for e in self.queue), None)
        if late: raise SimError(f'a bulk copy that nobody waited for: {late}')


def compile_bulk(compiler, a):
    ins = compiler.i; p = set(ins.parts); ins.cls = 'other'
    if 'commit_group' in p: return lambda X: X.bulk.commit()
    if 'wait_group' in p: n = int(a[0]); return lambda X: X.bulk.wait(n)
    ins.cls = 'bulk'; spaces = [x.split('::')[0] for x in ins.parts if x.split('::')[0] in ('shared', 'global')]
    rank = next((int(x[0]) for x in ins.parts if re.fullmatch('[1-5]d', x)), 0)
    strange = [x for x in p if x.startswith(('im2col', 'tile::scatter', 'multicast', 'cta_group'))]; gathers = 'tile::gather4' in p
    if ins.op != 'cp' or 'tensor' not in p or strange or len(spaces) != 2: raise PtxError(f'unsupported instruction {ins}')
    loads = spaces == ['shared', 'global']
    if ('mbarrier::complete_tx::bytes' if loads else 'bulk_group') not in p: raise PtxError(f'unsupported instruction {ins}')
    where, there = (a[0], a[1]) if loads else (a[1], a[0])
    shared = compiler.addr(where)[0]; pointer, *rest = split_top(there.strip()[1:-1])
    described, coordinates = compiler.addr(f'[{pointer}]')[0], [compiler.src(x, 's32') for x in compiler.vec(rest[0])]
    if described is None or len(coordinates) != (5 if gathers else rank) or gathers and (rank != 2 or not loads): raise PtxError(f'unsupported instruction {ins}')
    signal = compiler.addr(a[2])[0] if loads else None

    def run(X):
        get = lambda f, lane: int((v := f(X))[0 if v.size == 1 else lane])
        for lane in range(X.T) if X.m is None else np.flatnonzero(X.m).tolist():
            m = X.bulk.map_at(get(described, lane), ins)
            if len(m.box) != rank: raise SimError(f'a tensor map of {len(m.box)} dimensions at {ins}')
            if gathers: m.gather()
            at = [get(c, lane) for c in coordinates]
            if loads: X.bulk.load(m, at, get(shared, lane), barrier_at(X, X.cta[lane], get(signal, lane), ins), lane, ins)
            else: X.bulk.store(m, at, get(shared, lane), lane, ins)
    return run
