"""CUDA C++ kernels compiled with nvcc -ptx (sm_80), simulated, compared with torch."""
import math, os, shutil, struct, sys
import numpy as np, pytest, torch
from tests.simulator.ptxsim import run_cuda, Out, Struct, SimError, PtxError
pytestmark = pytest.mark.skipif(not shutil.which('nvcc'), reason='nvcc not installed')
torch.manual_seed(0)

SRC = r'''
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <mma.h>
__global__ void scan(const float* x, float* y, int n) {
  __shared__ float ws[32]; int t = threadIdx.x, i = blockIdx.x * blockDim.x + t; float v = i < n ? x[i] : 0;
  for (int d = 1; d < 32; d *= 2) { float u = __shfl_up_sync(~0u, v, d); if ((t & 31) >= d) v += u; }
  if ((t & 31) == 31) ws[t >> 5] = v;
  __syncthreads();
  if (t < 32) { float w = t < blockDim.x / 32 ? ws[t] : 0;
    for (int d = 1; d < 32; d *= 2) { float u = __shfl_up_sync(~0u, w, d); if (t >= d) w += u; } ws[t] = w; }
  __syncthreads();
  if (t >= 32) v += ws[t / 32 - 1];
  if (i < n) y[i] = v;
}
__global__ void blockscan(const int* x, int* y) {      // Hillis-Steele in shared memory, double buffered
  extern __shared__ int s[]; int t = threadIdx.x, n = blockDim.x, p = 0; s[t] = x[blockIdx.x * n + t]; __syncthreads();
  for (int d = 1; d < n; d *= 2) { p ^= 1; s[p * n + t] = s[(1 - p) * n + t] + (t >= d ? s[(1 - p) * n + t - d] : 0); __syncthreads(); }
  y[blockIdx.x * n + t] = s[p * n + t];
}
__global__ void racy(const int* x, int* y) { __shared__ int s[64]; int t = threadIdx.x; s[t] = x[t]; y[t] = s[63 - t]; }
__global__ void topk(const float* x, float* v, int* id, int n, int k) {   // one warp per row
  int lane = threadIdx.x, row = blockIdx.x; const float* r = x + row * n; unsigned long long taken[4] = {0, 0, 0, 0};
  for (int j = 0; j < k; j++) {
    float best = -INFINITY; int bi = n;
    for (int i = lane, q = 0; i < n; i += 32, q++) if (!(taken[q >> 6] >> (q & 63) & 1) && r[i] > best) { best = r[i]; bi = i; }
    for (int d = 16; d; d >>= 1) { float o = __shfl_xor_sync(~0u, best, d); int oi = __shfl_xor_sync(~0u, bi, d);
      if (o > best || (o == best && oi < bi)) { best = o; bi = oi; } }
    if ((bi & 31) == lane) { int q = bi >> 5; taken[q >> 6] |= 1ull << (q & 63); }
    if (lane == 0) { v[row * k + j] = best; id[row * k + j] = bi; }
  }
}
__global__ void math(const float* x, float* y, int n, const double* z, double* w) {
  int i = blockIdx.x * blockDim.x + threadIdx.x; if (i >= n) return;
  y[i] = sinf(x[i]); y[n + i] = expf(x[i] * 1e-3f); y[2 * n + i] = tanhf(x[i]); y[3 * n + i] = powf(fabsf(x[i]), 1.3f);
  y[4 * n + i] = erff(x[i]); y[5 * n + i] = log1pf(fabsf(x[i])); y[6 * n + i] = x[i] / 3.1f; y[7 * n + i] = cosf(x[i] * 1e5f);
  w[i] = sin(z[i]); w[n + i] = log(fabs(z[i])); w[2 * n + i] = z[i] / 3.1; w[3 * n + i] = sqrt(fabs(z[i])); w[4 * n + i] = exp(z[i] * 1e-2);
}
__global__ void hist(const int* x, int* h, int n) {
  __shared__ int s[256]; for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&s[x[i] & 255], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&h[i], s[i]);
}
__device__ __noinline__ float poly(float a, int n) { float r = 0; for (int i = 0; i < n; i++) r = r * a + i; return r; }
struct P { float a; int b; const float* p; };
__global__ void calls(P p, float* o, int n) {                      // struct parameter, local memory, switch, device call
  int i = threadIdx.x; float loc[16]; for (int j = 0; j < 16; j++) loc[(i * 3 + j) & 15] = p.p[i] * j;
  float r = loc[n & 15] + poly(p.a, i & 7) + p.b;
  switch (i % 9) { case 0: r += 1; break; case 1: r *= 2; break; case 2: r -= 3; break; case 3: r /= 7; break;
    case 4: r = sqrtf(fabsf(r)); break; case 5: r = fmaxf(r, 3.f); break; case 6: r = -r; break; case 7: r = r * r; break; default: r = 0; }
  o[i] = r;
}
__global__ void ints(const int* a, const int* b, long long* o, int n) {
  int i = threadIdx.x; int x = a[i], y = b[i]; unsigned ux = x, uy = y; long long X = ((long long)x << 32) ^ (unsigned)(y * 77), Y = (long long)y * 123456789;
  long long* r = o + i; int k = 0;
  r[n * k++] = x / y; r[n * k++] = x % y; r[n * k++] = ux / uy; r[n * k++] = X / Y; r[n * k++] = X % Y; r[n * k++] = __mulhi(x, y);
  r[n * k++] = __umulhi(ux, uy); r[n * k++] = __mul64hi(X, Y); r[n * k++] = __popc(x); r[n * k++] = __clz(x); r[n * k++] = __brev(x);
  r[n * k++] = __byte_perm(x, y, 0x6142); r[n * k++] = __funnelshift_l(x, y, 7); r[n * k++] = __ffs(x); r[n * k++] = x >> (y & 63 & 31);
  r[n * k++] = min(x, y) ^ max(ux, uy); r[n * k++] = __popcll(X); r[n * k++] = __clzll(X); r[n * k++] = (long long)(float)X; r[n * k++] = (int)(x * 1.5f);
  r[n * k++] = __vadd4(x, y); r[n * k++] = __dp4a(x, y, 5); r[n * k++] = (X >> 3) + (ux >> 5) * 3;
}
__global__ void warp(const int* x, int* o, int n) {
  int t = threadIdx.x, v = x[t], k = 0;
  o[n * k++ + t] = __ballot_sync(~0u, v & 1); o[n * k++ + t] = __any_sync(~0u, v == 3); o[n * k++ + t] = __all_sync(~0u, v >= 0);
  o[n * k++ + t] = __match_any_sync(~0u, v % 5); o[n * k++ + t] = __reduce_add_sync(~0u, v); o[n * k++ + t] = __reduce_max_sync(~0u, v);
  o[n * k++ + t] = __shfl_sync(~0u, v, t * 7, 8); o[n * k++ + t] = __syncthreads_count(v & 1); o[n * k++ + t] = __syncthreads_or(v == 1000);
  int s = 0; if (t & 1) { s = __shfl_xor_sync(0xAAAAAAAA, v, 2); } else { s = __activemask(); } o[n * k++ + t] = s;
}
__global__ void halfs(const __half2* a, const __half2* b, __half2* o, const __nv_bfloat162* c, const __nv_bfloat162* d, __nv_bfloat162* p, float* f, int n) {
  int i = threadIdx.x; o[i] = __hfma2(a[i], b[i], __hadd2(a[i], b[i])); o[n + i] = h2exp2(a[i]); o[2 * n + i] = __hmax2(a[i], b[i]);
  p[i] = __hfma2(c[i], d[i], __hmul2(c[i], d[i])); p[n + i] = __hadd2(c[i], d[i]); f[i] = __half2float(__low2half(a[i])) + __bfloat162float(__high2bfloat16(c[i]));
  atomicAdd(o + 3 * n, a[i]);
}
template <class T, class L, class A> __device__ void wm(const T* a, const T* b, A* c, T* s, int n) {      // one warp per 16x16 tile, A staged in shared memory
  using namespace nvcuda::wmma; fragment<matrix_a, 16, 16, 16, T, row_major> fa; fragment<matrix_b, 16, 16, 16, T, L> fb; fragment<accumulator, 16, 16, 16, A> fc;
  fill_fragment(fc, A(0.f)); int m = blockIdx.x * 16, w = blockIdx.y * 16;
  for (int k = 0; k < n; k += 16) {
    for (int i = threadIdx.x; i < 256; i += 32) s[i] = a[(m + i / 16) * n + k + i % 16];
    __syncwarp(); load_matrix_sync(fa, s, 16); load_matrix_sync(fb, std::is_same<L, row_major>::value ? b + k * n + w : b + w * n + k, n);
    mma_sync(fc, fa, fb, fc); __syncwarp(); }
  for (int i = 0; i < fc.num_elements; i++) fc.x[i] = fc.x[i] * A(2.f);
  store_matrix_sync(c + m * n + w, fc, n, mem_row_major);
}
__global__ void wm_half_row(const __half* a, const __half* b, float* c, int n) { __shared__ __half s[256]; wm<__half, nvcuda::wmma::row_major, float>(a, b, c, s, n); }
__global__ void wm_half_col(const __half* a, const __half* b, __half* c, int n) { __shared__ __half s[256]; wm<__half, nvcuda::wmma::col_major, __half>(a, b, c, s, n); }
__global__ void wm_bf16_col(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int n) { __shared__ __nv_bfloat16 s[256]; wm<__nv_bfloat16, nvcuda::wmma::col_major, float>(a, b, c, s, n); }
__global__ void deadlock(int* x) { if (threadIdx.x < 32) __syncthreads(); else while (atomicAdd(x, 0) == 0) {} }
__global__ void badbar(int* x) { __shared__ int s; if (threadIdx.x < 40) { x[threadIdx.x] = 1; asm volatile("bar.sync 0, 64;"); } x[threadIdx.x] = s; }
__global__ void generic(const float* g, float* o, int sel) { __shared__ float s[32]; float l[4]; int t = threadIdx.x; s[t] = g[t] * 2;
  for (int j = 0; j < 4; j++) l[j] = g[t] * (3 + j); const float* p = (t % 3 == 0) ? g + t : (t % 3 == 1) ? &s[t] : &l[sel]; o[t] = *p; }
'''


