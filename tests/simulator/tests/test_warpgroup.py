"""wgmma and tcgen05 of Triton kernels compiled for sm_90 and sm_100: operand layouts, and what must not pass."""
import re
import numpy as np, pytest, torch, triton, triton.language as tl
from tests.simulator.ptxsim import Out, run, run_cuda, run_triton
from tests.simulator.ptxsim.mem import SimError


@triton.jit
def product_k(a, b, c, M, N, K, sam, sak, sbk, sbn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM); n = tl.arange(0, BN); k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        x = tl.load(a + m[:, None] * sam + (first + k)[None, :] * sak)
        y = tl.load(b + (first + k)[:, None] * sbk + n[None, :] * sbn)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], acc)


def product(dtype, block, turned=(False, False), precision='tf32', warps=4, target=90):
    BM, BN, BK = block; M, N, K = 2 * BM, BN, 5 * BK
    torch.manual_seed(0)
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    left, right = (x.t().contiguous().t() if t else x for x, t in zip((a, b), turned))
    c = torch.empty(M, N)
    report = run_triton(product_k, (2,), left, right, Out(c), M, N, K, *left.stride(), *right.stride(), BM=BM, BN=BN, BK=BK,
                        PRECISION=precision, num_warps=warps, num_stages=3, target=target, sim=dict(check_races='error', check_uninit='strict'))
    return report, (a, b, c)


@pytest.mark.parametrize('target, name', [(90, 'wgmma.mma_async'), (100, 'tcgen05.mma')])
@pytest.mark.parametrize('turned', [(x, y) for x in (False, True) for y in (False, True)])
@pytest.mark.parametrize('dtype, precision', [(torch.bfloat16, 'tf32'), (torch.float32, 'tf32x3')])
@pytest.mark.parametrize('block, warps', [((64, 64, 64), 4), ((64, 16, 32), 4), ((128, 32, 16), 8)])     # 128, 64 and 32 byte swizzles
def test_layouts(dtype, precision, block, warps, turned, target, name):
    report, (a, b, c) = product(dtype, block, turned, precision, warps, target)
    assert name in report._ptx
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=5e-5)
    assert report.mma_flops == 2 * a.shape[0] * b.shape[1] * a.shape[1] * (3 if precision == 'tf32x3' else 1)
    assert report.shared_races == 0 and report.uninit_shared_reads == 0


@pytest.mark.parametrize('trans', [False, True])
def test_stmatrix(trans):
    source = r'''extern "C" __global__ void k(unsigned* out) {
      __shared__ __align__(16) unsigned s[128];
      unsigned t = threadIdx.x, row = (unsigned)__cvta_generic_to_shared(s + 4 * t);
      asm volatile("stmatrix.sync.aligned.m8n8.x4TRANS.shared.b16 [%0], {%1, %2, %3, %4};" ::
                   "r"(row), "r"(t), "r"(1000 + t), "r"(2000 + t), "r"(3000 + 65536 * t) : "memory");
      __syncthreads();
      for (int i = 0; i < 4; ++i) out[32 * i + t] = s[32 * i + t];
    }'''.replace('TRANS', '.trans' if trans else '')
    out = torch.empty(128, dtype=torch.int32)
    report = run_cuda(source, 'k', 1, 32, [Out(out)], arch='sm_90', check_races='error')
    t = np.arange(32, dtype=np.uint32)
    matrices = np.stack([t, 1000 + t, 2000 + t, 3000 + 65536 * t]).view(np.uint16).reshape(4, 8, 8)
    wanted = np.ascontiguousarray(matrices.swapaxes(1, 2) if trans else matrices)
    assert (out.numpy().view(np.uint16).reshape(4, 8, 8) == wanted).all()
    assert report.instructions['stmatrix'] == 1 and report.bank_conflicts == 0


def without_swizzle(after):
    """1 + a b of 64 x 16 by 16 x 8, by core matrices of 8 rows of 16 bytes; `after`: the asm behind the product."""
    source = r'''extern "C" __global__ void k(const unsigned short* a, const unsigned short* b, float* c) {
      __shared__ __align__(1024) unsigned short left[1024], right[128];
      const int t = threadIdx.x;
      for (int i = t; i < 1024; i += 128) left[i / 128 * 128 + i % 16 / 8 * 64 + i / 16 % 8 * 8 + i % 8] = a[i];
      right[t % 16 / 8 * 64 + t / 16 * 8 + t % 8] = b[t];
      __syncthreads();
      const auto matrix = [](const void* p) {
        return ((unsigned long long)__cvta_generic_to_shared(p) >> 4) | 128ull >> 4 << 16 | 256ull >> 4 << 32;
      };
      float d[4] = {1, 1, 1, 1};
      asm volatile("fence.proxy.async.shared::cta;\n.reg .pred add;\nsetp.ne.b32 add, %6, 0;\nwgmma.fence.sync.aligned;\n"
                   "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, add, 1, 1, 0, 0;\nAFTER"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(matrix(left)), "l"(matrix(right)), "r"(1));
      for (int i = 0; i < 4; ++i) c[(t / 32 * 16 + t % 32 / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = d[i];
    }'''.replace('AFTER', after)
    torch.manual_seed(0)
    a, b, c = torch.randn(64, 16).bfloat16(), torch.randn(8, 16).bfloat16(), torch.empty(64, 8)
    run_cuda(source, 'k', 1, 128, [a, b, Out(c)], arch='sm_90a', check_races='error', check_uninit='strict')
    return c, 1 + a.float() @ b.float().t()


