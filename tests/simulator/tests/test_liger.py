"""Liger-Kernel's Triton kernels, launched by its own wrappers on CPU tensors, on the simulator."""
import os, sys, warnings
import pytest, torch
pytest.importorskip('liger_kernel')
from tests.simulator.ptxsim import patched_triton
torch.manual_seed(0)
rnd = lambda *s, dt=torch.float32, g=True: torch.randn(*s).to(dt).requires_grad_(g)


def check(fn, ref, args, tol, grad=True, races=False):
    """Run fn under the simulator and ref in torch; compare outputs and input gradients."""
    a1 = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
    a2 = [a.detach().float().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    with patched_triton() as log:
        y = fn(*a1); g = torch.randn(y.shape)
        if grad: y.backward(g.to(y.dtype))
    assert log and (races or all(r.shared_races == 0 for r in log))
    r = ref(*a2)
    torch.testing.assert_close(y.float(), r, rtol=tol, atol=tol)
    if grad:
        r.backward(g)
        for p, q in zip(a1, a2):
            if isinstance(p, torch.Tensor) and p.requires_grad: torch.testing.assert_close(p.grad.float(), q.grad, rtol=4 * tol, atol=4 * tol)
    return log


@pytest.mark.parametrize('dt,tol', [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize('rows', [3, 50])
def test_rms_norm(dt, tol, rows):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction as F
    ref = lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w
    check(lambda x, w: F.apply(x, w, 1e-6, 0.0, 'llama', False), ref, [rnd(rows, 300, dt=dt), rnd(300, dt=dt)], tol if rows < 50 else tol * 3)


@pytest.mark.parametrize('dt,tol', [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_layer_norm(dt, tol):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction as F
    check(lambda x, w, b: F.apply(x, w, b, 1e-5), lambda x, w, b: torch.nn.functional.layer_norm(x, (256,), w, b, 1e-5),
          [rnd(20, 256, dt=dt), rnd(256, dt=dt), rnd(256, dt=dt)], tol)


@pytest.mark.parametrize('dt,tol', [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_swiglu(dt, tol):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction as F
    check(lambda a, b: F.apply(a, b), lambda a, b: torch.nn.functional.silu(a) * b, [rnd(9, 500, dt=dt), rnd(9, 500, dt=dt)], tol)


def test_geglu():
    from liger_kernel.ops.geglu import LigerGELUMulFunction as F
    check(lambda a, b: F.apply(a, b), lambda a, b: torch.nn.functional.gelu(a, approximate='tanh') * b, [rnd(9, 500), rnd(9, 500)], 1e-4)


@pytest.mark.parametrize('cols', [200, 5000])
def test_softmax(cols):
    from liger_kernel.ops.softmax import LigerSoftmaxFunction as F
    check(lambda x: F.apply(x), lambda x: x.softmax(-1), [rnd(7, cols)], 1e-4)


@pytest.mark.parametrize('V', [100, 3000])
@pytest.mark.parametrize('smooth', [0.0, 0.1])
def test_cross_entropy(V, smooth):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction as F
    t = torch.randint(0, V, (13,)); t[3] = -100
    fn = lambda x, t: F.apply(x, t, None, -100, 0.0, smooth, 'mean', None, False)[0]
    x = rnd(13, V); x1 = x.detach().clone().requires_grad_(); x2 = x.detach().clone().requires_grad_()
    with patched_triton() as log:
        y = fn(x1 * 1.0, t); y.backward()
    r = torch.nn.functional.cross_entropy(x2, t, label_smoothing=smooth); r.backward()
    torch.testing.assert_close(y, r, rtol=1e-5, atol=1e-5); torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-4, atol=1e-6)


def rope_ref(q, k, cos, sin):
    rot = lambda x: torch.cat([-x[..., x.shape[-1] // 2:], x[..., :x.shape[-1] // 2]], -1)
    return q * cos[:, None] + rot(q) * sin[:, None], k * cos[:, None] + rot(k) * sin[:, None]


@pytest.mark.parametrize('dt,tol', [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_rope(dt, tol):
    from liger_kernel.ops.rope import LigerRopeFunction as F
    B, HQ, HK, T, D = 2, 6, 2, 17, 64
    f = torch.arange(T)[:, None] * 10000. ** (-torch.arange(D // 2) * 2 / D); e = torch.cat([f, f], -1)[None]
    c, s = e.cos().to(dt), e.sin().to(dt); q, k = rnd(B, HQ, T, D, dt=dt), rnd(B, HK, T, D, dt=dt)
    def both(fn):
        def g(q, k): a, b = fn(q, k, c, s) if fn is rope_ref else fn(q.clone(), k.clone(), c, s)[:2]; return torch.cat([a, b], 1)
        return g
    def ref(q, k): a, b = rope_ref(q, k, c.float(), s.float()); return torch.cat([a, b], 1)
    check(both(F.apply), ref, [q, k], tol)


def test_group_norm():
    from liger_kernel.ops.group_norm import LigerGroupNormFunction as F
    check(lambda x, w, b: F.apply(x, w, b, 6, 3, 1e-5), lambda x, w, b: torch.nn.functional.group_norm(x, 3, w, b, 1e-5), [rnd(4, 6, 40), rnd(6), rnd(6)], 1e-3,
          races=True)   # two replicated warps store sums that differ by an ulp (FMA contraction in the butterfly): a true, harmless race


def test_fused_linear_cross_entropy():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as F
    t = torch.randint(0, 300, (16,))
    check(lambda x, w: F.apply(x, w, t)[0], lambda x, w: torch.nn.functional.cross_entropy(x @ w.T, t), [rnd(16, 32), rnd(300, 32)], 1e-4)


def test_kl_div():
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction as F
    a, b = rnd(8, 100).log_softmax(-1).detach().requires_grad_(), torch.randn(8, 100).softmax(-1)
    check(lambda a: F.apply(a, b), lambda a: torch.nn.functional.kl_div(a, b, reduction='batchmean'), [a], 1e-4)
