"""Number formats: roundings, conversions, immediates."""
import re
import numpy as np
from .parse import BITS, parse_int

NP = {'pred': np.bool_, 'f16': np.float16, 'f32': np.float32, 'f64': np.float64, 'tf32': np.uint32, 'bf16': np.uint16}
for _w in (8, 16, 32, 64):
    NP[f'b{_w}'] = NP[f'u{_w}'] = np.dtype(f'u{_w // 8}').type; NP[f's{_w}'] = np.dtype(f'i{_w // 8}').type
for _t in ('f16x2', 'bf16x2', 'u16x2', 's16x2'): NP[_t] = np.uint32
for _t in ('e4m3x2', 'e5m2x2'): NP[_t] = np.uint16
NP['f32x2'] = np.uint64
RAW = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
FLOATS = {'f16', 'bf16', 'f32', 'f64', 'f16x2', 'bf16x2', 'f32x2', 'tf32'}
TYPES = set(BITS)
f32, f64, u32, u64, i32, i64 = np.float32, np.float64, np.uint32, np.uint64, np.int32, np.int64


def f32_odd(v):
    """float64 -> float32 rounded to odd, so that a second rounding to fewer bits is exact."""
    f = v.astype(f32); b = f.view(u32); back = f.astype(f64)
    b = b - ((np.abs(back) > np.abs(v)) & np.isfinite(v)).astype(u32)
    return (b | ((b.view(f32).astype(f64) != v) & np.isfinite(v)).astype(u32)).view(f32)


def to_bf16(v):
    if v.dtype == f64: v = f32_odd(v)
    x = np.ascontiguousarray(v).view(u32)
    r = ((x + u32(0x7FFF) + ((x >> u32(16)) & u32(1))) >> u32(16)).astype(np.uint16)
    return np.where(np.isnan(v), np.uint16(0x7FFF), r)


def from_bf16(x): return (x.astype(u32) << u32(16)).view(f32)


def to_f16(v): return v.astype(np.float16)


def fma32(a, b, c):
    """Correctly rounded float32 fused multiply-add through float64."""
    p = a.astype(f64) * b; s = p + c
    tie = (s.view(u64) & u64(0x1FFFFFFF)) == u64(0x10000000)
    if tie.any():
        p, cc, s = np.broadcast_arrays(p, c.astype(f64), s)
        t = s - p; e = (p - (s - t)) + (cc - t)
        fix = tie & (e != 0) & np.isfinite(s)
        if fix.any(): s = np.where(fix, np.nextafter(s, np.where(e > 0, np.inf, -np.inf)), s)
    return s.astype(f32)


def fma64(a, b, c):
    """float64 fused multiply-add with an error-free product (Dekker)."""
    p = a * b
    k = 134217729.0
    ah = a * k; ah = ah - (ah - a); al = a - ah
    bh = b * k; bh = bh - (bh - b); bl = b - bh
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    t = s - p; e2 = (p - (s - t)) + (c - t)
    r = s + (e + e2)
    return np.where(np.isfinite(r), r, s)


def flush(v):
    return np.where(np.abs(v) < f32(1.17549435e-38), np.copysign(f32(0), v), v)


def directed(exact, r, mode):
    """Move the nearest-rounded r of `exact` (float64) to the neighbour demanded by rz/rm/rp."""
    b = r.astype(f64)
    inf = r.dtype.type(np.inf)
    lo, hi = np.nextafter(r, -inf), np.nextafter(r, inf)
    down, up = np.where(b > exact, lo, r), np.where(b < exact, hi, r)
    out = down if mode == 'rm' else up if mode == 'rp' else np.where(exact > 0, down, up)
    return np.where(np.isfinite(exact), out, r)


def ashr(a, n, w):
    n = np.minimum(n, u32(w - 1)).astype(a.dtype)
    return a >> n


def mulhi64(a, b):
    m = u64(0xFFFFFFFF); s = u64(32)
    al, ah, bl, bh = a & m, a >> s, b & m, b >> s
    t = al * bl; k = t >> s
    t = ah * bl + k; w1 = t & m; w2 = t >> s
    t = al * bh + w1
    return ah * bh + w2 + (t >> s)


def bits_of(x, n):
    """Population count for unsigned arrays."""
    return np.bitwise_count(x).astype(u32)


