"""Tensor memory and its products (tcgen05, sm_100); mbarriers tell when they are done. One CTA alone."""
import re
import numpy as np
from .parse import PtxError
from .mem import SimError, FULL, LANES
from .mbarrier import barrier_at, one_a_cta
from .warpgroup import IN_FLIGHT, read_operand

u32, i64 = np.uint32, np.int64
ROWS, COLUMNS = 128, 512


class TensorMemory:
    """128 rows (lanes in the ISA's words) of 512 columns of 4 bytes for each CTA of a batch, and what is in flight."""

    def __init__(self, X):
        self.X = X
        self.mem = np.full((X.C, ROWS, COLUMNS), IN_FLIGHT, u32)
        self.used = np.zeros(X.C, i64)                       # columns allocated
        self.issued = np.zeros(X.C, i64)                     # products, by CTA
        self.queue = []

    def place(self, taddr, rows, columns, ins):
        """Row and column of an address; the rectangle must be allocated."""
        row, column = (taddr >> u32(16)).astype(i64), (taddr & u32(0xFFFF)).astype(i64)
        if (row + rows > ROWS).any() or (column + columns > COLUMNS).any(): raise SimError(f'outside tensor memory at {ins}')
        return row, column

    def complete(self, cta, upto):
        """The products of a CTA up to a number are done, in order."""
        X = self.X
        for e in self.queue:
            g = np.flatnonzero((e['cta'] == cta) & (e['number'] <= upto) & ~e['done'])
            for k in g:
                rows, columns = e['rows'] + e['row'][k], e['column'][k] + np.arange(e['product'].shape[2])
                at = np.ix_([cta], rows, columns)
                before = np.ascontiguousarray(self.mem[at][0]).view(np.float32) if e['add'][k] else np.float32(0)
                self.mem[at] = (e['product'][k] + before).astype(np.float32).view(u32)
                for i in e['reads']: np.subtract.at(X.S.reading, i[k], 1)
                if e['left'] is not None and (self.mem[e['left'][0][k]] != e['left'][1][k]).any():
                    raise SimError(f'tensor memory that a product in flight reads was overwritten, product at {e["ins"]}')
                e['done'][k] = True
        self.queue = [e for e in self.queue if not e['done'].all()]


class Products:
    """The products of a CTA up to a number, as what the end of a phase makes visible."""
    def __init__(self, tensor, cta, upto): self.tensor, self.cta, self.upto, self.done = tensor, cta, upto, True

    def observe(self, warps): self.tensor.complete(self.cta, self.upto); return False


