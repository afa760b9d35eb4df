"""Products of warpgroups (wgmma, sm_90): operands in shared memory, results in flight until their group is waited for."""
import re
import numpy as np
from .parse import PtxError
from .mem import SimError, FULL, LANES, WARPGROUP
from .warpgroup import IN_FLIGHT, read_operand

u32, i64 = np.uint32, np.int64


class Products:
    """What the warpgroups of a batch have in flight."""

    def __init__(self, X):
        self.X, self.warps = X, X.T // 32
        self.groups = np.zeros(self.warps, i64)              # committed, by warp
        self.results = {}                                    # register -> values [T], group by warp (-1: none)
        self.reads = []                                      # (group, lanes, units) of operands in shared memory

    def warpgroups(self, ins):
        X = self.X; W = X.warps(ins)
        if X.NT % 128 or len(W) % 4 or (W.reshape(-1, 4) != W[::4, None] + np.arange(4)).any() or (W[::4] % 4).any():
            raise SimError(f'not whole warpgroups at {ins}')
        return W

    def operand(self, desc, W, rows, K, transposed, ty, decode, ins):
        """Matrices [G, rows, K] by descriptors."""
        X = self.X; v = np.broadcast_to(desc, X.T).reshape(-1, 32)[W].reshape(-1, 128)
        if (v != v[:, :1]).any(): raise SimError(f'descriptors that differ within a warpgroup at {ins}')
        first = W[::4] * 32
        matrices, i = read_operand(X, v[:, 0], first, rows, K, transposed, ty, decode, ins, self.code(first))
        lanes = np.repeat(first, i.shape[1])
        self.reads.append((self.groups[lanes // 32], lanes, i.reshape(-1), ins))
        return matrices

    def code(self, lanes): return WARPGROUP - 1 + self.X.warp[lanes] // 4

    def get(self, k, W):
        """Newest bits [len(W), 32] of a register, in flight or not."""
        v = np.broadcast_to(self.X.R[k], self.X.T).reshape(-1, 32)[W]
        if k in self.results:
            new, group = self.results[k]; v = np.where((group[W] >= 0)[:, None], new[W], v)
        return v

    def put(self, k, W, v):
        if k not in self.results: self.results[k] = np.zeros((self.warps, 32), u32), np.full(self.warps, -1, i64)
        new, group = self.results[k]
        new[W] = v; group[W] = self.groups[W]
        self.write(k, W, IN_FLIGHT)

    def write(self, k, W, v):
        r = np.array(np.broadcast_to(self.X.R[k], self.X.T)).reshape(-1, 32)
        r[W] = v; self.X.R[k] = r.reshape(-1)

    def commit(self, ins): self.groups[self.warpgroups(ins)] += 1

    def wait(self, n, ins):
        """Complete all but the n latest groups of the active warps."""
        X, W = self.X, self.warpgroups(ins); active = np.zeros(self.warps, bool); active[W] = True
        for k, (new, group) in self.results.items():
            done = np.flatnonzero(active & (group >= 0) & (group < self.groups - n))
            if len(done): self.write(k, done, new[done]); group[done] = -1
        keep = []
        for group, lanes, i, at in self.reads:
            done = active[lanes // 32] & (group < self.groups[lanes // 32] - n)
            if done.any():
                np.subtract.at(X.S.reading, i[done], 1)
                if X.S.check:                                # read until now: others may write after the next barrier
                    X.S.dirty[X.cta[lanes[done]]] = True; bad = X.S.note_read(i[done], self.code(lanes[done]), 16)
                    if bad is not None and bad.any(): X.race(bad, lanes[done], at, 'read by a wgmma of a word written')
            if not done.all(): keep.append((group[~done], lanes[~done], i[~done], at))
        self.reads = keep


def compile_wgmma(compiler, a, decode):
    """The closure of a wgmma instruction; `decode`: raw registers to numbers."""
    ins = compiler.i; kind = ins.parts[1]; ins.cls = 'other'; ins.sync = lambda X: FULL
    if kind == 'fence': return lambda X: None
    if kind == 'commit_group': return lambda X: X.products.commit(ins)
    if kind == 'wait_group': n = int(a[0]); return lambda X: X.products.wait(n, ins)
    N, K = (int(x) for x in re.search(r'm64n(\d+)k(\d+)', '.'.join(ins.parts)).groups())
    ts = compiler.types(); ty = ts[1]
    if kind != 'mma_async' or ts[0] != 'f32' or ts[1] != ts[2] or ty not in ('f16', 'bf16', 'tf32') or 'sp' in ins.parts:
        raise PtxError(f'unsupported instruction {ins}')
    ins.cls, ins.flops = 'mma', 2 * 16 * N * K               # a warp's share
    n = 1 if ty == 'tf32' else 2                             # elements of a register
    regs = lambda t: [compiler.look(x.strip()).idx for x in compiler.vec(t)]
    D, by_registers = regs(a[0]), a[1].strip().startswith('{')
    A = regs(a[1]) if by_registers else compiler.src(a[1], 'b64')
    B, scale = compiler.src(a[2], 'b64'), compiler.src(a[3], 'pred') if not a[3].strip().isdigit() else int(a[3])
    signs, turned = [int(x) for x in a[4:6]], [x.strip() == '1' for x in a[6:]]
    turned = [False] * (2 - len(turned)) + turned            # registers are not transposed, tf32 neither
    q, t = LANES // 4, LANES % 4
    where_a = [(np.repeat(q, n) + 8 * (i % 2), np.repeat(t, n) * n + np.tile(np.arange(n), 32) + 4 * n * (i // 2)) for i in range(4)]
    where_d = [(q + 8 * (i // 2 % 2), t * 2 + i % 2 + 8 * (i // 4)) for i in range(N // 2)]

    def run(X):
        P = X.products; W = P.warpgroups(ins); G = len(W) // 4
        if by_registers:
            left = np.empty((G, 4, 16, K))
            for k, (r, c) in zip(A, where_a):
                left[:, :, r, c] = decode(np.ascontiguousarray(np.broadcast_to(X.R[k], X.T).reshape(-1, 32)[W]), ty).reshape(G, 4, -1)
        else: left = P.operand(A(X), W, 64, K, turned[0], ty, decode, ins).reshape(G, 4, 16, K)
        right = P.operand(B(X), W, N, K, turned[1], ty, decode, ins)
        product = signs[0] * signs[1] * (left.reshape(G, 64, K) @ right.swapaxes(1, 2)).reshape(G, 4, 16, N)
        add = scale if isinstance(scale, int) else np.broadcast_to(scale(X), X.T).reshape(-1, 32)[W, :1]
        for k, (r, c) in zip(D, where_d):
            before = np.where(add, np.ascontiguousarray(P.get(k, W)).view(np.float32), np.float32(0))
            P.put(k, W, (product[:, :, r, c].reshape(-1, 32) + before).astype(np.float32).view(u32))
    return run