def lut3(a, b, c, lut):
    known = {0xC0: lambda: a & b, 0xFC: lambda: a | b, 0x3C: lambda: a ^ b, 0x96: lambda: a ^ b ^ c,
             0xFE: lambda: a | b | c, 0x80: lambda: a & b & c, 0xF8: lambda: a | (b & c), 0xEA: lambda: (a & b) | c,
             0xCA: lambda: (a & b) | (~a & c), 0x78: lambda: a ^ (b & c), 0x6A: lambda: (a & b) ^ c, 0xE8: lambda: (a & b) | (a & c) | (b & c)}
    if lut in known: return known[lut]()
    r = (a ^ a) & b & c
    for k in range(8):
        if lut >> k & 1:
            r = r | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return r


def fp8_decode(b, e5):
    """e4m3 / e5m2 bytes -> float32."""
    b = b.astype(u32); s = (b & u32(0x80)) << u32(24)
    if e5: return ((b & u32(0xFF)).astype(np.uint16) << np.uint16(8)).view(np.float16).astype(f32)
    e, m = (b >> u32(3)) & u32(15), b & u32(7)
    v = np.where(e == 0, m.astype(f32) * f32(2 ** -9), (f32(1) + m.astype(f32) / 8) * np.exp2(e.astype(f32) - 7))
    v = np.where((e == 15) & (m == 7), f32(np.nan), v).astype(f32)
    return (v.view(u32) | s).view(f32)


def mma_decode(v, ty):
    """Raw matrix registers (.., 32) -> (.., 32 * elements per register) compute values."""
    v = np.ascontiguousarray(v)
    if ty == 'f16': return v.view(np.float16).astype(f32)
    if ty == 'bf16': return from_bf16(v.view(np.uint16))
    if ty == 'tf32': return (v & u32(0xFFFFE000)).view(f32)
    if ty in ('f32', 'f64'): return v.view(NP[ty])
    if ty in ('e4m3', 'e5m2'): return fp8_decode(v.view(np.uint8), ty == 'e5m2')
    return v.view(np.int8 if ty == 's8' else np.uint8).astype(i32)


_FP8 = {}
def fp8_encode(v, e5):
    """float32 -> fp8 with round-to-nearest-even and saturation to the largest finite value."""
    if e5 not in _FP8:
        _FP8[e5] = fp8_decode(np.arange(0x7C if e5 else 0x7F, dtype=np.uint8), e5).astype(f64)
    tab = _FP8[e5]; a = np.abs(v).astype(f64)
    i = np.clip(np.searchsorted(tab, a), 1, len(tab) - 1)
    lo, hi = tab[i - 1], tab[i]; mid = (lo + hi) / 2
    r = np.where((a > mid) | ((a == mid) & (i % 2 == 0)), i, i - 1)
    r = np.where(a >= tab[-1], len(tab) - 1, r)
    r = np.where(np.isnan(v), 0x7F, r).astype(np.uint8)
    return r | (np.signbit(v).astype(np.uint8) << np.uint8(7))


def imm(tok, ty):
    t = tok.strip()
    if re.fullmatch(r'0[fF][0-9a-fA-F]{8}', t): v = np.array([int(t[2:], 16)], u32).view(f32)
    elif re.fullmatch(r'0[dD][0-9a-fA-F]{16}', t): v = np.array([int(t[2:], 16)], u64).view(f64)
    elif re.fullmatch(r'[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?', t) and ('.' in t or 'e' in t.lower()) and not t.lower().startswith('0x'):
        v = np.array([float(t)])
    elif re.fullmatch(r'[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uU]?', t): v = parse_int(t)
    elif t == 'WARP_SZ': v = 32
    else: return None
    if ty == 'pred': return np.array([bool(v)])
    w = BITS[ty]
    if isinstance(v, int):
        if ty in ('f32', 'f64'): return np.array([v], NP[ty])
        return np.array([v & ((1 << w) - 1)], RAW[w]).view(NP[ty])
    if ty in ('f32', 'f64'): return v.astype(NP[ty])
    raw = v.view(RAW[v.dtype.itemsize * 8])
    if v.dtype == f64 and '.' in t: raw = v.astype(f32).view(u32)
    return raw.astype(RAW[w]).view(NP[ty])
