"""Single PTX instructions against Python integer/fraction references."""
import os, sys
import math, numpy as np, pytest, torch
from tests.simulator.ptxsim import run, PtxError

N = 256
rng = np.random.default_rng(0)
SP = np.array([0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFF, 0x8000, 64], np.uint64)
def ints(bits):
    v = rng.integers(0, 1 << 63, N, dtype=np.uint64) * 2 + rng.integers(0, 2, N, dtype=np.uint64)
    v[:40] = SP[rng.integers(0, len(SP), 40)]; v[40:90] &= np.uint64(63)
    return (v & np.uint64((1 << bits) - 1)).astype(np.dtype(f'u{bits // 8}'))


def execute(body, ins, out_bits, regs=''):
    """body uses %a0.. (inputs) and writes %o; register widths follow the arrays."""
    p = [f'.param .u64 p{j}' for j in range(len(ins) + 1)]
    t = '.version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(' + ', '.join(p) + ')\n{\n.reg .b64 %x<4>;\n.reg .b32 %t, %u;\n.reg .pred %p, %q;\n' + regs
    t += ''.join(f'.reg .b{a.itemsize * 8} %a{j};\n' for j, a in enumerate(ins)) + f'.reg .b{out_bits} %o;\nmov.u32 %t, %tid.x;\n'
    for j, a in enumerate(ins): t += f'ld.param.u64 %x0, [p{j}];\nmad.wide.u32 %x0, %t, {a.itemsize}, %x0;\nld.global.b{a.itemsize * 8} %a{j}, [%x0];\n'
    t += body + f'\nld.param.u64 %x0, [p{len(ins)}];\nmad.wide.u32 %x0, %t, {out_bits // 8}, %x0;\nst.global.b{out_bits} [%x0], %o;\nret;\n}}\n'
    o = np.zeros(N, np.dtype(f'u{out_bits // 8}')); run(t, 'k', 1, N, [*ins, o]); return o


S = lambda v, w: v - (1 << w) if v >> (w - 1) & 1 else v
M = lambda v, w=32: v & ((1 << w) - 1)
def bfe(a, p, l, w, sg):
    p, l = p & 255, l & 255
    if l == 0: return 0
    sb = (a >> min(p + l - 1, w - 1)) & 1 if sg else 0
    return sum(((a >> (p + i) & 1) if i < l and p + i < w else sb) << i for i in range(w))
def bfi(a, b, p, l, w):
    p, l = p & 255, l & 255
    for i in range(l):
        if p + i < w: b = b & ~(1 << (p + i)) | ((a >> i & 1) << (p + i))
    return b
def prmt(a, b, c, mode):
    by = [(M(a) | M(b) << 32) >> 8 * i & 255 for i in range(8)]
    if mode: return sum(by[mode[c & 3][j]] << 8 * j for j in range(4))
    o = 0
    for j in range(4):
        s = c >> 4 * j & 15; v = by[s & 7]; o |= ((255 if v & 128 else 0) if s & 8 else v) << 8 * j
    return o
PM = {'.f4e': [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]], '.b4e': [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
      '.rc8': [[i] * 4 for i in range(4)], '.ecl': [[max(q, j) for j in range(4)] for q in range(4)], '.ecr': [[min(q, j) for j in range(4)] for q in range(4)],
      '.rc16': [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]]}
def bfind(a, sg, w, amt=False):
    if sg and a >> (w - 1): a = M(~a, w)
    n = a.bit_length() - 1
    return M(-1) if n < 0 else w - 1 - n if amt else n
def szext(a, n, sg): return M(a) if n >= 32 else 0 if n == 0 else M(S(a & ((1 << n) - 1), n)) if sg else a & ((1 << n) - 1)