def test_scan():
    n = 1000; x = torch.rand(n); y = torch.empty(n)
    r = run_cuda(SRC, 'scan', 4, 256, [x, Out(y), n])
    ref = torch.cat([b.cumsum(0) for b in x.split(256)])
    torch.testing.assert_close(y, ref, rtol=1e-5, atol=1e-5); assert r.shared_races == 0


def test_blockscan():
    x = torch.randint(-9, 9, (6, 512), dtype=torch.int32); y = torch.empty_like(x)
    r = run_cuda(SRC, 'blockscan', 6, 512, [x, Out(y)], shared_bytes=4096)
    assert torch.equal(y, x.cumsum(1).int()) and r.shared_races == 0 and r.bank_conflicts == 0


def test_race_is_found():
    x = torch.arange(64, dtype=torch.int32); y = torch.empty_like(x)
    assert run_cuda(SRC, 'racy', 1, 64, [x, Out(y)]).shared_races > 0
    with pytest.raises(SimError, match='race'): run_cuda(SRC, 'racy', 1, 64, [x, Out(y)], check_races='error')


def test_topk():
    x = torch.randn(9, 300); v, i = torch.empty(9, 8), torch.empty(9, 8, dtype=torch.int32)
    run_cuda(SRC, 'topk', 9, 32, [x, Out(v), Out(i), 300, 8])
    ref = x.topk(8); assert torch.equal(v, ref.values) and torch.equal(i.long(), ref.indices)


