"""The state of a batch: registers, masks, memory operations of all lanes."""
import numpy as np
from .parse import PtxError, BITS, GBASE, SHWIN, LOWIN
from .mem import (Shared, SimError, U, MAPPED, INIT, LOADED, STORED, CONST, rep, rows, bank_wavefronts)
from .ops import RAW, u64, i64
from .bulk import Bulk
from .tcgen05 import TensorMemory
from .wgmma import Products


class State:
    """All lanes of a batch of CTAs; lane = (cta * warps_per_cta + warp) * 32 + lane_in_warp."""
    WIN = {'global': 0, 'shared': SHWIN, 'local': LOWIN}

    def __init__(self, L, first, ncta):
        self.L, self.prog, self.G, self.c, self.kparams = L, L.prog, L.G, L.c, L.kparams
        self.NT = -(-L.nthreads // 32) * 32
        self.C, self.T, self.first = ncta, ncta * self.NT, first
        self.S = Shared(ncta, L.shared, L.check_races, L.nthreads)
        n = len(L.prog.regs)
        poison = {b: np.array([0xBADC0FFEE0DDF00D & ((1 << b) - 1)], RAW[b]) for b in (8, 16, 32, 64)}
        poison[1] = np.zeros(1, bool)
        self.R = [poison[BITS[r.ty]] for r in L.prog.regs]
        self.P = [np.zeros((self.T, s), np.uint8) for s in L.prog.pvars]
        self.lmem = np.full((self.T, max(16, -(-L.prog.local_size // 16) * 16)), 0xA5, np.uint8) if L.prog.local_size else None
        self.alive = np.tile(np.arange(self.NT) < L.nthreads, ncta)
        self.warp = np.arange(self.T) // 32 % (self.NT // 32)
        self.cta = np.arange(self.T) // self.NT
        self.cc = np.zeros(1, bool)
        self.m = self.w = None
        self.sectors = {'load': [], 'store': []}               # (cta << 40 | sector) keys, only with cta_sectors
        self.cp_n, self.cp_q, self.sp, self.clock = np.zeros(self.T, np.int32), [], {}, 0
        self.products = Products(self) if 'wgmma' in L.asynchronous else None
        self.tensor = TensorMemory(self) if 'tcgen05' in L.asynchronous else None
        self.proxy = bool(L.asynchronous)
        self.barriers = {}                                   # mbarriers, by (CTA, address)
        if self.proxy: self.S.reading, self.S.unfenced = np.zeros(len(self.S.mem) // 16, np.int32), np.zeros(len(self.S.mem) // 16, bool)
        self.bulk = Bulk(self) if 'bulk' in L.asynchronous else None

    # ---- masks
    def push(self, m):
        """Activate exactly the lanes of m (bool array or None)."""
        if m is None or m.all(): self.m = self.w = None
        else:
            self.m = m
            self.w = None if not (self.alive & ~m).any() else m

    def nwarps(self): return self.T // 32 if self.m is None else int(self.m.reshape(-1, 32).any(1).sum())
    def nact(self): return self.T if self.m is None else int(np.count_nonzero(self.m))

    def who(self, lane=None):
        if lane is None: lane = 0 if self.m is None else int(self.m.argmax())
        L = self.L; ct = self.first + lane // self.NT; t = lane % self.NT
        cta = (ct % L.grid[0], ct // L.grid[0] % L.grid[1], ct // L.grid[0] // L.grid[1])
        tid = (t % L.block[0], t // L.block[0] % L.block[1], t // L.block[0] // L.block[1])
        return f'CTA {cta} thread {tid} (warp {t // 32}, lane {t % 32})'

    def special(self, name):
        if name in self.sp: return self.sp[name]
        L = self.L; b, _, ax = name[1:].partition('.'); k = 'xyz'.find(ax) if ax else 0
        t = np.arange(self.T) % self.NT; c = self.first + self.cta
        one = lambda v: np.array([v], u64)
        div = [1, L.block[0], L.block[0] * L.block[1]]; gd = [1, L.grid[0], L.grid[0] * L.grid[1]]
        if b == 'tid': v = t // div[k] % L.block[k] if k < 2 else t // div[2]
        elif b == 'ctaid': v = c // gd[k] % L.grid[k] if k < 2 else c // gd[2]
        elif b == 'ntid': v = one(L.block[k])
        elif b == 'nctaid': v = one(L.grid[k])
        elif b == 'laneid': v = t % 32
        elif b == 'warpid': v = t // 32
        elif b == 'nwarpid': v = one(self.NT // 32)
        elif b == 'smid': v = c % 108
        elif b == 'nsmid': v = one(108)
        elif b in ('gridid', 'envreg', 'cluster_ctarank', 'cluster_ctaid', 'clusterid'): v = one(0)
        elif b in ('cluster_nctarank', 'cluster_nctaid'): v = one(1)
        elif b == 'dynamic_smem_size': v = one(L.dyn_shared)
        elif b == 'total_smem_size': v = one(L.shared)
        elif b.startswith('lanemask_'):
            l = (t % 32).astype(u64); one_ = u64(1) << l
            v = {'eq': one_, 'lt': one_ - u64(1), 'le': (one_ << u64(1)) - u64(1), 'gt': ~((one_ << u64(1)) - u64(1)) & u64(0xFFFFFFFF),
                 'ge': ~(one_ - u64(1)) & u64(0xFFFFFFFF)}[b[9:]]
        elif b.startswith(('clock', 'globaltimer')): self.clock += 1; return one(self.L.steps * 32 + self.clock)
        else: raise PtxError(f'unknown special register {name}')
        v = v.astype(u64)
        if self.C == 1 and b == 'ctaid' or v.size > 1 and b == 'ctaid' and L.grid[k] == 1: v = v[:1]
        self.sp[name] = v
        return v

    def note(self, what, ins): self.c['note:' + what] += 1
    def line(self, ins, key, n):
        if n: self.L.lines[(ins, key)] += int(n)

    # ---- lanes and addresses
    def active(self, ad):
        """Active lane numbers (None = all) and their addresses."""
        if self.m is None: return None, np.broadcast_to(ad, self.T)
        lanes = np.flatnonzero(self.m)
        return lanes, (np.broadcast_to(ad, len(lanes)) if ad.size == 1 else ad[lanes])

    def fault(self, what, bad, lanes, ins):
        k = int(np.argmax(bad)); lane = k if lanes is None else int(lanes[k])
        raise SimError(f'{what} by {self.who(lane)} [{int(bad.sum())} lane(s)] at {ins}')

    def which(self, ad):
        _, a = self.active(ad)
        k = (a >> u64(40)).astype(i64)
        s, l = k == SHWIN >> 40, k == LOWIN >> 40
        if s.all(): return 'shared'
        if l.all(): return 'local'
        return 'mixed' if (s | l).any() else 'global'

    def split_spaces(self, ad):
        m = np.ones(self.T, bool) if self.m is None else self.m
        k = (np.broadcast_to(ad, self.T) >> u64(40)).astype(i64)
        s, l = k == SHWIN >> 40, k == LOWIN >> 40
        return [(n, mm) for n, mm in (('shared', m & s), ('local', m & l), ('global', m & ~s & ~l)) if mm.any()]

    def global_index(self, a, lanes, total, ins, kind):
        """Checked arena offsets (int64); marks the shadow."""
        G = self.G
        off = (a - u64(GBASE)).view(i64) if a.flags.c_contiguous else np.ascontiguousarray(a - u64(GBASE)).view(i64)
        bad = (off < 0) | (off > G.size)
        if bad.any(): self.fault(f'{kind} outside all tensors: {G.describe(int(off[bad][0]))}', bad, lanes, ins)
        if (off % total).any():
            bad = off % total != 0
            self.fault(f'misaligned {total}-byte {kind}: {G.describe(int(off[bad][0]))}', bad, lanes, ins)
        i = off // total if total > 1 else off
        sv = G.sv[total]; sh = sv[i]
        need = rep(MAPPED | (INIT if kind != 'store' else 0), total)
        if (sh & need != need).any():
            ok = (sh & need) == need; ok = ok.all(1) if ok.ndim > 1 else ok
            o = int(off[~ok][0]); mm = rep(MAPPED, total); s1 = sh[~ok][0]
            un = ((s1 & mm) != mm).any()
            if un or self.L.check_uninit:
                self.fault(f'out-of-bounds {kind} of {total} bytes: {G.describe(o)}' if un else
                           f'uninitialised {kind} of {total} bytes: {G.describe(o)}', ~ok, lanes, ins)
            self.c['uninit_global_reads'] += int((~ok).sum())
        if kind == 'store' and (sh & rep(CONST, total)).any(): self.fault('store to constant data', np.ones(1, bool), lanes, ins)
        if self.L.cta_sectors:
            if lanes is None and len(off) == 1: ct = np.arange(self.C) if self.m is None else np.unique(self.cta[self.m])
            else: ct = self.cta if lanes is None else self.cta[lanes]
            key = np.unique((ct.astype(i64) << 40) | (np.broadcast_to(off, len(ct)) >> 5))
            for k in ('load', 'store') if kind == 'atomic' else (kind,): self.sectors[k].append(key)
        sv[i] = sh | rep({'load': LOADED, 'store': STORED | INIT, 'atomic': LOADED | STORED}[kind], total)
        return off, i

    def shared_index(self, addr, lanes, total, ins, read, changed=None, warp=None):
        """Checked row numbers (of `total` bytes) in the batch's shared memory; addr int64 per active lane. `warp`: other
        names for the race check than the lanes' warps."""
        S = self.S
        bad = (addr < 0) | (addr + total > S.size)
        if bad.any(): self.fault(f'shared access out of bounds: offset {int(addr[bad][0])} + {total} > {S.size}', bad, lanes, ins)
        bad = addr % total != 0
        if bad.any(): self.fault(f'misaligned {total}-byte shared access at offset {int(addr[bad][0])}', bad, lanes, ins)
        ct = self.cta if lanes is None else self.cta[lanes]
        i = (addr + ct * S.pitch) // total
        if self.bulk and self.bulk.flights: self.bulk.touch(i * total // 16, lanes, ins)
        if read:
            ini = S.iv[total][i]; one = rep(1, total)
            if (ini != one).any():
                bad = ini != one; bad = bad.any(1) if bad.ndim > 1 else bad
                if self.L.check_uninit == 'strict': self.fault('uninitialised shared read', bad, lanes, ins)
                self.c['uninit_shared_reads'] += int(bad.sum()); self.line(ins, 'uninit_shared_reads', int(bad.sum()))
        elif self.proxy:
            u = i * total // 16; S.unfenced[u] = True
            if S.reading[u].any(): self.fault('write to shared memory that a product in flight reads', S.reading[u] > 0, lanes, ins)
        if S.check and changed is not False:
            S.dirty[ct] = True
            w = warp if warp is not None else self.warp if lanes is None else self.warp[lanes]
            bad = S.note_atomic(i, w, total) if changed == 'atomic' else S.note_read(i, w, total) if read else S.note_write(i, w, total, (True, True) if changed is None else changed(i))
            if bad is not None and bad.any(): self.race(bad, lanes, ins, 'atomic on a word accessed' if changed == 'atomic' else 'read of a word written' if read else 'write of a word accessed')
        return i

    def race(self, bad, lanes, ins, what):
        self.c['shared_races'] += int(bad.sum()); self.line(ins, 'shared_races', int(bad.sum()))
        if len(self.L.races) < 10:
            k = int(bad.argmax()); lane = k if lanes is None else int(lanes[k])
            self.L.races.append(f'{what} by another warp since the last barrier: {self.who(lane)} at {ins}')
        if self.L.check_races == 'error': raise SimError('shared-memory race: ' + self.L.races[-1])

    # ---- loads and stores
    def load(self, space, ad, total, esz, ins, count=True):
        """Returns a list of raw arrays, one per vector element."""
        n, raw = total // esz, U[esz]
        if space == 'global':
            if ad.size == 1:
                off, i = self.global_index(ad, None, total, ins, 'load')
                if count:
                    na, nw = self.nact(), self.nwarps(); c = self.c; t = self.G.find(int(off[0]))
                    c['global_load_bytes'] += na * total; c['global_load_bytes_unique_in_warp'] += nw * total; c['global_load_sectors'] += nw
                    t.ctr['load_bytes'] += na * total; t.ctr['load_sectors'] += nw
                    self.line(ins, 'global_sectors', nw); self.line(ins, 'global_bytes', na * total)
                v = np.ascontiguousarray(self.G.mv[total][i]).view(raw).reshape(1, n)
                return [v[:, j] for j in range(n)]
            lanes, a = self.active(ad)
            off, i = self.global_index(a, lanes, total, ins, 'load')
            if count: self.line(ins, 'global_sectors', self.G.attribute(off, lanes, self.T, total, 'load', self.c)); self.line(ins, 'global_bytes', len(off) * total)
            v = self.G.mv[total][i]
        elif space == 'shared':
            lanes, a = self.active(ad); a = a.astype(i64)
            i = self.shared_index(a, lanes, total, ins, True)
            self.banks(a, lanes, total, ins, 'load'); v = self.S.mv[total][i]
        else:
            lanes, a = self.active(ad); v = self.local(a.astype(i64), lanes, total, ins)[0]
            self.c['local_load_bytes'] += len(a) * total
        v = np.ascontiguousarray(v).view(raw).reshape(-1, n)
        cols = np.ascontiguousarray(v.T) if n > 1 else v.T
        if lanes is None: return list(cols)
        out = np.zeros((n, self.T), raw); out[:, lanes] = cols
        return list(out)

    def store(self, space, ad, vals, total, esz, ins):
        lanes, a = self.active(ad); k, raw = len(a), U[esz]
        v = np.empty((k, total // esz), raw)
        for j, x in enumerate(vals): v[:, j] = x if x.size == 1 else x if lanes is None else x[lanes]
        v = v.view(np.uint8 if total == 1 else U[min(total, 8)])
        v = v if total > 8 else v[:, 0]
        if space == 'global':
            off, i = self.global_index(a, lanes, total, ins, 'store')
            self.line(ins, 'global_sectors', self.G.attribute(off, lanes, self.T, total, 'store', self.c)); self.line(ins, 'global_bytes', len(off) * total)
            self.G.mv[total][i] = v
        elif space == 'shared':
            a = a.astype(i64); self.store_shared(a, lanes, v, total, ins)
            self.banks(a, lanes, total, ins, 'store')
        else:
            mv, r = self.local(a.astype(i64), lanes, total, ins)[1:]; mv[r] = v
            self.c['local_store_bytes'] += k * total

    def store_shared(self, a, lanes, v, total, ins):
        S = self.S; mv = S.mv[total]
        def changed(i):
            d = mv[i] != v; mv[i] = v
            e = mv[i] != v
            return (d.any(1), e.any(1)) if d.ndim > 1 else (d, e)
        i = self.shared_index(a, lanes, total, ins, False, changed if S.check else None)
        mv[i] = v; S.iv[total][i] = rep(1, total)

    def fence_proxy(self):
        """Writes so far become visible to the asynchronous proxy; of whole CTAs, though a thread speaks for what it knows."""
        if not self.proxy: return
        for c in range(self.C) if self.m is None else np.unique(self.cta[self.m]): self.S.unfenced[c * self.S.pitch // 16:(c + 1) * self.S.pitch // 16] = False

    def local(self, a, lanes, total, ins):
        size = 0 if self.lmem is None else self.lmem.shape[1]
        bad = (a < 0) | (a + total > size) | (a % total != 0)
        if bad.any(): self.fault(f'bad local access at offset {int(a[bad][0])}', bad, lanes, ins)
        r = ((np.arange(self.T) if lanes is None else lanes) * size + a) // total
        mv = rows(self.lmem.reshape(-1), total)
        return mv[r], mv, r

    def banks(self, a, lanes, total, ins, kind):
        w, ideal = bank_wavefronts(a, lanes, self.T, total)
        self.c['shared_wavefronts'] += w; self.c['shared_wavefronts_ideal'] += ideal
        self.c[f'shared_{kind}_bytes'] += len(a) * total; self.line(ins, 'bank_conflicts', w - ideal)

    def atomic(self, space, ad, vals, w, dt, fn, fast, want, ins):
        lanes, a = self.active(ad)
        vals = [np.broadcast_to(v, self.T) if lanes is None else (np.broadcast_to(v, len(lanes)) if v.size == 1 else v[lanes]) for v in vals]
        if space == 'global':
            off, i = self.global_index(a, lanes, w, ins, 'atomic'); mv = self.G.mv[w]
            self.G.find(int(off[0])).ctr['atomic_ops'] += len(off)
        elif space == 'shared':
            i = self.shared_index(a.astype(i64), lanes, w, ins, True, 'atomic'); mv = self.S.mv[w]; self.S.iv[w][i] = rep(1, w)
        else: raise PtxError(f'atomic on local memory, {ins}')
        n = len(i); self.c[f'{space}_atomics'] += n; mv = mv.view(dt)
        old = np.zeros(n, dt) if want else None
        if fast is not None: fast(mv, i, vals[0]); uniq = 0
        else:
            order = np.argsort(i, kind='stable'); si = i[order]
            first = np.r_[True, si[1:] != si[:-1]]
            rank = np.arange(n) - np.maximum.accumulate(np.where(first, np.arange(n), 0))
            byrank = np.argsort(rank, kind='stable'); cuts = np.searchsorted(rank[byrank], np.arange(rank.max() + 2))
            for r in range(len(cuts) - 1):                     # the r-th operation on each address
                k = order[byrank[cuts[r]:cuts[r + 1]]]
                o = mv[i[k]]
                if want: old[k] = o
                mv[i[k]] = fn(o, *[v[k] for v in vals])
        addr_conf = n - len(np.unique(i)); self.c['atomic_same_address'] += addr_conf
        if not want: return None
        if lanes is None: return old
        out = np.zeros(self.T, dt); out[lanes] = old
        return out

    # ---- cp.async: data reach shared memory only when their group is waited for
    def cp_async(self, dst, src, size, ss, ins):
        lanes, d = self.active(dst); d = d.astype(i64)
        _, s = self.active(src)
        data = np.zeros((len(d), size), np.uint8)
        n = np.full(len(d), size) if ss is None else np.broadcast_to(ss, self.T)[slice(None) if lanes is None else lanes].astype(i64)
        lane_no = np.arange(self.T) if lanes is None else lanes
        for k in np.unique(n):
            if k == 0: continue
            if k not in (1, 2, 4, 8, 16): raise PtxError(f'cp.async of {k} source bytes, {ins}')
            sel = n == k; sl = lane_no[sel]
            off, i = self.global_index(s[sel], sl, int(k), ins, 'load')
            self.line(ins, 'global_sectors', self.G.attribute(off, sl, self.T, int(k), 'load', self.c)); self.line(ins, 'global_bytes', len(off) * int(k))
            data[sel, :k] = np.ascontiguousarray(self.G.mv[int(k)][i]).view(np.uint8).reshape(-1, k)
        row = self.shared_index(d, lanes, size, ins, False)    # counted as a write from now on
        self.S.iv[size][row] = 0
        self.banks(d, lanes, size, ins, 'store')
        self.cp_q.append((lane_no, self.cp_n[lane_no], row, data, size))

    def cp_commit(self):
        if self.m is None: self.cp_n += 1
        else: self.cp_n[self.m] += 1

    def cp_wait(self, n):
        """Complete all but the n latest groups of the active lanes (n < 0: everything)."""
        keep = []
        for e in self.cp_q:
            lanes, grp, row, data, size = e
            done = np.ones(len(lanes), bool) if n < 0 else grp < self.cp_n[lanes] - n
            if self.m is not None: done &= self.m[lanes]
            if not done.any(): keep.append(e); continue
            r, dd = row[done], np.ascontiguousarray(data[done])
            self.S.mv[size][r] = dd.view(U[min(size, 8)]).reshape(self.S.mv[size][r].shape)
            self.S.iv[size][r] = rep(1, size)
            if self.proxy: self.S.unfenced[r * size // 16] = True
            if self.S.check:                       # other warps may read these bytes only after the next barrier
                w = self.warp[lanes[done]]; self.S.wv[size][r] = self.S._warpmul(w, size); self.S.dirty[self.cta[lanes[done]]] = True
            if not done.all(): k = ~done; keep.append((lanes[k], grp[k], row[k], data[k], size))
        self.cp_q = keep

    # ---- warp-collective helpers
    def warps(self, ins):
        """Numbers of the active warps; every one must be complete."""
        if self.m is None: return np.arange(self.T // 32)
        a = self.m.reshape(-1, 32); any_, all_ = a.any(1), a.all(1)
        if (any_ != all_).any():
            raise SimError(f'warp-wide instruction with a partial warp ({self.who(int((any_ != all_).argmax()) * 32)}) at {ins}')
        return np.flatnonzero(any_)

    def put_warps(self, d, W, v):
        if len(W) * 32 == self.T: d(self, np.ascontiguousarray(v).reshape(-1)); return
        out = np.zeros((self.T // 32, 32), v.dtype); out[W] = v
        d(self, out.reshape(-1))
