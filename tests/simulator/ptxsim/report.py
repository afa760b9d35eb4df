"""Counters of a launch."""
import json
from collections import Counter
import numpy as np
from .mem import CONST, LOADED, STORED


class Report:
    """Counters of one launch; see README for the meaning of each. Counters that never fired read as 0."""
    KNOWN = {f'{sp}_{k}_bytes' for sp in ('global', 'shared', 'local') for k in ('load', 'store')} | \
        {f'global_{k}_{w}' for k in ('load', 'store') for w in ('sectors', 'bytes_unique_in_warp')} | \
        {'shared_wavefronts', 'shared_wavefronts_ideal', 'uninit_shared_reads', 'uninit_global_reads', 'global_atomics', 'shared_atomics',
         'atomic_same_address', 'bulk_load_bytes', 'bulk_store_bytes', 'divergent_branches', 'shfl_from_inactive_lane', 'cta_load_sectors', 'cta_store_sectors'}
    def __init__(self, L):
        p, c = L.prog, L.c
        w, t = np.cumsum(L.cnt_w)[:-1], np.cumsum(L.cnt_t)[:-1]
        self.kernel, self.grid, self.block, self.shared_bytes = p.name, L.grid, L.block, L.shared
        cls, thr = Counter(), Counter()
        fl = mf = 0
        for i, a, b in zip(p.code, w.tolist(), t.tolist()):
            if i.op in ('nop',): continue
            cls[i.cls] += a; thr[i.cls] += b
            if i.cls == 'mma': mf += i.flops * a
            else: fl += i.flops * b
        self.instructions, self.thread_instructions = dict(cls), dict(thr)
        self.warp_instructions, self.mma_flops, self.fp_flops = sum(cls.values()), mf + c['tensor_memory_flops'], fl
        G = L.G; self.tensors = {}
        tl = ts = sl = ss = 0
        for x in G.tensors:
            s = G.shadow(x.off, x.size)
            d = dict(x.ctr, size=x.size, unique_load_bytes=int(np.count_nonzero(s & LOADED)), unique_store_bytes=int(np.count_nonzero(s & STORED)))
            self.tensors[x.name if x.name not in self.tensors else f'{x.name}@{x.off}'] = d
        sh = G.shadow()
        ld, st = (sh & LOADED) != 0, (sh & STORED) != 0
        notc = (sh & CONST) == 0
        self.unique_load_bytes, self.unique_store_bytes = int((ld & notc).sum()), int(st.sum())
        self.unique_load_sectors, self.unique_store_sectors = int((ld & notc).reshape(-1, 32).any(1).sum()), int(st.reshape(-1, 32).any(1).sum())
        self.counters = {k: int(v) for k, v in sorted(c.items())}
        for k in ('load', 'store'):
            n = c[f'global_{k}_sectors']
            setattr(self, f'{k}_efficiency', c[f'global_{k}_bytes_unique_in_warp'] / (32 * n) if n else None)
        self.bank_conflicts = c['shared_wavefronts'] - c['shared_wavefronts_ideal']
        self.shared_races, self.race_examples, self.block_steps = c['shared_races'], list(L.races), L.steps
        self._prog, self._w, self._lines = p, w, L.lines

    def __getattr__(self, k):
        if k in self.KNOWN or k in self.__dict__.get('counters', ()): return self.counters.get(k, 0)
        raise AttributeError(k)

    def to_dict(self): return {k: v for k, v in self.__dict__.items() if not k.startswith('_')}
    def to_json(self): return json.dumps(self.to_dict(), indent=1, default=float)

    def profile(self, top=20, by='loc'):
        """Rows (where, warp instructions, global sectors, bank conflicts), by source line or PTX line."""
        key = (lambda i: i.loc or f'ptx:{i.line}') if by == 'loc' else (lambda i: f'{i.line}: {i.text}')
        n, ex = Counter(), {}
        for i, a in zip(self._prog.code, self._w.tolist()): n[key(i)] += a
        for (i, k), v in self._lines.items(): ex.setdefault(key(i), Counter())[k] += v
        return [(k, v, dict(ex.get(k, {}))) for k, v in n.most_common(top)]

    def __str__(self):
        c = self.counters; mb = lambda b: f'{b:,}'
        eff = lambda e: '-' if e is None else f'{100 * e:.1f}%'
        o = [f'{self.kernel}: grid {self.grid} block {self.block} shared {self.shared_bytes} B, {self.warp_instructions:,} warp instructions',
             '  by class: ' + ', '.join(f'{k} {v:,}' for k, v in sorted(self.instructions.items(), key=lambda x: -x[1]) if v),
             f'  flops: mma {self.mma_flops:,}, fp {self.fp_flops:,}']
        for k in ('load', 'store'):
            o.append(f'  global {k}: {mb(c.get(f"global_{k}_bytes", 0))} B requested, {c.get(f"global_{k}_sectors", 0):,} sectors, '
                     f'efficiency {eff(getattr(self, k + "_efficiency"))}, unique {mb(getattr(self, f"unique_{k}_bytes"))} B')
        o.append(f'  shared: wavefronts {c.get("shared_wavefronts", 0):,} (ideal {c.get("shared_wavefronts_ideal", 0):,}), races {self.shared_races}, '
                 f'uninitialised reads {c.get("uninit_shared_reads", 0)}; atomics global {c.get("global_atomics", 0):,} shared {c.get("shared_atomics", 0):,}; '
                 f'divergent branches {c.get("divergent_branches", 0):,}')
        for n, t in self.tensors.items():
            o.append(f'    {n}: size {t["size"]:,}, load {t["load_bytes"]:,} B/{t["load_sectors"]:,} sec/unique {t["unique_load_bytes"]:,}, '
                     f'store {t["store_bytes"]:,} B/{t["store_sectors"]:,} sec/unique {t["unique_store_bytes"]:,}')
        return '\n'.join(o + ['  race: ' + r for r in self.race_examples])
