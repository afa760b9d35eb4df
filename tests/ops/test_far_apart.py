"""GPU kernels on tensors whose elements lie more than 2^31 apart, beside what `test_cases.py` does with every op."""

import importlib

import pytest
import torch

from ivl_kernels import _cuda
from ivl_kernels.ops import pixel_shuffle_mlp, v2pe_rope, v2pe_rope_
from tests.simulator.gpu import far, simulated_gpu

projector = importlib.import_module("ivl_kernels.ops.pixel_shuffle_mlp.triton")
BF16 = torch.bfloat16


def test_table_of_embeddings():
    """As if the table had all rows up to the last id, 32 bytes each."""
    table, out = far(torch.randn(2, 16).to(BF16), 0), torch.zeros(2, 16).to(BF16)
    ids = torch.tensor([0, table.stride(0) // 16])
    with simulated_gpu():
        _cuda.launch("token_packing", "embed_text", (1,), 128, [ids, table, out, 2, ids.max().item() + 1, -1, 32])
    assert torch.equal(out, table)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotary(axis):
    torch.manual_seed(axis)
    q, k, grad_q, grad_k = torch.randn(4, 3, 3, 3, 8).to(BF16)
    cos, sin, weight = torch.rand(3, 3, 4).to(BF16), torch.rand(3, 3, 4).to(BF16), torch.rand(8).to(BF16)

    def run(q, k, grad_q, grad_k, cos, sin):
        leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
        out = v2pe_rope(*leaves, cos=cos, sin=sin, rotary_dim=4, q_weight=weight, k_weight=weight, backend="triton")
        with torch.no_grad():
            results = *out, *torch.autograd.grad(out, leaves, (grad_q, grad_k))
            return *results, *v2pe_rope_(q, k, cos=cos, sin=sin, rotary_dim=4, backend="triton")

    there = [far(x, axis, i) for i, x in enumerate((q, k, grad_q, grad_k))]
    there += [x if axis == 1 else far(x, axis // 2, i) for i, x in enumerate((cos, sin), 4)]
    with simulated_gpu():
        expected, got = run(q, k, grad_q, grad_k, cos, sin), run(*there)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("width", [24, 1040])
def test_router_pooling(width, axis):
    """Fused, and in two passes."""
    z, u = torch.randn(3, 17, width).to(BF16), torch.randn(3, 4, width) / 8
    with simulated_gpu():
        expected, got = (torch.ops.ivl.tile_pool(x, u, "triton") for x in (z, far(z, axis)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_router_linears():
    x, w = torch.randn(3, 1, 24), torch.randn(17, 24).to(BF16)
    y = torch.randn(3, 1, 17)
    with simulated_gpu():
        there = far(w, 0)
        assert torch.equal(
            torch.ops.ivl.few_rows_linear(x, there, None, "triton"), torch.ops.ivl.few_rows_linear(x, w, None, "triton")
        )
        assert torch.equal(
            torch.ops.ivl.few_rows_linear_transposed(y, there, "triton"),
            torch.ops.ivl.few_rows_linear_transposed(y, w, "triton"),
        )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("implicit", [False, True])
def test_projector(axis, implicit, monkeypatch):
    monkeypatch.setattr(projector, "implicit", lambda *args: implicit)
    torch.manual_seed(0)
    x, norm = torch.randn(3, 17, 8).to(BF16), (torch.rand(32).to(BF16), torch.rand(32).to(BF16))
    layers = [[torch.randn(16, 32).to(BF16) / 6, torch.randn(16, 16).to(BF16) / 4], [torch.rand(16).to(BF16)] * 2]

    def run(x):
        leaves = [x.detach().requires_grad_(), *(n.clone().requires_grad_() for n in norm)]
        y = pixel_shuffle_mlp(*leaves, *layers, skip=1, backend="triton")
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)

    with simulated_gpu():
        expected, got = run(x), run(far(x, axis, index=2 if axis == 0 else 11))  # 11: the last token that begins a row
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_projector_into_far_rows():
    torch.manual_seed(0)
    x, norm = torch.randn(2, 4, 8).to(BF16), (torch.rand(32).to(BF16), torch.rand(32).to(BF16))
    layers = [[torch.randn(16, 32).to(BF16) / 6], [torch.rand(16).to(BF16)]]
    near = torch.zeros(4, 16).to(BF16)
    there, rows = far(near, 0), torch.tensor([3, 1])
    with torch.no_grad(), simulated_gpu():
        for out in (near, there):
            pixel_shuffle_mlp(x, *norm, *layers, out=out, out_rows=rows, backend="triton")
    assert near.any() and torch.equal(near, there)
