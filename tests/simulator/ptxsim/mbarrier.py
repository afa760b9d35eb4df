"""mbarriers: phases that end when enough threads arrived and the bytes that were expected are there. One CTA alone."""
import numpy as np
from .parse import PtxError
from .mem import SimError

i64 = np.int64


class Barrier:
    """`ending`: by phase, what its end makes visible: objects with `observe(warps)`, true while others may still observe."""

    def __init__(self, count): self.count = self.left = count; self.bytes, self.phase, self.ending = 0, 0, {}

    def until(self, what): self.ending.setdefault(self.phase, []).append(what)

    def arrive(self, ins):
        self.left -= 1
        if self.left < 0: raise SimError(f'more arrivals than the mbarrier counts at {ins}')
        self.settle()

    def settle(self):
        if self.left == 0 and self.bytes == 0: self.left = self.count; self.phase += 1

    def observe(self, warps):
        """These warps of the CTA know that the phases before this one have ended."""
        for phase in [p for p in self.ending if p < self.phase]:
            rest = [x for x in self.ending.pop(phase) if x.observe(warps)]
            if rest: self.ending[phase] = rest


def one_a_cta(X, ins):
    """Active lanes, one of each CTA."""
    lanes = np.arange(X.T) if X.m is None else np.flatnonzero(X.m)
    if len(np.unique(X.cta[lanes])) != len(lanes): raise SimError(f'several threads of a CTA at {ins}')
    return lanes


def barrier_at(X, cta, address, ins):
    found = X.barriers.get((int(cta), int(address)))
    if found is None: raise SimError(f'no mbarrier at {int(address)} for {ins}')
    return found


def compile_mbarrier(compiler, a):
    ins = compiler.i; kind = ins.parts[1]; ins.cls = 'mbarrier'; p = set(ins.parts)
    waits, arrives = kind in ('try_wait', 'test_wait'), kind in ('arrive', 'expect_tx')
    a = list(a)
    if waits and 'parity' not in p or kind == 'arrive' and len(a) > 1 and a[0].strip() != '_' and not a[0].strip().startswith('[') \
            or 'noComplete' in p or 'shared::cluster' in p or not (waits or arrives or kind in ('init', 'inval')):
        raise PtxError(f'unsupported instruction {ins}')
    if kind == 'arrive' and a[0].strip() == '_': a.pop(0)
    put = compiler.dst(a.pop(0), 'pred') if waits else None
    g = compiler.addr(a.pop(0))[0]
    value = compiler.src(a[0], 'u32') if a else None         # count, bytes or parity; behind a parity may be a time
    expects = 'expect_tx' in p

    def run(X):
        lanes = one_a_cta(X, ins) if kind in ('init', 'inval') else np.arange(X.T) if X.m is None else np.flatnonzero(X.m)
        ad = np.broadcast_to(g(X), X.T)[lanes].astype(i64); ctas = X.cta[lanes]
        n = np.broadcast_to(value(X), X.T)[lanes].astype(i64) if value else np.ones(len(lanes), i64)
        if kind == 'init':
            if (ad % 8).any() or (ad + 8 > X.S.size).any(): raise SimError(f'bad address of an mbarrier at {ins}')
            for key, count in zip(zip(ctas.tolist(), ad.tolist()), n.tolist()): X.barriers[key] = Barrier(count)
        elif kind == 'inval':
            for key in zip(ctas.tolist(), ad.tolist()):
                if any(not x.done for w in barrier_at(X, *key, ins).ending.values() for x in w): raise SimError(f'inval of an mbarrier in use at {ins}')
                del X.barriers[key]
        elif arrives:
            for cta, at, k in zip(ctas, ad, n.tolist()):
                barrier = barrier_at(X, cta, at, ins)
                if expects: barrier.bytes += k
                for _ in range(0 if kind == 'expect_tx' else 1 if expects else k): barrier.arrive(ins)
                if kind == 'expect_tx': barrier.settle()
        else:
            out = np.zeros(X.T, bool); keys, where = np.unique(np.stack([ctas, ad]), axis=1, return_inverse=True)
            for k, (cta, at) in enumerate(zip(*keys.tolist())):
                barrier = barrier_at(X, cta, at, ins); mine = np.flatnonzero(where.reshape(-1) == k)
                done = (barrier.phase & 1) != n[mine] & 1; out[lanes[mine]] = done
                if done.any(): barrier.observe(np.unique(X.warp[lanes[mine[done]]]))
            put(X, out)
    return run