def compile_tcgen05(compiler, a, decode):
    """The closure of a tcgen05 instruction; `decode`: raw registers to numbers."""
    ins = compiler.i; kind = ins.parts[1]; name = '.'.join(ins.parts); ins.cls = 'tcgen05'; full = lambda X: FULL
    if 'cta_group::2' in ins.parts: raise PtxError(f'unsupported instruction {ins}')
    if kind == 'relinquish_alloc_permit' or kind.startswith(('fence', 'wait')): return lambda X: None
    if kind == 'alloc':
        ins.sync = full; g, n = compiler.addr(a[0])[0], compiler.src(a[1], 'u32')
        def alloc(X):
            T, first = X.tensor, X.warps(ins) * 32; cta = X.cta[first]; size = np.broadcast_to(n(X), X.T)[first].astype(i64)
            if len(np.unique(cta)) != len(cta): raise SimError(f'several warps of a CTA at {ins}')
            base = T.used[cta]; T.used[cta] += size
            if (T.used > COLUMNS).any(): raise SimError(f'more than {COLUMNS} columns of tensor memory at {ins}')
            at = np.broadcast_to(g(X), X.T)[first].astype(i64); X.store_shared(at, first, base.astype(u32), 4, ins)
            X.S.unfenced[(at + cta * X.S.pitch) // 16] = False   # taken to be the asynchronous proxy's own
        return alloc
    if kind == 'dealloc':
        ins.sync = full; n = compiler.src(a[1], 'u32')
        def dealloc(X): first = X.warps(ins) * 32; X.tensor.used[X.cta[first]] -= np.broadcast_to(n(X), X.T)[first].astype(i64)
        return dealloc
    if kind == 'commit':
        if 'mbarrier::arrive::one' not in ins.parts or len(a) > 1: raise PtxError(f'unsupported instruction {ins}')
        g = compiler.addr(a[0])[0]
        def commit(X):
            T, lanes = X.tensor, one_a_cta(X, ins); ad = np.broadcast_to(g(X), X.T)[lanes]
            for cta, at in zip(X.cta[lanes].tolist(), ad.tolist()):
                barrier = barrier_at(X, cta, at, ins); barrier.until(Products(T, cta, int(T.issued[cta]))); barrier.arrive(ins)
        return commit
    if kind in ('ld', 'st'): return compile_access(compiler, a, kind, ins)
    if kind == 'mma': return compile_product(compiler, a, decode, ins, name)
    raise PtxError(f'unsupported instruction {ins}')


def compile_access(compiler, a, kind, ins):
    shape = next((p for p in ins.parts if re.fullmatch(r'\d+x\d+b(x2)?', p)), '')
    if shape not in ('32x32b', '16x32bx2') or any(p.startswith(('pack', 'unpack', 'red')) for p in ins.parts):
        raise PtxError(f'unsupported instruction {ins}')
    ins.sync = lambda X: FULL
    a = list(a); registers, address = (a.pop(0), a.pop(0)) if kind == 'ld' else (a.pop(), a.pop(0))
    split = int(a[0]) if shape == '16x32bx2' else 0
    g, regs = compiler.addr(address)[0], compiler.vec(registers)
    found = [(compiler.dst if kind == 'ld' else compiler.src)(r, 'b32') for r in regs]
    rows, shift = (LANES, LANES * 0) if shape == '32x32b' else (LANES % 16, LANES // 16 * split)

    def run(X):
        T, W = X.tensor, X.warps(ins); v = np.broadcast_to(g(X), X.T).reshape(-1, 32)[W]
        if (v != v[:, :1]).any(): raise SimError(f'addresses that differ within a warp at {ins}')
        row, column = T.place(v[:, 0].astype(u32), rows.max() + 1, shift.max() + len(regs), ins)
        cta = X.cta[W * 32]
        if (row // 32 != X.warp[W * 32] % 4).any(): raise SimError(f'a warp outside its quarter of tensor memory at {ins}')
        if (column + shift.max() + len(regs) > T.used[cta]).any(): raise SimError(f'tensor memory that is not allocated at {ins}')
        for i, r in enumerate(found):
            at = cta[:, None], row[:, None] + rows[None], column[:, None] + shift[None] + i
            if kind == 'st': T.mem[at] = np.broadcast_to(r(X), X.T).reshape(-1, 32)[W]; continue
            X.put_warps(r, W, T.mem[at])
    return run


def compile_product(compiler, a, decode, ins, name):
    what = re.search(r'kind::(\w+)', name)[1]
    if what not in ('f16', 'tf32') or len(a) != 5 or 'ws' in ins.parts: raise PtxError(f'unsupported instruction {ins}')
    K = {'f16': 16, 'tf32': 8}[what]; ins.cls = 'mma'
    in_memory = a[1].strip().startswith('[')
    D, B, shape = compiler.addr(a[0])[0], compiler.src(a[2], 'b64'), compiler.src(a[3], 'u32')
    A = compiler.addr(a[1])[0] if in_memory else compiler.src(a[1], 'b64')
    add = compiler.src(a[4], 'pred') if not a[4].strip().isdigit() else lambda X: np.array([bool(int(a[4]))])

    def run(X):
        T, lanes = X.tensor, one_a_cta(X, ins); G, cta = len(lanes), X.cta[lanes]
        get = lambda s: np.broadcast_to(s(X), X.T)[lanes]
        d = np.unique(get(shape)); field = lambda at, bits: int(d[0]) >> at & (1 << bits) - 1
        types = {'f16': ['f16', 'bf16'], 'tf32': [None, None, 'tf32']}[what]
        if len(d) != 1 or field(0, 4) or field(4, 2) != 1 or field(7, 3) != field(10, 3) or field(13, 2) or field(30, 2):
            raise PtxError(f'unsupported instruction descriptor {int(d[0]):#x}, {ins}')
        ty, M, N = types[field(7, 3)], field(24, 5) * 16, field(17, 6) * 8
        if M not in (64, 128): raise PtxError(f'{M} rows, {ins}')
        row, column = T.place(get(D).astype(u32), 0, N, ins)
        if (column + N > T.used[cta]).any(): raise SimError(f'tensor memory that is not allocated at {ins}')
        rows = np.arange(M) if M == 128 else np.arange(M) // 16 * 32 + np.arange(M) % 16
        reads, left = [], None
        if in_memory:
            n = 8                                            # columns: 8 tf32, or 16 of 16 bits
            r, c = T.place(get(A).astype(u32), 0, n, ins)
            at = cta[:, None, None], r[:, None, None] + rows[None, :, None], c[:, None, None] + np.arange(n)
            bits = np.ascontiguousarray(T.mem[at]); left = [tuple(x[k] if x.shape[0] == G else x[0] for x in at) for k in range(G)], bits
            first = decode(bits, ty).astype(np.float64)
        else: first, i = read_operand(X, get(A), lanes, M, K, field(15, 1), ty, decode, ins); reads.append(i)
        second, i = read_operand(X, get(B), lanes, N, K, field(16, 1), ty, decode, ins); reads.append(i)
        T.issued[cta] += 1
        T.queue.append(dict(cta=cta, number=T.issued[cta].copy(), row=row, rows=rows, column=column, add=get(add), reads=reads, left=left,
                            product=first @ second.swapaxes(1, 2), done=np.zeros(G, bool), ins=ins))
        X.c['tensor_memory_flops'] += 2 * M * N * K * G
    return run