INT = {  # instruction: (input widths, output width, reference)
    'bfe.u32 %o, %a0, %a1, %a2;': ((32, 32, 32), 32, lambda a, b, c: bfe(a, b, c, 32, 0)), 'bfe.s32 %o, %a0, %a1, %a2;': ((32, 32, 32), 32, lambda a, b, c: bfe(a, b, c, 32, 1)),
    'bfe.u64 %o, %a0, %a1, %a2;': ((64, 32, 32), 64, lambda a, b, c: bfe(a, b, c, 64, 0)), 'bfe.s64 %o, %a0, %a1, %a2;': ((64, 32, 32), 64, lambda a, b, c: bfe(a, b, c, 64, 1)),
    'bfi.b32 %o, %a0, %a1, %a2, %a3;': ((32,) * 4, 32, lambda a, b, p, l: bfi(a, b, p, l, 32)), 'bfi.b64 %o, %a0, %a1, %a2, %a3;': ((64, 64, 32, 32), 64, lambda a, b, p, l: bfi(a, b, p, l, 64)),
    'shf.l.wrap.b32 %o, %a0, %a1, %a2;': ((32,) * 3, 32, lambda a, b, c: M(((b << 32 | a) << (c & 31)) >> 32)), 'shf.r.wrap.b32 %o, %a0, %a1, %a2;': ((32,) * 3, 32, lambda a, b, c: M((b << 32 | a) >> (c & 31))),
    'shf.l.clamp.b32 %o, %a0, %a1, %a2;': ((32,) * 3, 32, lambda a, b, c: M(((b << 32 | a) << min(c, 32)) >> 32)), 'shf.r.clamp.b32 %o, %a0, %a1, %a2;': ((32,) * 3, 32, lambda a, b, c: M((b << 32 | a) >> min(c, 32))),
    'shl.b32 %o, %a0, %a1;': ((32, 32), 32, lambda a, b: M(a << min(b, 32))), 'shr.u64 %o, %a0, %a1;': ((64, 32), 64, lambda a, b: a >> min(b, 64)),
    'shr.s32 %o, %a0, %a1;': ((32, 32), 32, lambda a, b: M(S(a, 32) >> min(b, 31))), 'shr.s16 %o, %a0, %a1;': ((16, 32), 16, lambda a, b: M(S(a, 16) >> min(b, 15), 16)),
    'clz.b64 %o, %a0;': ((64,), 32, lambda a: 64 - a.bit_length()), 'popc.b64 %o, %a0;': ((64,), 32, lambda a: bin(a).count('1')), 'brev.b64 %o, %a0;': ((64,), 64, lambda a: int(f'{a:064b}'[::-1], 2)),
    'bfind.u32 %o, %a0;': ((32,), 32, lambda a: bfind(a, 0, 32)), 'bfind.s64 %o, %a0;': ((64,), 32, lambda a: bfind(a, 1, 64)), 'bfind.shiftamt.u32 %o, %a0;': ((32,), 32, lambda a: bfind(a, 0, 32, True)),
    'szext.clamp.s32 %o, %a0, %a1;': ((32, 32), 32, lambda a, n: szext(a, n, 1)), 'szext.wrap.u32 %o, %a0, %a1;': ((32, 32), 32, lambda a, n: szext(a, n & 31, 0)),
    'bmsk.clamp.b32 %o, %a0, %a1;': ((32, 32), 32, lambda a, b: M(((1 << min(b, 32)) - 1) << min(a, 32))),
    'prmt.b32 %o, %a0, %a1, %a2;': ((32,) * 3, 32, lambda a, b, c: prmt(a, b, c, None)), **{f'prmt.b32{m} %o, %a0, %a1, %a2;': ((32,) * 3, 32, lambda a, b, c, t=t: prmt(a, b, c, t)) for m, t in PM.items()},
    'mul.hi.s64 %o, %a0, %a1;': ((64, 64), 64, lambda a, b: M(S(a, 64) * S(b, 64) >> 64, 64)), 'mul.wide.s16 %o, %a0, %a1;': ((16, 16), 32, lambda a, b: M(S(a, 16) * S(b, 16))),
    'mad.hi.u32 %o, %a0, %a1, %a2;': ((32,) * 3, 32, lambda a, b, c: M((a * b >> 32) + c)), 'mad.wide.s32 %o, %a0, %a1, %a2;': ((32, 32, 64), 64, lambda a, b, c: M(S(a, 32) * S(b, 32) + c, 64)),
    'mul24.lo.s32 %o, %a0, %a1;': ((32, 32), 32, lambda a, b: M(S(a & 0xFFFFFF, 24) * S(b & 0xFFFFFF, 24))), 'sad.s32 %o, %a0, %a1, %a2;': ((32,) * 3, 32, lambda a, b, c: M(abs(S(a, 32) - S(b, 32)) + c)),
    'add.sat.s32 %o, %a0, %a1;': ((32, 32), 32, lambda a, b: M(max(-2**31, min(2**31 - 1, S(a, 32) + S(b, 32))))), 'rem.s32 %o, %a0, %a1;': ((32, 32), 32, lambda a, b: a if b == 0 else M(int(math.fmod(S(a, 32), S(b, 32))))),
    'div.u64 %o, %a0, %a1;': ((64, 64), 64, lambda a, b: M(-1, 64) if b == 0 else a // b), 'abs.s32 %o, %a0;': ((32,), 32, lambda a: M(abs(S(a, 32)))), 'cnot.b32 %o, %a0;': ((32,), 32, lambda a: int(a == 0)),
    'dp4a.u32.s32 %o, %a0, %a1, %a2;': ((32,) * 3, 32, lambda a, b, c: M(sum((a >> 8 * i & 255) * S(b >> 8 * i & 255, 8) for i in range(4)) + c)),
    'slct.b32.s32 %o, %a0, %a1, %a2;': ((32,) * 3, 32, lambda a, b, c: a if S(c, 32) >= 0 else b), 'set.lt.u32.s32 %o, %a0, %a1;': ((32, 32), 32, lambda a, b: M(-1) if S(a, 32) < S(b, 32) else 0),
    'lop3.b32 %o, %a0, %a1, %a2, 0x1b;': ((32,) * 3, 32, lambda a, b, c: sum((0x1b >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))),
    'setp.hi.u32 %p|%q, %a0, %a1; selp.b32 %o, %a0, 7, %q;': ((32, 32), 32, lambda a, b: 7 if a > b else a), 'setp.ge.s16 %p, %a0, %a1; @!%p mov.b32 %o, 5; @%p mov.b32 %o, 6;': ((16, 16), 32, lambda a, b: 6 if S(a, 16) >= S(b, 16) else 5),
    'add.cc.u32 %u, %a0, %a1; addc.u32 %o, %a2, %a3;': ((32,) * 4, 32, lambda a, b, c, d: M(c + d + (a + b >> 32))), 'sub.cc.u32 %u, %a0, %a1; subc.u32 %o, %a2, %a3;': ((32,) * 4, 32, lambda a, b, c, d: M(c - d - (a < b))),
    'mad.lo.cc.u32 %u, %a0, %a1, %a2; madc.hi.u32 %o, %a0, %a1, %a3;': ((32,) * 4, 32, lambda a, b, c, d: M((a * b >> 32) + d + (M(a * b) + c >> 32))),
    'cvt.s32.s8 %o, %a0;': ((32,), 32, lambda a: M(S(a & 255, 8))), 'cvt.u32.u16 %o, %a0;': ((16,), 32, lambda a: a), 'cvt.s64.s32 %o, %a0;': ((32,), 64, lambda a: M(S(a, 32), 64)),
    'cvt.sat.u8.s32 %u, %a0; mov.b32 %o, %u;': ((32,), 32, lambda a: max(0, min(255, S(a, 32)))), 'cvt.sat.s16.s32 %o, %a0;': ((32,), 32, lambda a: M(max(-32768, min(32767, S(a, 32))))),
    'mov.b64 %o, {%a0, %a1};': ((32, 32), 64, lambda a, b: a | b << 32), 'mov.b64 {_, %o}, %a0;': ((64,), 32, lambda a: a >> 32), 'max.s32 %o, %a0, %a1;': ((32, 32), 32, lambda a, b: M(max(S(a, 32), S(b, 32)))),
    'not.b16 %o, %a0;': ((16,), 16, lambda a: M(~a, 16)), 'neg.s32 %o, %a0;': ((32,), 32, lambda a: M(-a)), 'xor.b32 %o, %a0, -1;': ((32,), 32, lambda a: M(~a)),
}


@pytest.mark.parametrize('text', INT)
def test_int(text):
    widths, ow, ref = INT[text]; ins = [ints(w) for w in widths]
    got = execute(text, ins, ow).tolist(); want = [ref(*[int(a[i]) for a in ins]) for i in range(N)]
    bad = [(i, [hex(int(a[i])) for a in ins], hex(g), hex(w)) for i, (g, w) in enumerate(zip(got, want)) if g != w]
    assert not bad, bad[:3]


def floats():
    x = (rng.standard_normal(N) * 10.0 ** rng.integers(-6, 7, N)).astype(np.float32)
    x[:14] = [0, -0.0, np.inf, -np.inf, np.nan, 0.5, 1.5, -2.5, 3e9, -3e9, 1e20, 255.5, 1e-39, 65520]
    return x


def test_float_conversions():
    x = floats(); b = x.view(np.uint32); t = torch.from_numpy(x)
    s = lambda f: np.array([0 if np.isnan(v) else int(max(-2**31, min(2**31 - 1, f(float(v)) if np.isfinite(v) else math.copysign(1e30, v)))) for v in x], np.int64)
    for r, f in (('rni', lambda v: np.rint(v)), ('rzi', math.trunc), ('rmi', math.floor), ('rpi', math.ceil)):
        assert np.array_equal(execute(f'cvt.{r}.s32.f32 %o, %a0;', [b], 32).view(np.int32), s(f)), r
    assert np.array_equal(execute('cvt.rzi.u32.f32 %o, %a0;', [b], 32), [0 if np.isnan(v) or v < 0 else min(2**32 - 1, int(min(v, 1e30))) for v in x.tolist()])
    eq = lambda g, r: np.array_equal(g, r, equal_nan=True)
    h = execute('cvt.rn.f16.f32 %o, %a0;', [b], 16).view(np.float16)
    with np.errstate(all='ignore'): assert eq(h, x.astype(np.float16))
    bf = execute('cvt.rn.bf16.f32 %o, %a0;', [b], 16); assert eq((bf.astype(np.uint32) << 16).view(np.float32), t.bfloat16().float().numpy())
    p = execute('cvt.rn.bf16x2.f32 %o, %a0, %a1;', [b, b[::-1].copy()], 32); assert np.array_equal(p >> 16, bf) and np.array_equal(p & 0xFFFF, bf[::-1])
    assert eq(execute('cvt.f64.f32 %o, %a0;', [b], 64).view(np.float64), x.astype(np.float64)); assert eq(execute('cvt.f32.f16 %o, %a0;', [h.view(np.uint16)], 32).view(np.float32), h.astype(np.float32))
    z = execute('cvt.rz.f16.f32 %o, %a0;', [b], 16).view(np.float16).astype(np.float64); fin = np.isfinite(x) & (np.abs(x) < 65504)
    assert (np.abs(z[fin]) <= np.abs(x[fin])).all() and (np.abs(z[fin] - x[fin]) <= np.abs(x[fin]) * 2**-10 + 2.**-24).all()
    assert eq(execute('cvt.sat.f32.f32 %o, %a0;', [b], 32).view(np.float32), np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(np.float32))
    tf = execute('cvt.rna.tf32.f32 %o, %a0;', [b], 32); fin = np.isfinite(x); assert not (tf & 0x1FFF).any() and (np.abs(tf.view(np.float32)[fin] - x[fin]) <= np.abs(x[fin]) * 2.**-11 + 1e-41).all()
    i = ints(64); assert eq(execute('cvt.rn.f32.u64 %o, %a0;', [i], 32).view(np.float32), np.array([np.float32(int(v)) for v in i], np.float32))
    lo, up = (execute(f'cvt.{r}.f32.s64 %o, %a0;', [i], 32).view(np.float32) for r in ('rm', 'rp'))
    assert all(int(float(a)) <= S(int(v), 64) <= int(float(c)) for a, v, c in zip(lo, i, up))


def test_float_arithmetic():
    x, y = floats(), floats()[::-1].copy(); b, c = x.view(np.uint32), y.view(np.uint32); eq = lambda g, r: np.array_equal(g.view(np.float32), r.astype(np.float32), equal_nan=True)
    tiny = np.float32(1.17549435e-38); fz = lambda v: np.where(np.abs(v) < tiny, np.copysign(0, v), v).astype(np.float32)
    with np.errstate(all='ignore'):
        assert eq(execute('add.f32 %o, %a0, %a1;', [b, c], 32), x + y); assert eq(execute('div.rn.f32 %o, %a0, %a1;', [b, c], 32), x / y); assert eq(execute('mul.ftz.f32 %o, %a0, %a1;', [b, c], 32), fz(fz(x) * fz(y)))
        assert eq(execute('max.f32 %o, %a0, %a1;', [b, c], 32), np.fmax(x, y)); assert eq(execute('min.NaN.f32 %o, %a0, %a1;', [b, c], 32), np.minimum(x, y)); assert eq(execute('sqrt.rn.f32 %o, %a0;', [b], 32), np.sqrt(x))
        lo, up = (execute(f'add.{r}.f32 %o, %a0, %a1;', [b, c], 32).view(np.float32) for r in ('rm', 'rp')); e = x.astype(np.float64) + y; f = np.isfinite(e)
        assert (lo[f] <= e[f]).all() and (up[f] >= e[f]).all() and (np.nextafter(lo, np.float32(np.inf))[f] >= up[f]).all()
        for op, fn in (('lt', np.less), ('ne', lambda p, q: (p != q) & ~np.isnan(p) & ~np.isnan(q)), ('neu', np.not_equal), ('geu', lambda p, q: ~(p < q)), ('nan', lambda p, q: np.isnan(p) | np.isnan(q))):
            assert np.array_equal(execute(f'setp.{op}.f32 %p, %a0, %a1; selp.b32 %o, 1, 0, %p;', [b, c], 32), fn(x, y)), op


def test_fp8():
    x = (rng.standard_normal(N) * 4.0 ** rng.integers(-4, 5, N)).astype(np.float32); b = x.view(np.uint32)
    for n, dt, mx in (('e4m3x2', torch.float8_e4m3fn, 448), ('e5m2x2', torch.float8_e5m2, 57344)):
        g = execute(f'cvt.rn.satfinite.{n}.f32 %o, %a0, %a1;', [b, b], 16)
        r = torch.from_numpy(np.clip(x, -mx, mx)).to(dt).view(torch.uint8).numpy(); assert np.array_equal(g & 255, r) and np.array_equal(g >> 8, r)
        d = execute(f'cvt.rn.f16x2.{n} %o, %a0;', [g], 32); assert np.array_equal((d & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32), torch.from_numpy(r).view(dt).float().numpy())


def test_brx_and_register_scopes():
    body = 'and.b32 %t, %a0, 3;\nts: .branchtargets L0, L1, L2, L3;\nbrx.idx %t, ts;\nL0: mov.b32 %o, 10; bra.uni E;\nL1: mov.b32 %o, 11; bra.uni E;\nL2: mov.b32 %o, 12; bra.uni E;\nL3: mov.b32 %o, 13;\nE: { .reg .b32 %o2, %t; mov.b32 %t, 5; add.s32 %o2, %o, %t; mov.b32 %o, %o2; }\nmov.u32 %t, %tid.x;'
    a = ints(32); assert np.array_equal(execute(body, [a], 32), (a & 3) + 15)
