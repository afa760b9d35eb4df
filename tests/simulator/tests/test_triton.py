"""Triton kernels compiled for sm_80 without a GPU, simulated, compared with torch."""
import math, os, sys
import pytest, torch, triton, triton.language as tl
from tests.simulator.ptxsim import run_triton, Out

torch.manual_seed(0)


@triton.jit
def add_k(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B); m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def softmax_k(x, o, sx, so, n, B: tl.constexpr):
    r = tl.program_id(0); i = tl.arange(0, B); m = i < n
    v = tl.load(x + r * sx + i, mask=m, other=-float('inf')).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + r * so + i, e / tl.sum(e, 0), mask=m)


@triton.jit
def layernorm_k(x, w, b, o, n, eps, B: tl.constexpr):
    r = tl.program_id(0); i = tl.arange(0, B); m = i < n
    v = tl.load(x + r * n + i, mask=m, other=0.).to(tl.float32)
    mu = tl.sum(v, 0) / n
    d = tl.where(m, v - mu, 0.)
    rs = tl.rsqrt(tl.sum(d * d, 0) / n + eps)
    tl.store(o + r * n + i, d * rs * tl.load(w + i, mask=m) + tl.load(b + i, mask=m), mask=m)


@triton.jit
def rope_k(x, o, T, H, D: tl.constexpr):
    t = tl.program_id(0); h = tl.program_id(1); i = tl.arange(0, D // 2)
    f = t * tl.exp(-i.to(tl.float32) * (2.0 / D) * 9.210340371976184)
    c = tl.cos(f); s = tl.sin(f)
    p = (t * H + h) * D
    a = tl.load(x + p + i).to(tl.float32); b = tl.load(x + p + D // 2 + i).to(tl.float32)
    tl.store(o + p + i, a * c - b * s); tl.store(o + p + D // 2 + i, b * c + a * s)


@triton.jit
def matmul_k(a, b, c, idx, M, N, K, sam, sbk, scm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
             PREC: tl.constexpr, GATHER: tl.constexpr):
    pm = tl.program_id(0); pn = tl.program_id(1)
    rm = pm * BM + tl.arange(0, BM); rn = pn * BN + tl.arange(0, BN); rk = tl.arange(0, BK)
    src = tl.load(idx + rm, mask=rm < M, other=0) if GATHER else rm
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a + src[:, None] * sam + (rk + k)[None, :], mask=(rm[:, None] < M) & ((rk + k)[None, :] < K), other=0.)
        y = tl.load(b + (rk + k)[:, None] * sbk + rn[None, :], mask=((rk + k)[:, None] < K) & (rn[None, :] < N), other=0.)
        acc = tl.dot(x, y, acc, input_precision=PREC)
    tl.store(c + rm[:, None] * scm + rn[None, :], acc.to(c.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def hist_k(x, h, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B); m = i < n
    tl.atomic_add(h + tl.load(x + i, mask=m, other=0), 1, mask=m)


@triton.jit
def misc_k(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i)
    s = tl.sort(v)
    tl.store(o + i, s); tl.store(o + n + i, tl.cumsum(v, 0)); tl.store(o + 2 * n + i, tl.argmax(v, 0).to(tl.float32))
    tl.store(o + 3 * n + i, tl.erf(v) + tl.log(tl.abs(v) + 1) + tl.sqrt(tl.abs(v)) + tl.floor(v) + tl.sigmoid(v))


@triton.jit
def atomic_k(x, s, mx, ex, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i)
    tl.atomic_add(s, tl.sum(v, 0)); tl.atomic_add(s + 1 + i % 7, v); tl.atomic_max(mx, tl.max(v, 0))
    tl.atomic_cas(ex, 0, tl.program_id(0) + 1)


@triton.jit
def lock_k(x, o, lock, B: tl.constexpr):
    i = tl.arange(0, B); v = tl.load(x + tl.program_id(0) * B + i)
    while tl.atomic_cas(lock, 0, 1) == 1: pass
    tl.store(o + i, tl.load(o + i) + v)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def attn_k(q, k, v, o, T, scale, BT: tl.constexpr, D: tl.constexpr):
    m = tl.program_id(0); h = tl.program_id(1)
    r = m * BT + tl.arange(0, BT); d = tl.arange(0, D); base = h * T * D
    qq = tl.load(q + base + r[:, None] * D + d[None, :])
    mx = tl.full((BT,), -float('inf'), tl.float32); l = tl.zeros((BT,), tl.float32); acc = tl.zeros((BT, D), tl.float32)
    for j in range(0, (m + 1) * BT, BT):
        c = j + tl.arange(0, BT)
        kk = tl.load(k + base + c[None, :] * D + d[:, None]); vv = tl.load(v + base + c[:, None] * D + d[None, :])
        s = tl.where(r[:, None] >= c[None, :], tl.dot(qq, kk) * scale, -float('inf'))
        nm = tl.maximum(mx, tl.max(s, 1)); p = tl.exp2(s - nm[:, None]); al = tl.exp2(mx - nm)
        l = l * al + tl.sum(p, 1); acc = tl.dot(p.to(vv.dtype), vv, acc * al[:, None]); mx = nm
    tl.store(o + base + r[:, None] * D + d[None, :], (acc / l[:, None]).to(o.dtype.element_ty))


@pytest.mark.parametrize('n', [5, 1000, 4096])
def test_add(n):
    x, y, o = torch.randn(n), torch.randn(n), torch.empty(n)
    r = run_triton(add_k, (triton.cdiv(n, 1024),), x, y, Out(o), n, B=1024)
    assert torch.equal(o, x + y)
    assert r.unique_load_bytes == 8 * n and r.unique_store_bytes == 4 * n and r.global_load_bytes == 8 * n
    if n == 4096: assert r.load_efficiency == 1 and r.global_load_sectors == 8 * n // 32


@pytest.mark.parametrize('dt', [torch.float32, torch.bfloat16, torch.float16])
def test_softmax(dt):
    x = torch.randn(37, 781).to(dt); o = torch.empty_like(x)
    run_triton(softmax_k, (37,), x, Out(o), x.stride(0), o.stride(0), 781, B=1024)
    torch.testing.assert_close(o, x.float().softmax(-1).to(dt), rtol=2e-2 if dt != torch.float32 else 1e-5, atol=1e-6)


@pytest.mark.parametrize('dt,nw', [(torch.float32, 4), (torch.bfloat16, 8)])
def test_layernorm(dt, nw):
    x = torch.randn(19, 500).to(dt); w, b = torch.randn(500), torch.randn(500); o = torch.empty_like(x)
    run_triton(layernorm_k, (19,), x, w, b, Out(o), 500, 1e-5, B=512, num_warps=nw)
    ref = torch.nn.functional.layer_norm(x.float(), (500,), w, b, 1e-5)
    torch.testing.assert_close(o.float(), ref, rtol=1e-2 if dt != torch.float32 else 1e-5, atol=2e-2 if dt != torch.float32 else 1e-5)


def test_rope():
    T, H, D = 33, 3, 64
    x = torch.randn(T, H, D); o = torch.empty_like(x)
    run_triton(rope_k, (T, H), x, Out(o), T, H, D=D, num_warps=1)
    f = torch.arange(T)[:, None] * torch.exp(-torch.arange(D // 2) * (2 / D) * math.log(10000.))
    c, s = f.cos()[:, None], f.sin()[:, None]; a, b = x[..., :D // 2], x[..., D // 2:]
    torch.testing.assert_close(o, torch.cat([a * c - b * s, b * c + a * s], -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('ns', [1, 2, 3, 4])
@pytest.mark.parametrize('dt,prec', [('float16', 'tf32'), ('bfloat16', 'tf32'), ('float32', 'tf32'), ('float32', 'ieee'), ('float32', 'tf32x3')])
@pytest.mark.parametrize('shape', [(64, 64, 128), (70, 50, 90)])
def test_matmul(ns, dt, prec, shape):
    if prec == 'tf32x3' and ns != 3: pytest.skip('one stage count is enough')
    M, N, K = shape; dt = getattr(torch, dt)
    a, b, c = torch.randn(M, K).to(dt), torch.randn(K, N).to(dt), torch.empty(M, N, dtype=dt)
    r = run_triton(matmul_k, (triton.cdiv(M, 32), triton.cdiv(N, 64)), a, b, Out(c), None, M, N, K, a.stride(0), b.stride(0), c.stride(0),
                   BM=32, BN=64, BK=32, PREC=prec, GATHER=False, num_stages=ns)
    ref = a.double() @ b.double()
    tol = {'tf32': 2e-2 if dt == torch.float32 else 1e-6, 'ieee': 1e-5, 'tf32x3': 1e-5}[prec]
    err = (c.double() - ref.to(dt).double()).abs().max() / ref.abs().max()
    assert err < max(tol, {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dt, 0))
    assert r.shared_races == 0 and r.uninit_shared_reads == 0
    if prec == 'tf32':
        tiles = triton.cdiv(M, 32) * triton.cdiv(N, 64) * triton.cdiv(K, 32)
        assert r.mma_flops == tiles * 2 * 32 * 64 * 32


def test_matmul_gather():
    M, N, K = 64, 64, 96
    a, b, c = torch.randn(200, K).half(), torch.randn(K, N).half(), torch.empty(M, N)
    idx = torch.randint(0, 200, (M,), dtype=torch.int32)
    run_triton(matmul_k, (2, 1), a, b, Out(c), idx, M, N, K, K, N, N, BM=32, BN=64, BK=32, PREC='tf32', GATHER=True)
    torch.testing.assert_close(c, a[idx.long()].float() @ b.float(), rtol=1e-3, atol=1e-3)


def test_hist():
    x = torch.randint(0, 50, (5000,), dtype=torch.int32); h = torch.zeros(50, dtype=torch.int32)
    r = run_triton(hist_k, (5,), x, h, 5000, B=1024)
    assert torch.equal(h.long(), torch.bincount(x.long(), minlength=50)) and r.global_atomics == 5000


def test_sort_scan_math():
    n = 512; x = torch.randn(n); o = torch.empty(4, n)
    run_triton(misc_k, (1,), x, Out(o), n, B=n)
    assert torch.equal(o[0], x.sort().values) and (o[2] == x.argmax()).all()
    torch.testing.assert_close(o[1], x.cumsum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(o[3], x.erf() + (x.abs() + 1).log() + x.abs().sqrt() + x.floor() + x.sigmoid(), rtol=1e-4, atol=1e-5)


def test_atomics_float():
    x = torch.randn(1024); s = torch.zeros(8); mx = torch.full((1,), -1.0); ex = torch.zeros(1, dtype=torch.int32)
    run_triton(atomic_k, (8,), x, s, mx, ex, B=128)
    ref = torch.zeros(8); ref[0] = x.sum(); i = torch.arange(1024)
    for j in range(7): ref[1 + j] = x[i % 7 == j].sum()
    torch.testing.assert_close(s, ref, rtol=1e-4, atol=1e-4)
    assert mx.item() == x.max().item() and ex.item() == 1


def test_spin_lock():
    x = torch.randn(6, 128); o = torch.zeros(128); lock = torch.zeros(1, dtype=torch.int32)
    run_triton(lock_k, (6,), x, o, lock, B=128)
    torch.testing.assert_close(o, x.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dt', [torch.float16, torch.bfloat16])
def test_attention(dt):
    H, T, D = 2, 128, 64
    q, k, v = (torch.randn(H, T, D).to(dt) for _ in range(3)); o = torch.empty_like(q)
    r = run_triton(attn_k, (T // 32, H), q, k, v, Out(o), T, D ** -0.5 * 1.4426950408889634, BT=32, D=D)
    ref = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(o.float(), ref, rtol=2e-2, atol=2e-2)
    assert r.shared_races == 0


# ---------------------------------------------------------------- wider coverage
@triton.jit
def dot_k(a, b, c, M, N, K, BK: tl.constexpr, AT: tl.constexpr, BT: tl.constexpr, DT: tl.constexpr):
    rm = tl.arange(0, 64); rn = tl.arange(0, 64); rk = tl.arange(0, BK); acc = tl.zeros((64, 64), DT)
    for k in range(0, K, BK):
        x = tl.load(a + (rk + k)[None, :] * M + rm[:, None]) if AT else tl.load(a + rm[:, None] * K + (rk + k)[None, :])
        y = tl.load(b + rn[None, :] * K + (rk + k)[:, None]) if BT else tl.load(b + (rk + k)[:, None] * N + rn[None, :])
        acc = tl.dot(x, y, acc, out_dtype=DT)
    tl.store(c + rm[:, None] * N + rn[None, :], acc)


@pytest.mark.parametrize('AT', [False, True])
@pytest.mark.parametrize('BT', [False, True])
@pytest.mark.parametrize('dt,acc,tol', [('int8', 'int32', 0), ('float16', 'float16', 5e-3), ('bfloat16', 'float32', 1e-6), ('float64', 'float64', 1e-13), ('float8_e5m2', 'float32', 1e-6)])
def test_dot_layouts_and_types(AT, BT, dt, acc, tol):
    if dt in ('float64', 'float8_e5m2') and (AT or BT): pytest.skip('one layout is enough')
    r = torch.randint(-9, 9, (2, 64, 64)).double() if dt == 'int8' else torch.randn(2, 64, 64).double()
    a, b = r.to(getattr(torch, dt)); c = torch.empty(64, 64, dtype=getattr(torch, acc))
    tr = lambda m, t: m.T.contiguous() if t else m
    rep = run_triton(dot_k, (1,), tr(a, AT), tr(b, BT), Out(c), 64, 64, 64, BK=32, AT=AT, BT=BT, DT=getattr(tl, acc))
    ref = a.double() @ b.double(); assert ((c.double() - ref).abs().max() / ref.abs().max()) <= tol and rep.shared_races == 0 and rep.mma_flops == 2 * 64 ** 3


@triton.jit
def desc_k(a, o, M, N, BM: tl.constexpr, BN: tl.constexpr):
    d = tl.make_tensor_descriptor(a, [M, N], [N, 1], [BM, BN]); e = tl.make_tensor_descriptor(o, [M, N], [N, 1], [BM, BN])
    x = tl.program_id(0) * BM; y = tl.program_id(1) * BN
    e.store([x, y], d.load([x, y]) * 2)


def test_tensor_descriptor():
    a, o = torch.randn(70, 48), torch.empty(70, 48); run_triton(desc_k, (3, 2), a, Out(o), 70, 48, BM=32, BN=32); assert torch.equal(o, a * 2)


@triton.jit
def splitk_k(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    k = tl.program_id(2) * BK + tl.arange(0, BK); m = tl.program_id(0) * BM + tl.arange(0, BM); n = tl.program_id(1) * BN + tl.arange(0, BN)
    p = tl.dot(tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :]))
    tl.atomic_add(c + m[:, None] * N + n[None, :], p.to(c.dtype.element_ty), sem='relaxed')


@pytest.mark.parametrize('dt,tol', [(torch.float32, 1e-4), (torch.float16, 5e-2), (torch.bfloat16, 4e-1)])
def test_splitk_atomics(dt, tol):
    a, b, c = torch.randn(64, 128).half(), torch.randn(128, 64).half(), torch.zeros(64, 64, dtype=dt)
    run_triton(splitk_k, (2, 2, 4), a, b, c, 64, 64, 128, BM=32, BN=32, BK=32); assert (c.float() - a.float() @ b.float()).abs().max() < tol


@triton.jit
def wel(m1, v1, n1, m2, v2, n2):
    d = m2 - m1; n = n1 + n2; w = tl.where(n == 0, 0., n2 / n)
    return m1 + d * w, v1 + v2 + d * d * n1 * w, n


@triton.jit
def welford_k(x, o, N: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B); v = tl.load(x + tl.program_id(0) * N + i, mask=i < N, other=0.)
    m, s, n = tl.reduce((v, tl.zeros((B,), tl.float32), tl.where(i < N, 1., 0.)), 0, wel)
    tl.store(o + tl.program_id(0) * 2, m); tl.store(o + tl.program_id(0) * 2 + 1, s / n)


def test_tuple_reduce():
    x, o = torch.randn(5, 300), torch.empty(5, 2); run_triton(welford_k, (5,), x, Out(o), N=300, B=512)
    torch.testing.assert_close(o, torch.stack([x.mean(1), x.var(1, unbiased=False)], 1), rtol=1e-5, atol=1e-6)


@triton.jit
def libdevice_k(x, o, N: tl.constexpr):
    i = tl.arange(0, N); v = tl.load(x + i)
    tl.store(o + i, tl.extra.cuda.libdevice.tanh(v)); tl.store(o + N + i, tl.extra.cuda.libdevice.pow(tl.abs(v), 1.7))
    tl.store(o + 2 * N + i, tl.extra.cuda.libdevice.sin(v * 1e6)); tl.store(o + 3 * N + i, tl.extra.cuda.libdevice.rint(v)); tl.store(o + 4 * N + i, tl.fma(v, v, v))


def test_libdevice():
    x, o = torch.randn(256) * 3, torch.empty(5, 256); run_triton(libdevice_k, (1,), x, Out(o), N=256); v = x.double()
    ref = torch.stack([v.tanh(), v.abs() ** 1.7, (x * 1e6).double().sin(), v.round(), v * v + v]); torch.testing.assert_close(o.double(), ref, rtol=1e-6, atol=1e-6)


@triton.jit
def topk_k(x, o, oi, N: tl.constexpr, K: tl.constexpr):
    p = tl.program_id(0); v = tl.load(x + p * N + tl.arange(0, N)); tl.store(o + p * K + tl.arange(0, K), tl.topk(v, K)); tl.store(oi + p, tl.argmin(v, 0))


def test_topk_argmin():
    x, o, oi = torch.randn(4, 256), torch.empty(4, 8), torch.empty(4, dtype=torch.int32)
    run_triton(topk_k, (4,), x, Out(o), Out(oi), N=256, K=8); assert torch.equal(o, x.topk(8).values) and torch.equal(oi.long(), x.argmin(1))


@triton.jit
def collatz_k(x, o):
    n = tl.load(x + tl.program_id(0)); k = 0
    while n != 1:
        if n % 2 == 0: n = n // 2
        else: n = 3 * n + 1
        k += 1
    tl.store(o + tl.program_id(0), k)


def test_divergent_ctas():
    x, o = torch.arange(1, 101), torch.empty(100, dtype=torch.int64); run_triton(collatz_k, (100,), x, Out(o), num_warps=1)
    for n, k in zip(x.tolist(), o.tolist()):
        while n != 1: n = n // 2 if n % 2 == 0 else 3 * n + 1; k -= 1
        assert k == 0


@pytest.mark.parametrize('target', [75, 86, 89])
def test_other_targets(target):
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.empty(64, 64)
    run_triton(matmul_k, (2, 1), a, b, Out(c), None, 64, 64, 64, 64, 64, 64, BM=32, BN=64, BK=32, PREC='tf32', GATHER=False, target=target)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-4, atol=1e-4)


def test_python_twice_gives_same_report():
    x, o = torch.randn(1000), torch.empty(1000); f = lambda: run_triton(add_k, (1,), x, x, Out(o), 1000, B=1024).to_json()
    assert f() == f()
