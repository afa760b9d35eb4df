"""Bulk copies of tensors and their mbarriers: layouts by Triton's descriptors, edges, and what must not pass."""
import re
import numpy as np, pytest, torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from tests.simulator.gpu import OLD_TRITON
from tests.simulator.ptxsim import Out, PtxError, TensorMap, run, run_cuda, run_triton
from tests.simulator.ptxsim.mem import SimError

STRICT = dict(check_races='error', check_uninit='strict')


@triton.jit
def product_k(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BM
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK): acc = tl.dot(a.load([m, k]), b.load([0, k]).T, acc, input_precision=PRECISION)
    c.store([m, 0], acc.to(c.dtype))


def product(block, dtype=torch.bfloat16, target=90, warps=4, rows=0, steps=5):
    """c = a b^T of 2 BM + `rows` rows and an inner length that no step divides."""
    BM, BN, BK = block; M, K = 2 * BM + rows, steps * BK - 8
    torch.manual_seed(0)
    a, b = torch.randn(M, K).to(dtype), torch.randn(BN, K).to(dtype)
    c = torch.full((M, BN), float('nan')).to(dtype)
    maps = [TensorDescriptor.from_tensor(x, list(s)) for x, s in ((a, (BM, BK)), (b, (BN, BK)), (c, (BM, BN)))]
    report = run_triton(product_k, (-(-M // BM),), *maps, K, BM=BM, BN=BN, BK=BK, PRECISION='tf32x3', num_warps=warps, num_stages=3,
                        target=target, sim=STRICT)
    return report, maps, K


@pytest.mark.parametrize('target', [90, 100])
@pytest.mark.parametrize('block, dtype, warps', [
    ((64, 64, 64), torch.bfloat16, 4), ((64, 16, 32), torch.float16, 4), ((128, 32, 16), torch.bfloat16, 8), ((64, 128, 128), torch.bfloat16, 4),
    ((64, 32, 32), torch.float32, 4)])                         # swizzles of 128, 64 and 32 bytes, two boxes side by side
def test_products(block, dtype, warps, target):
    report, (a, b, c), K = product(block, dtype, target, warps, rows=3)
    truth = a.base.double() @ b.base.double().t()
    torch.testing.assert_close(c.base.double(), truth, rtol=2**-8 if dtype != torch.float32 else 1e-5, atol=1e-2 if dtype != torch.float32 else 1e-4)
    size, programs, steps = a.base.element_size(), 3, 5
    assert report.bulk_load_bytes == programs * steps * (block[0] + block[1]) * block[2] * size   # what does not exist is filled
    assert report.unique_load_bytes == (a.base.numel() + b.base.numel()) * size
    assert report.unique_store_bytes == report.global_store_bytes == c.base.numel() * size
    assert report.global_load_bytes == (a.base.numel() + programs * b.base.numel()) * size and report.shared_races == 0
    assert 'cp.async.bulk.tensor.2d.shared' in report._ptx and 'cp.async.ca' not in report._ptx and 'cp.async.cg' not in report._ptx


@triton.jit
def corner_k(x, o, i, j, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    v = x.load([1, i, j])
    a, b, c = tl.arange(0, A), tl.arange(0, B), tl.arange(0, C)
    tl.store(o + (a[:, None, None] * B + b[None, :, None]) * C + c[None, None, :], v)


@pytest.mark.parametrize('i, j', [(0, 0), (5, 8), (-3, 16), (30, 0), (0, 40), (3, -3)])
@pytest.mark.parametrize('padding', ['zero', 'nan'])
def test_outside_of_three_dimensions(i, j, padding):
    x, o = torch.randn(3, 11, 24)[:, :9], torch.empty(2, 8, 16)
    run_triton(corner_k, (1,), TensorDescriptor(x, list(x.shape), list(x.stride()), [2, 8, 16], padding), Out(o), i, j, A=2, B=8, C=16,
               target=90, sim=STRICT)
    wanted = torch.full((2, 8, 16), 0.0 if padding == 'zero' else float('nan'))
    for b in range(8):
        for c in range(16):
            if 0 <= i + b < 9 and 0 <= j + c < 24: wanted[:, b, c] = x[1:, i + b, j + c]
    torch.testing.assert_close(o, wanted, rtol=0, atol=0, equal_nan=True)


@triton.jit
def gather_k(x, rows, o, column, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    tl.store(o + r[:, None] * C + c[None, :], x.gather(tl.load(rows + r), column))


@pytest.mark.parametrize('column', [0, 24, -8])
def test_gathered_rows(column):
    x, rows, o = torch.randn(19, 72).half(), torch.randint(-1, 21, (32,), dtype=torch.int32), torch.empty(32, 64).half()
    report = run_triton(gather_k, (1,), TensorDescriptor.from_tensor(x, [1, 64]), rows, Out(o), column, R=32, C=64, target=100, sim=STRICT)
    wide = torch.zeros(22, 160).half(); wide[:19, 8:80] = x
    assert torch.equal(o, wide[rows.long()][:, 8 + column:72 + column]) and 'tile::gather4' in report._ptx
    assert report.bulk_load_bytes == 32 * 64 * 2


def broken(target, pattern, by='', count=0):
    """The product by PTX in which what matches is replaced."""
    report, maps, K = product((64, 64, 64), target=target, steps=7)
    text, found = re.subn(pattern, by, report._ptx, count=count)
    assert found, report._ptx
    values = [x for m, how in zip(maps, report._compiled.metadata.tensordesc_meta)
              for x in (TensorMap(m.base, m.shape, m.strides, how['block_size'], how['swizzle']), *m.shape, *m.strides)]
    run(text, None, (2,), 128, [*values, K, None, None], report._compiled.metadata.shared, **STRICT, max_steps=5000)


@pytest.mark.skipif(OLD_TRITON, reason="the patterns are of newer compilers' text")
@pytest.mark.parametrize('target', [90, 100])
@pytest.mark.parametrize('pattern, by, message', [
    (r'(\S+:\s*)?mbarrier\.try_wait[^;]*;', 'setp.eq.u32 complete, 0, 0;', 'bulk copy in flight writes|a product in flight reads'),
    (r'mbarrier\.arrive\.expect_tx([^;]*), 16384;', r'mbarrier.arrive.expect_tx\1, 16400;', 'endless loop'),
    (r'@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;', '', 'endless loop'),
    (r'@%p\d+ mbarrier\.init[^;]*;', '', 'no mbarrier'),
    (r'cp\.async\.bulk\.wait_group\s+\d;', '', 'nobody waited for'),
    (r'cp\.async\.bulk\.commit_group;', '', 'nobody waited for'),
    (r'fence\.proxy\.async\.shared::cta;\s*bar\.sync\s+0;\s*elect', 'bar.sync 0; elect', 'without a fence.proxy.async'),
    (r'@%p\d+ cp\.async\.bulk\.tensor\.2d\.shared[^;]*;', '', 'endless loop'),
])
def test_errors(target, pattern, by, message):
    with pytest.raises(SimError, match=message): broken(target, pattern, by)


def test_a_wait_in_one_warp_is_told_to_others_by_a_barrier_only():
    report, _, _ = product((64, 64, 64))
    assert report.shared_races == 0
    for barrier in ('__syncthreads();', ''):
        if barrier: assert by_hand(barrier) is None
        else: assert 'whose mbarrier the warp did not wait for' in by_hand(barrier)


SOURCE = r'''
struct alignas(64) Map { char bytes[128]; };
extern "C" __global__ void k(const __grid_constant__ Map map, const __grid_constant__ Map target, unsigned* out, int row) {
  __shared__ __align__(1024) unsigned tile[32 * 32];
  __shared__ unsigned long long barrier;
  const int t = threadIdx.x;
  const unsigned to = __cvta_generic_to_shared(tile), at = __cvta_generic_to_shared(&barrier);
  if (t == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(at));
    BEFORE
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(at), "r"(4096));
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(to), "l"(&map), "r"(4), "r"(row), "r"(at) : "memory");
  }
  __syncthreads();
  if (WAITS) asm volatile("{.reg .pred p;\nwait: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n@!p bra wait;}" :: "r"(at) : "memory");
  BARRIER
  for (int i = t; i < 1024; i += 64) out[i] = tile[i / 32 * 32 + (i % 32 / 4 ^ i / 32 % 8) * 4 + i % 4];
  AFTER
}'''


def by_hand(barrier='__syncthreads();', waits='t < 32', before='', after='', target=None, row=2):
    """A box of 32 rows of 128 swizzled bytes; None or the error."""
    x, out = torch.arange(40 * 48, dtype=torch.int32).view(40, 48), torch.empty(32, 32, dtype=torch.int32)
    target = out if target is None else target
    source = SOURCE.replace('BARRIER', barrier).replace('WAITS', waits).replace('BEFORE', before).replace('AFTER', after)
    maps = [TensorMap(v, v.shape, v.stride(), (32, 32), 3) for v in (x, target)]
    try: run_cuda(source, 'k', 1, 64, [*maps, Out(out), row], arch='sm_90a', max_steps=5000, **STRICT)
    except PtxError as e: return str(e)
    wanted = torch.zeros(32, 32, dtype=torch.int32); part = x[row:row + 32, 4:36]
    wanted[:len(part)] = part
    assert torch.equal(out, wanted)


STORE = r'''if (t == 0) asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
            :: "l"(&target), "r"(0), "r"(0), "r"(to) : "memory");
  asm volatile("cp.async.bulk.commit_group;");'''


def test_by_hand():
    assert by_hand() is None and by_hand(row=20) is None and by_hand('', waits='1') is None
    back = torch.zeros(20, 32, dtype=torch.int32)
    wait = 'asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");'
    assert by_hand(after=STORE + wait, target=back) is None
    assert torch.equal(back, torch.arange(40 * 48, dtype=torch.int32).view(40, 48)[2:22, 4:36])
    assert 'nobody waited for' in by_hand(after=STORE, target=back)
    assert 'in flight reads' in by_hand(after=STORE + 'tile[t] = 1;' + wait, target=back)
    assert 'race' in by_hand(after=STORE + wait + 'tile[t] = 1;', target=back)           # only thread 0 has copies to wait for
    assert by_hand(after=STORE + wait + '__syncthreads(); tile[t] = 1;', target=back) is None
    assert 'without a fence.proxy.async' in by_hand(after='tile[t] = 1; __syncthreads();' + STORE + wait, target=back)
    fence = 'asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); __syncthreads();'
    assert by_hand(after='tile[t] = 1;' + fence + STORE + wait, target=back) is None


@pytest.mark.parametrize('options, message', [
    (dict(waits='0'), 'bulk copy in flight writes'),
    (dict(before='asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(at));'), 'bulk copy in flight writes|endless loop'),
    (dict(before='asm volatile("mbarrier.inval.shared::cta.b64 [%0];" :: "r"(at));'), 'no mbarrier'),
    (dict(before='tile[0] = 1;'), 'without a fence.proxy.async'),
    (dict(before='asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], 16; mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(at));'),
     'more arrivals'),
])
def test_errors_by_hand(options, message):
    assert re.search(message, by_hand(**options) or 'passed')


@pytest.mark.parametrize('change, message', [
    (dict(strides=(6, 1)), 'multiples of 16 bytes'), (dict(strides=(48, 2)), 'multiples of 16 bytes'), (dict(box=(32, 64)), 'rows of 256 bytes'),
    (dict(box=(512, 32)), 'boxes'), (dict(box=(32,)), 'differ in length'), (dict(shape=(0, 48)), 'boxes')])
def test_maps_are_checked(change, message):
    x = torch.zeros(40, 48)
    with pytest.raises(PtxError, match=message): TensorMap(**dict(tensor=x, shape=x.shape, strides=x.stride(), box=(32, 32), swizzle=3) | change).pack(1024)
