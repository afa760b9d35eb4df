"""The simulator's own checks and counters: known access patterns, and mutated kernels that must be caught."""
import re, shutil
import numpy as np, pytest, torch
from tests.simulator.ptxsim import run, run_cuda, compile_triton, patched_triton, run_triton, Out, SimError
from tests.simulator.ptxsim.numbers import fma32, to_bf16, from_bf16, f32_odd, lut3
from tests.simulator.ptxsim.parse import wto
nvcc = pytest.mark.skipif(not shutil.which('nvcc'), reason='nvcc not installed')


@nvcc
@pytest.mark.parametrize('stride,sectors', [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_coalescing(stride, sectors):
    s = '__global__ void k(const float* x, float* y, int s) { y[threadIdx.x] = x[threadIdx.x * s]; }'
    r = run_cuda(s, 'k', 1, 32, [torch.randn(32 * stride), Out(torch.empty(32)), stride])
    assert r.global_load_sectors == sectors and r.global_load_bytes == 128 and r.global_store_sectors == 4
    assert r.unique_load_sectors == sectors and r.unique_load_bytes == 128 and r.load_efficiency == 4 / sectors


@nvcc
@pytest.mark.parametrize('stride,waves', [(1, 1), (2, 2), (3, 1), (4, 4), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts(stride, waves):
    s = '__global__ void k(float* y, int s) { extern __shared__ float m[]; m[threadIdx.x * s] = 1; __syncthreads(); y[threadIdx.x] = m[threadIdx.x * s]; }'
    r = run_cuda(s, 'k', 1, 32, [Out(torch.empty(32)), stride], shared_bytes=8192)
    assert r.shared_wavefronts == 2 * waves and r.shared_wavefronts_ideal == 2


@nvcc
def test_vector_bank_conflicts():
    s = '__global__ void k(float4* y, int s) { extern __shared__ float4 m[]; int t = threadIdx.x; m[t * s] = make_float4(1, 2, 3, t); __syncthreads(); y[t] = m[t * s]; }'
    for st, waves in ((1, 4), (2, 8), (8, 32)):
        y = torch.empty(32, 4); r = run_cuda(s, 'k', 1, 32, [Out(y), st], shared_bytes=8192)
        assert r.shared_wavefronts == 2 * waves and (y[:, 3] == torch.arange(32)).all()


@nvcc
def test_divergence_counts():
    s = '''__global__ void k(const int* n, float* y) { int t = threadIdx.x; float a = 0; for (int i = 0; i < n[t]; i++) a = a * 1.5f + 1; y[t] = a; }'''
    n = torch.arange(32, dtype=torch.int32); y = torch.empty(32)
    one = run_cuda(s, 'k', 1, 32, [torch.full((32,), 31, dtype=torch.int32), Out(y)])
    r = run_cuda(s, 'k', 1, 32, [n, Out(y)])
    assert r.instructions['fp'] <= one.instructions['fp'] * 2.2 and r.divergent_branches > 0        # lanes reconverge: no 32-fold blow-up
    ref = []
    for k in range(32):
        a = np.float32(0)
        for _ in range(k): a = np.float32(float(a) * 1.5 + 1)
        ref.append(a)
    assert np.array_equal(y.numpy(), np.array(ref))


def _gemm(ns):
    from tests.simulator.tests.test_triton import matmul_k
    M = N = 64; K = 160
    a, b, c = torch.randn(M, K).half(), torch.randn(K, N).half(), torch.empty(M, N)
    v = dict(a=a, b=b, c=c, idx=None, M=M, N=N, K=K, sam=K, sbk=N, scm=N, BM=64, BN=64, BK=32, PREC='tf32', GATHER=False)
    r, rt = compile_triton(matmul_k, v, 80, dict(num_warps=4, num_stages=ns))
    def go(ptx):
        rep = run(ptx, 'matmul_k', (1, 1), 128, [Out(c) if n == 'c' else v[n] for n in rt] + [None, None], r.metadata.shared)
        return rep, (c - a.float() @ b.float()).abs().max().item()
    return r.asm['ptx'], go


@pytest.mark.parametrize('ns', [2, 3])
def test_missing_barrier_or_wait_is_found(ns):
    pytest.importorskip('triton')
    ptx, go = _gemm(ns); rep, err = go(ptx)
    assert err < 1e-3 and rep.shared_races == 0 and rep.uninit_shared_reads == 0
    bars = list(re.finditer(r'bar\.sync[^\n]*', ptx)); found = 0
    for m in bars: found += go(ptx[:m.start()] + ptx[m.end():])[0].shared_races > 0
    assert found >= len(bars) - 2                        # one barrier of the pipelined loop is redundant, two with Triton 3.8
    rep, err = go(re.sub(r'cp\.async\.wait_group\s+\d+', 'cp.async.wait_group 9', ptx))
    assert err > 0.1 and rep.uninit_shared_reads > 0     # without the waits the copies never arrive


@nvcc
def test_strict_shared_uninit():
    s = '__global__ void k(float* y) { __shared__ float m[32]; if (threadIdx.x < 16) m[threadIdx.x] = 1; __syncthreads(); y[threadIdx.x] = m[threadIdx.x]; }'
    assert run_cuda(s, 'k', 1, 32, [torch.empty(32)]).uninit_shared_reads == 16
    with pytest.raises(SimError, match='uninitialised shared read'): run_cuda(s, 'k', 1, 32, [torch.empty(32)], check_uninit='strict')


def test_batches_agree():
    pytest.importorskip('triton')
    from tests.simulator.tests.test_triton import softmax_k
    x = torch.randn(50, 300); reps, outs = [], []
    for ml in (1, 700, 1 << 20):
        o = torch.empty_like(x); reps.append(run_triton(softmax_k, (50,), x, Out(o), 300, 300, 300, B=512, sim=dict(max_lanes=ml)).to_dict()); outs.append(o)
    for r in reps: r.pop('block_steps')
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]) and reps[0] == reps[1] == reps[2]


def test_patched_launch_updates_in_place():
    pytest.importorskip('triton')
    from tests.simulator.tests.test_triton import add_k
    x = torch.randn(100); o = torch.zeros(200)
    with patched_triton() as log: add_k[(1,)](x, x, o[50:150], 100, B=128)
    assert torch.equal(o[50:150], 2 * x) and not o[:50].any() and len(log) == 1


def test_fma_is_correctly_rounded():
    from fractions import Fraction
    rng = np.random.default_rng(0)
    a = rng.standard_normal(4000).astype(np.float32); b = rng.standard_normal(4000).astype(np.float32)
    c = (-(a.astype(np.float64) * b)).astype(np.float32); c[::2] = rng.standard_normal(2000).astype(np.float32) * np.float32(2) ** rng.integers(-40, 40, 2000)
    a[:8] = 1 + 2. ** -12; b[:8] = 1 + 2. ** -12; c[:8] = 2. ** -np.arange(60, 68)          # exact ties broken by a tiny addend
    r = fma32(a, b, c)
    for x, y, z, v in zip(a, b, c, r):
        e = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        lo, hi = Fraction(float(np.nextafter(v, np.float32(-np.inf)))), Fraction(float(np.nextafter(v, np.float32(np.inf))))
        d = abs(e - Fraction(float(v))); assert d <= abs(e - lo) and d <= abs(e - hi)


def test_bf16_rounding():
    x = torch.cat([torch.randn(5000), torch.tensor([float('nan'), float('inf'), -0.0, 3.4e38, 1e-40])])
    got = torch.from_numpy(from_bf16(to_bf16(x.numpy()))); ref = x.bfloat16().float()
    assert torch.equal(got[:-5], ref[:-5]) and torch.equal(got.isnan(), ref.isnan()) and torch.equal(got[-4:], ref[-4:])
    d = x[:5000].double() * (1 + 2. ** -30); assert torch.equal(torch.from_numpy(from_bf16(to_bf16(d.numpy()))), d.bfloat16().float())


def test_lut3():
    a, b, c = (np.array([v], np.uint32) for v in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    for l in range(256): assert int(lut3(a, b, c, l)[0]) & 0xFF == l


def test_layout_keeps_loops_contiguous():
    #  0 -> 1 (header) -> {2, 5}; 2 -> {3, 4}; 3 -> {6 (exit), 4}; 4 -> 1; 5, 6 -> 7
    o = wto([[1], [5, 2], [3, 4], [6, 4], [1], [7], [7], []]); at = o.index
    assert max(map(at, (1, 2, 3, 4))) < min(map(at, (5, 6))) and o[-1] == 7 and o[0] == 0


@nvcc
def test_large_storages_are_mapped_where_they_are_seen():
    """Three rows 2^32 bytes apart: only their elements are there, and are what is copied."""
    s = 'extern "C" __global__ void k(int* x, long long step, int n) { if (threadIdx.x < n) x[blockIdx.x * step + threadIdx.x] += 1; }'
    x, step = torch.empty(2**31 + 64, dtype=torch.int32), 2**30
    view, other = x.as_strided((3, 4), (step, 1)), torch.zeros(5)
    view.zero_()
    r = run_cuda(s, 'k', 3, 32, [view, step, 4])
    assert (view == 1).all() and r.unique_store_bytes == 48 and r.unique_store_sectors == 3 and r.tensors['param_0']['unique_load_bytes'] == 48
    with pytest.raises(SimError, match='out-of-bounds|outside'): run_cuda(s, 'k', 3, 32, [view, step, 5])
    y = '__global__ void k(const int* x, float* y, long long step) { y[threadIdx.x] = x[threadIdx.x * step + 3]; }'
    r = run_cuda(y, 'k', 1, 3, [view, Out(other), step])
    assert other[:3].tolist() == [1, 1, 1] and r.unique_load_bytes == 12 and r.unique_store_bytes == 12


@nvcc
@pytest.mark.parametrize('drop', [None, 'zeroed', 'added'])
def test_barriers_around_atomics(drop):
    """Atomics of several warps do not race with each other, but with plain accesses."""
    s = '''__global__ void k(int* y) { __shared__ int sum; if (threadIdx.x == 0) sum = 0;
      __syncthreads(); /*zeroed*/ atomicAdd(&sum, 1); atomicAdd(&sum, 1);
      __syncthreads(); /*added*/ y[threadIdx.x] = sum; }'''
    y = torch.empty(96, dtype=torch.int32)
    r = run_cuda(s.replace(f'__syncthreads(); /*{drop}*/', ''), 'k', 2, 96, [y])
    assert (r.shared_races > 0) == (drop is not None) and (drop or (y == 192).all())
