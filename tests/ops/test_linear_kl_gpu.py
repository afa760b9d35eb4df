"""The divergence's Triton kernels: executed in the simulator and counted."""

import functools
import re

import pytest
import torch

from ivl_kernels.ops import linear_kl
from ivl_kernels.ops.linear_logprob import triton_head
from tests.ops.test_linear_kl import check, operands, run
from tests.ops.test_linear_logprob_gpu import TENSOR_CORE
from tests.simulator.gpu import simulated_gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ours = functools.partial(linear_kl, backend="triton")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several runs and tiles of words at small sizes."""
    monkeypatch.setattr(triton_head, "RUN", 2)
    monkeypatch.setattr(triton_head, "WORDS", 256)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(dtype, weighted):
    v = operands(70, (48, 72), 500, dtype, rows=66)
    grad = torch.rand(66)
    with simulated_gpu() as log:
        if weighted:
            check(v, torch.tensor(0.7), grad, backend="triton", temperature=0.7)
        else:
            check(v, grad, backend="triton", temperature=0.7)
    assert {r.kernel for r in log} >= {"linear_kl_kernel", "linear_kl_merge_kernel", "linear_kl_gradient_kernel"}
    assert all(r.shared_races == 0 and r.global_atomics == 0 and r.shared_atomics == 0 for r in log)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_on_newer_gpus(dtype, newer_gpu):
    with simulated_gpu() as log:
        check(operands(40, (64, 32), 300, dtype), torch.rand(40), backend="triton")
    products = [r for r in log if r.kernel != "linear_kl_merge_kernel"]
    assert all(re.search(TENSOR_CORE[newer_gpu], r._ptx) for r in products) and all(r.shared_races == 0 for r in log)


@pytest.mark.parametrize("shape", [(1, (1, 2), 2), (3, (33, 7), 65), (129, (40, 40), 129)], ids=str)
def test_odd_shapes(shape):
    with simulated_gpu():
        check(operands(*shape, torch.bfloat16), torch.rand(shape[0]), backend="triton")


def test_close_distributions():
    hidden, weight, *_, rows, _ = operands(30, (32, 32), 400)
    with simulated_gpu():
        kl, dx, dw = run(ours, [hidden, weight, hidden, weight, rows, rows], torch.ones(30))
    assert (kl >= 0).all() and kl.max() < 1e-6 and not dx.any() and not dw.any()


def test_special_logits():
    """A word that only the teacher knows is infinitely far; one that it does not know adds nothing."""
    hidden, weight = torch.ones(1, 1), torch.zeros(5, 1)
    one = weight.clone()
    one[2] = -float("inf")
    with simulated_gpu():
        assert ours(hidden, one, hidden, weight).item() == float("inf")
        assert ours(hidden, weight, hidden, one).item() == pytest.approx(
            float(torch.log(torch.tensor(5 / 4))), rel=1e-5
        )
        one[2] = float("nan")
        assert (
            torch.isnan(ours(hidden, weight, hidden, one)).all()
            and torch.isnan(ours(hidden, one, hidden, weight)).all()
        )


def test_no_rows():
    v = operands(4, (8, 8), 30, rows=0)
    with simulated_gpu():
        kl, dx, dw = run(ours, v, torch.ones(0))
    assert not kl.numel() and not dx.any() and not dw.any() and dw.shape == (30, 8)


def test_a_row_does_not_depend_on_the_others():
    v = operands(130, (32, 48), 300, torch.bfloat16)
    with simulated_gpu():
        together = ours(*v)
        for row in (0, 77, 129):
            assert torch.equal(ours(*v[:4], v[4][row : row + 1], v[5][row : row + 1]), together[row : row + 1])


def test_logits_are_not_in_memory_and_dead_blocks_are_not_computed(monkeypatch):
    monkeypatch.setattr(triton_head, "RUN", 8)  # as on a GPU
    v = operands(256, (64, 64), 512, torch.bfloat16)
    grad = torch.rand(256)
    with simulated_gpu() as log:
        run(ours, v, grad)
        full = [r for r in log if r.kernel == "linear_kl_gradient_kernel"]
        forward = [r for r in log if r.kernel in ("linear_kl_kernel", "linear_kl_merge_kernel")]
        grad[128:] = 0
        begin = len(log)
        run(ours, v, grad)
    rows, words, width = 256, 512, 64
    assert sum(r.global_store_bytes for r in forward) < rows * words * 2 / 16
    assert sum(r.global_store_bytes for r in full) == rows * words * 2
    assert sum(r.mma_flops for r in forward) == sum(r.mma_flops for r in full) == 2 * 2 * rows * words * width
    half = sum(r.mma_flops for r in log[begin:] if r.kernel == "linear_kl_gradient_kernel")
    assert half * 2 == sum(r.mma_flops for r in full)