def test_math():
    n = 300; x = torch.randn(n) * 3; y = torch.empty(8, n); z = torch.randn(n, dtype=torch.float64) * 50; w = torch.empty(5, n, dtype=torch.float64)
    z[0] = 1e15
    run_cuda(SRC, 'math', 3, 128, [x, Out(y), n, z, Out(w)])
    xd = x.double()
    ref = torch.stack([xd.sin(), (x * 1e-3).double().exp(), xd.tanh(), xd.abs() ** 1.3, xd.erf(), xd.abs().log1p(), xd / 3.1, (x * 1e5).double().cos()])
    torch.testing.assert_close(y.double(), ref, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(w, torch.stack([z.sin(), z.abs().log(), z / 3.1, z.abs().sqrt(), (z * 1e-2).exp()]), rtol=1e-14, atol=1e-15)


def test_hist():
    x = torch.randint(0, 256, (5000,), dtype=torch.int32); h = torch.zeros(256, dtype=torch.int32)
    r = run_cuda(SRC, 'hist', 3, 128, [x, h, 5000])
    assert torch.equal(h.long(), torch.bincount(x.long(), minlength=256)) and r.shared_atomics == 5000


@pytest.mark.parametrize('n', [3, 20])
def test_calls_struct_local(n):
    p = torch.randn(64); o = torch.empty(64); a, b = 0.7, 5
    with pytest.raises(SimError): run_cuda(SRC, 'calls', 1, 64, [struct.pack('<fiQ', a, b, 0), Out(o), n])
    run_cuda(SRC, 'calls', 1, 64, [Struct('<fiQ', a, b, p), Out(o), n])
    ref = []
    for i in range(64):
        loc = [0.] * 16
        for j in range(16): loc[(i * 3 + j) & 15] = float(p[i]) * j
        q = 0.
        for j in range(i & 7): q = q * a + j
        r = loc[n & 15] + q + b
        ref.append([r + 1, r * 2, r - 3, r / 7, abs(r) ** .5, max(r, 3.), -r, r * r, 0.][i % 9])
    torch.testing.assert_close(o, torch.tensor(ref), rtol=1e-5, atol=1e-5)


def test_ints():
    n = 128; rng = np.random.default_rng(0)
    a = rng.integers(-2**31, 2**31, n).astype(np.int32); b = rng.integers(-2**31, 2**31, n).astype(np.int32); b[::3] %= 1000; b[b == 0] = 7; a[5] = 0
    o = np.zeros((23, n), np.int64); run_cuda(SRC, 'ints', 1, n, [a, b, Out(o), n])
    w32 = lambda v: (v + 2**31) % 2**32 - 2**31
    w64 = lambda v: (v + 2**63) % 2**64 - 2**63
    tq = lambda x, y: abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
    for i in range(n):
        x, y = int(a[i]), int(b[i]); ux, uy = x % 2**32, y % 2**32; X = w64((x << 32) ^ ((y * 77) % 2**32)); Y = y * 123456789
        by = [(ux >> 8 * j) & 255 for j in range(4)] + [(uy >> 8 * j) & 255 for j in range(4)]
        xs, ys = [w if w < 128 else w - 256 for w in by[:4]], [w if w < 128 else w - 256 for w in by[4:]]
        clz = lambda v, w: w - v.bit_length()
        ref = [tq(x, y), x - tq(x, y) * y, ux // uy, tq(X, Y), X - tq(X, Y) * Y, (x * y) >> 32, w32((ux * uy) >> 32), (X * Y) >> 64, bin(ux).count('1'), clz(ux, 32),
               w32(int(f'{ux:032b}'[::-1], 2)), w32(sum(by[s] << 8 * j for j, s in enumerate([2, 4, 1, 6]))), w32((((uy << 32 | ux) << 7) >> 32)),
               (ux & -ux).bit_length(), x >> (y & 31), w32((min(x, y) % 2**32) ^ max(ux, uy)), bin(X % 2**64).count('1'), clz(X % 2**64, 64),
               min(int(np.float32(X)), 2**63 - 1), int(np.clip(int(np.float32(x) * np.float32(1.5)), -2**31, 2**31 - 1)),
               sum(((by[j] + by[4 + j]) & 255) << 8 * j for j in range(4)), w32(sum(p * q for p, q in zip(xs, ys)) + 5), w64((X >> 3) + ((ux >> 5) * 3) % 2**32)]
        got = o[:, i].tolist(); ref[6] %= 2**32; 
        for k in (6, 10, 11, 12, 15, 20): ref[k], got[k] = ref[k] % 2**32, got[k] % 2**32
        assert got == ref, (i, [(k, g, r) for k, (g, r) in enumerate(zip(got, ref)) if g != r])


def test_warp_ops():
    n = 64; x = torch.randint(0, 50, (n,), dtype=torch.int32); o = torch.empty(10, n, dtype=torch.int32)
    run_cuda(SRC, 'warp', 1, n, [x, Out(o), n]); X = x.view(2, 32).tolist(); o = (o.long() % 2**32).view(10, 2, 32)
    for w in range(2):
        v = X[w]; bal = lambda f: sum(bool(f(u)) << l for l, u in enumerate(v))
        assert (o[0, w] == bal(lambda u: u & 1)).all() and (o[1, w] == int(3 in v)).all() and (o[2, w] == 1).all()
        assert o[3, w].tolist() == [bal(lambda u: u % 5 == t % 5) for t in v]
        assert (o[4, w] == sum(v)).all() and (o[5, w] == max(v)).all()
        assert o[6, w].tolist() == [v[(l & ~7) | (((w * 32 + l) * 7) & 7)] for l in range(32)]
        assert (o[7, w] == int((x & 1).sum())).all() and (o[8, w] == 0).all()
        assert o[9, w].tolist() == [v[l ^ 2] if l & 1 else 0x55555555 for l in range(32)]


def test_half():
    n = 64; r = lambda dt: torch.randn(2 * n).to(dt)
    a, b, c, d = r(torch.half), r(torch.half), r(torch.bfloat16), r(torch.bfloat16)
    o, p, f = torch.zeros(4 * 2 * n).half(), torch.zeros(2 * 2 * n).bfloat16(), torch.empty(n)
    run_cuda(SRC, 'halfs', 1, n, [a, b, o, c, d, p, Out(f), n])
    o = o.view(4, -1); p = p.view(2, -1)
    assert torch.equal(o[0], (a.double() * b.double() + (a + b).double()).half()) and torch.equal(o[2], torch.maximum(a, b))
    torch.testing.assert_close(o[1], torch.exp2(a.float()).half(), rtol=1e-3, atol=1e-3)
    assert torch.equal(p[0], (c.double() * d.double() + (c * d).double()).bfloat16()) and torch.equal(p[1], c + d)
    assert torch.equal(f, a.float()[::2] + c.float()[1::2])
    torch.testing.assert_close(o[3, :2].float(), a.view(-1, 2).float().sum(0), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize('kernel,dt,od,tol', [('wm_half_row', torch.half, torch.float, 1e-4), ('wm_half_col', torch.half, torch.half, 2e-2), ('wm_bf16_col', torch.bfloat16, torch.float, 1e-4)])
def test_wmma(kernel, dt, od, tol):
    a, b = torch.randn(48, 48).to(dt), torch.randn(48, 48).to(dt); c = torch.empty(48, 48, dtype=od)
    r = run_cuda(SRC, kernel, (3, 3), 32, [a, b, Out(c), 48])
    torch.testing.assert_close(c.float(), 2 * (a.float() @ (b.float() if 'row' in kernel else b.float().T)), rtol=tol, atol=tol * 5)
    assert r.mma_flops == 2 * 48 ** 3


def test_tiled_gemm_named_barriers_symbols():
    s = r'''__constant__ float coef[4]; __device__ int counter; __device__ float bias[3] = {1.f, 2.f, 3.f};
    __global__ void __launch_bounds__(256) gemm(const float* a, const float* b, float* c, int n) {
      __shared__ float A[16][16], B[16][17]; int x = threadIdx.x, y = threadIdx.y, i = blockIdx.y * 16 + y, j = blockIdx.x * 16 + x; float r = 0;
      for (int k = 0; k < n; k += 16) { A[y][x] = i < n && k + x < n ? a[i * n + k + x] : 0; B[y][x] = k + y < n && j < n ? b[(k + y) * n + j] : 0; __syncthreads();
        for (int q = 0; q < 16; q++) r += A[y][q] * B[q][x]; __syncthreads(); }
      if (i < n && j < n) c[i * n + j] = r * coef[1] + bias[2]; if (x + y == 0) atomicAdd(&counter, 1); }
    __global__ void named(const int* x, int* y) { __shared__ int s[128]; int t = threadIdx.x, g = t / 64; s[t] = x[t];
      if (g) asm volatile("bar.sync 1, 64;" ::: "memory"); else asm volatile("bar.sync 2, 64;" ::: "memory"); y[t] = s[g * 64 + 63 - t % 64]; }'''
    n = 40; a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n); cnt = np.zeros(1, np.int32)
    r = run_cuda(s, 'gemm', (3, 3), (16, 16), [a, b, Out(c), n], symbols={'coef': np.array([0, 2, 0, 0], np.float32), 'counter': cnt}, cta_sectors=True)
    torch.testing.assert_close(c, a @ b * 2 + 3, rtol=1e-4, atol=1e-4); assert cnt[0] == 9 and r.shared_races == 0
    assert r.unique_load_sectors <= r.cta_load_sectors <= r.global_load_sectors + 9 and r.block == (16, 16, 1)
    x = torch.arange(128, dtype=torch.int32); y = torch.empty_like(x)
    r = run_cuda(s, 'named', 2, 128, [x, Out(y)]); assert torch.equal(y, torch.cat([x[:64].flip(0), x[64:].flip(0)]))


def test_generic_addresses():
    g, o = torch.randn(32), torch.empty(32); run_cuda(SRC, 'generic', 1, 32, [g, Out(o), 2]); t = torch.arange(32) % 3
    torch.testing.assert_close(o, torch.where(t == 0, g, torch.where(t == 1, g * 2, g * 5)))


def test_barrier_deadlock():
    with pytest.raises(SimError, match='deadlock'): run_cuda(SRC, 'badbar', 1, 64, [torch.zeros(64, dtype=torch.int32)])
    with pytest.raises(SimError, match='endless'): run_cuda(SRC, 'deadlock', 1, 64, [torch.zeros(1, dtype=torch.int32)], max_steps=3000)


def test_faults_name_tensor_and_line():
    s = r'''__global__ void oob(const float* a, float* b, int n) { int i = threadIdx.x; b[i] = a[i + n]; }
            __global__ void mis(const char* a, float* b, int k) { b[threadIdx.x] = *(const float*)(a + k + 4 * threadIdx.x); }'''
    a, b = torch.randn(32), torch.empty(32)
    with pytest.raises(SimError, match=r'out-of-bounds load.*byte 128 of `param_0` \(128 bytes\).*thread \(31, 0, 0\).*ld\.global'):
        run_cuda(s, 'oob', 1, 32, [a, Out(b), 1])
    with pytest.raises(SimError, match='out-of-bounds store'): run_cuda(s, 'oob', 1, 33, [torch.randn(64), Out(b), 1])
    with pytest.raises(SimError, match='misaligned'): run_cuda(s, 'mis', 1, 4, [a, Out(b), 2])
    with pytest.raises(SimError, match='uninitialised load'): run_cuda(s, 'oob', 1, 32, [Out(a), Out(b), 0])
    with pytest.raises(SimError, match='null'): run_cuda(s, 'oob', 1, 32, [None, Out(b), 0])
    v = torch.randn(8, 16)[:, :8]; o = torch.empty(8)                       # only the span of a view is mapped
    with pytest.raises(SimError, match='out-of-bounds'): run_cuda(s, 'oob', 1, 8, [v, Out(o), 117])


def test_unknown_instruction():
    from tests.simulator.ptxsim import run
    ptx = '.version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{\n  frobnicate.b32 %r1;\n  ret;\n}\n'
    with pytest.raises(PtxError, match='unknown instruction PTX line 6: `frobnicate'): run(ptx, 'k', 1, 32, [])