def test_without_swizzle():
    got, truth = without_swizzle('wgmma.commit_group.sync.aligned;\\nwgmma.wait_group.sync.aligned 0;')
    torch.testing.assert_close(got, truth)


@pytest.mark.parametrize('after', ['wgmma.commit_group.sync.aligned;', 'wgmma.wait_group.sync.aligned 0;'])
def test_registers_hold_nothing_before_their_group_is_waited_for(after):
    assert without_swizzle(after)[0].isnan().all()


def broken(target, pattern, by=''):
    """The product by PTX in which what matches is replaced."""
    report, (a, b, c) = product(torch.bfloat16, (64, 64, 64), target=target)
    text, count = re.subn(pattern, by, report._ptx)
    assert count
    M, K, N = *a.shape, b.shape[1]
    values = [x for x in (a, b, Out(torch.empty(M, N)), M, N, K, *a.stride(), *b.stride()) if not isinstance(x, int) or x != 1]
    run(text, None, (2,), 128, [*values, None, None], report._compiled.metadata.shared, check_races='error', check_uninit='strict', max_steps=5000)


@pytest.mark.parametrize('target, pattern, by, message', [
    (90, r'wgmma\.wait_group\.sync\.aligned \d;', '', 'a product in flight reads'),
    (90, r'fence\.proxy\.async\.shared::cta;', '', 'without a fence.proxy.async'),
    (90, r'cp\.async\.wait_group\s+\d;', '', 'uninitialised shared read'),
    (90, r'bar\.sync\s+0;', '', 'race'),
    (100, r'mbarrier\.try_wait[^;]*;', 'setp.eq.u32 complete, 0, 0;', 'a product in flight reads'),
    (100, r'@%p\d+ tcgen05\.commit[^;]*;', '', 'endless loop'),
    (100, r'@%p\d+ mbarrier\.init[^;]*;', '', 'no mbarrier'),
    (100, r'@%p\d+ tcgen05\.dealloc[^;]*;', '', 'not deallocated'),
    (100, r'@%p\d+ tcgen05\.alloc[^;]*;', '', 'uninitialised shared read'),
    (100, r'fence\.proxy\.async\.shared::cta;', '', 'without a fence.proxy.async'),
    (100, r'cp\.async\.wait_group\s+\d;', '', 'uninitialised shared read'),
])
def test_errors(target, pattern, by, message):
    with pytest.raises(SimError, match=message): broken(target, pattern, by)


@pytest.mark.parametrize('how', ['max', 'min', 'max.NaN', 'max.abs'])
def test_redux_of_floats(how):
    source = r'''extern "C" __global__ void k(const float* x, float* y) {
      float v = x[threadIdx.x], r;
      asm volatile("redux.sync.HOW.f32 %0, %1, 0xffffffff;" : "=f"(r) : "f"(v));
      y[threadIdx.x] = r;
    }'''.replace('HOW', how)
    x, y = torch.linspace(-3, 2, 32), torch.empty(32)
    x[5] = float('nan')
    run_cuda(source, 'k', 1, 32, [x, Out(y)], arch='sm_100a')
    wanted = {'max': 2., 'min': -3., 'max.NaN': float('nan'), 'max.abs': 3.}[how]
    torch.testing.assert_close(y, torch.full((32,), wanted), equal_nan=True)


def test_packed_and_mixed_floats():
    source = r'''extern "C" __global__ void k(const float* a, const float* b, const float* c, float* y) {
      const int t = threadIdx.x;
      unsigned short h;
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(a[2 * t]));
      asm volatile("{.reg .b64 p, q, r; mov.b64 p, {%2, %3}; mov.b64 q, {%4, %5}; mov.b64 r, {%6, %7};\n"
                   "fma.rn.f32x2 r, p, q, r; mul.f32x2 r, r, q; sub.f32x2 r, r, p; mov.b64 {%0, %1}, r;}"
                   : "=f"(y[4 * t]), "=f"(y[4 * t + 1])
                   : "f"(a[2 * t]), "f"(a[2 * t + 1]), "f"(b[2 * t]), "f"(b[2 * t + 1]), "f"(c[2 * t]), "f"(c[2 * t + 1]));
      asm volatile("fma.rn.f32.bf16 %0, %1, %1, %2;" : "=f"(y[4 * t + 2]) : "h"(h), "f"(c[t]));
      asm volatile("add.f32.bf16 %0, %1, %2;" : "=f"(y[4 * t + 3]) : "h"(h), "f"(c[t]));
    }'''
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 64); y = torch.empty(128)
    report = run_cuda(source, 'k', 1, 32, [a, b, c, Out(y)], arch='sm_100a')
    y, h = y.view(32, 4), a[::2].bfloat16().double()
    packed = ((a.double() * b + c).float() * b - a).view(32, 2)
    torch.testing.assert_close(y[:, :2], packed, rtol=0, atol=0)
    torch.testing.assert_close(y[:, 2], (h * h + c[:32]).float(), rtol=0, atol=0)
    torch.testing.assert_close(y[:, 3], (h + c[:32]).float(), rtol=0, atol=0)
