"""The head's Triton kernels: executed in the simulator, counted, and compared with Liger-Kernel's."""

import functools
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ivl_kernels.ops import linear_ce, linear_logprob
from ivl_kernels.ops.linear_logprob import triton_head as kernels
from tests.ops.test_linear_logprob import check, operands, run, some_grads
from tests.simulator.gpu import simulated_gpu
from tests.simulator.ptxsim import patched_triton

TENSOR_CORE = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def small(monkeypatch):
    """Several runs and tiles of words at small sizes."""
    monkeypatch.setattr(kernels, "RUN", 2)
    monkeypatch.setattr(kernels, "WORDS", 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(dtype, small):
    with simulated_gpu() as log:
        v = operands(70, 48, 700, dtype, rows=66)
        check(v, some_grads(66), backend="triton", temperature=0.7, softcap=15.0)
        v["bias"] = None
        for save in ("nothing", "logits"):
            check(v, [some_grads(66)[0], None, None, None], backend="triton", save=save)
    assert all(r.shared_races == 0 and r.global_atomics == 0 and r.shared_atomics == 0 for r in log)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_on_newer_gpus(dtype, newer_gpu, small):
    with simulated_gpu() as log:
        check(operands(40, 64, 300, dtype), some_grads(40), backend="triton", save="nothing")
    products = [r for r in log if r.kernel != "linear_logprob_merge_kernel"]
    assert all(re.search(TENSOR_CORE[newer_gpu], r._ptx) for r in products) and all(r.shared_races == 0 for r in log)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 2), (129, 40, 129), (5, 17, 1025)])
def test_odd_shapes(shape, small):
    with simulated_gpu():
        check(operands(*shape, torch.bfloat16), some_grads(shape[0]), backend="triton")


def test_a_float32_weight_beside_short_hidden_states(small):
    v = operands(40, 32, 300)
    v["hidden"] = v["hidden"].bfloat16()
    with simulated_gpu():
        got = run(functools.partial(linear_logprob, backend="triton"), v, some_grads(40))
        half = v | {"weight": v["weight"].bfloat16(), "bias": v["bias"].bfloat16()}
        other = run(functools.partial(linear_logprob, backend="triton"), half, some_grads(40))
    assert got[5].dtype == torch.float32 and torch.allclose(got[0], other[0], atol=1e-2)


def test_a_target_outside_the_vocabulary_is_nan():
    v = operands(5, 16, 40)
    with simulated_gpu():
        raw = torch.ops.ivl.linear_logprob
        targets = torch.tensor([0, 40, 39, -100, 7])
        logp = raw(v["hidden"], v["weight"], None, targets, None, 1.0, 0.0, False, "triton")[0]
    assert torch.isnan(logp).tolist() == [False, True, False, True, False]


def test_a_row_does_not_depend_on_the_others(small):
    v = operands(130, 32, 300, torch.bfloat16)
    v["bias"] = None
    with simulated_gpu():
        together = linear_logprob(**v, backend="triton")
        for row in (0, 77, 129):
            alone = linear_logprob(
                v["hidden"][row : row + 1], v["weight"], v["targets"][row : row + 1], backend="triton"
            )
            assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone))


def test_blocks_without_a_gradient_are_not_computed(small):
    v = operands(256, 64, 256, torch.bfloat16)
    grad = torch.rand(256)
    with simulated_gpu() as log:
        run(functools.partial(linear_logprob, backend="triton"), v, [grad, None, None, None])
        full = sum(r.mma_flops for r in log if r.kernel == "linear_logprob_gradient_kernel")
        grad[128:] = 0
        del log[:]
        run(functools.partial(linear_logprob, backend="triton"), v, [grad, None, None, None])
    assert sum(r.mma_flops for r in log if r.kernel == "linear_logprob_gradient_kernel") * 2 == full > 0


def test_work_against_liger():
    """The forward writes no logits; bytes are at most those of Liger-Kernel's loss, whose products are the vendor's."""
    fused = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    rows, width, vocabulary = 256, 128, 2048
    v = operands(rows, width, vocabulary, torch.bfloat16)
    v["bias"] = None
    leaves = [v[k].requires_grad_() for k in ("hidden", "weight")]
    with simulated_gpu(preferred=True) as ours:
        loss = linear_ce(*leaves, v["targets"], None, torch.full((rows,), 1 / rows))
        grads = torch.autograd.grad(loss, leaves)
    with patched_triton() as theirs:
        other = fused.LigerFusedLinearCrossEntropyFunction.apply(*leaves, v["targets"])[0]
        torch.autograd.grad(other, leaves)
    assert loss.item() == pytest.approx(other.item(), rel=1e-2) and grads[1].shape == leaves[1].shape
    forward = [r for r in ours if r.kernel in ("linear_logprob_kernel", "linear_logprob_merge_kernel")]
    logits = rows * vocabulary * 2
    assert sum(r.global_store_bytes for r in forward) < logits / 16
    # Theirs: the kernel reads and writes the logits, which a product of the vendor's has written.
    read_and_written = sum(r.global_load_bytes + r.global_store_bytes for r in theirs) + logits
    backward = [r for r in ours if r.kernel == "linear_logprob_gradient_kernel"]
    assert sum(r.unique_load_bytes + r.unique_store_bytes for r in ours) <= read_and_written
    assert sum(r.global_store_bytes for r in backward) == logits


@pytest.mark.parametrize("part", [1, 0.5, 0.25])
def test_products_against_liger(part):
    """Of all rows a third more than Liger-Kernel's, as logits are made twice; it also multiplies the ignored ones."""
    fused = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    total, width, vocabulary = 256, 64, 1024
    rows = int(total * part)
    v = operands(total, width, vocabulary, torch.bfloat16, rows=rows)
    v["bias"] = None
    leaves = [v[k].requires_grad_() for k in ("hidden", "weight")]
    with simulated_gpu(preferred=True) as log:
        torch.autograd.grad(linear_logprob(*leaves, v["targets"], v["rows"], save="nothing").logp.sum(), leaves)
    # The two products with the gradients of the logits are the vendor's.
    ours = sum(r.mma_flops for r in log) + 2 * 2 * rows * width * vocabulary
    labels = torch.full((total,), -100).index_copy_(0, v["rows"], v["targets"])
    with patched_triton(), FlopCounterMode(display=False) as counter:
        fused.LigerFusedLinearCrossEntropyFunction.apply(*leaves, labels)
    theirs = counter.get_total_flops()
    assert theirs == 6 * total * width * vocabulary
    whole = -(-rows // 128) * 128  # rows of whole blocks, of which logits are made
    assert ours <= (4 * whole + 4 * rows) * width * vocabulary
    assert part == 1 or ours <= theirs
