"""The kernels that route and sort, compiled for GPUs that are not here: no spills."""

import importlib

import pytest
import torch

from ivl_kernels.ops.moe_routing.op import Routing, RoutingBackward, Sorting
from tests.simulator import aot
from tests.simulator.gpu import cuda_ptx
from tests.simulator.ptxsim.frontend import resources

routing = importlib.import_module("ivl_kernels.ops.moe_routing.triton")


def meta(*size, dtype=torch.bfloat16):
    return torch.empty(*size, dtype=dtype, device="meta")


@pytest.mark.parametrize("target", [*aot.TARGETS, 86, 89])
def test_triton(target):
    with aot.compiling(target) as log:
        for experts, top_k, scoring in ((128, 8, "softmax_then_topk"), (32, 4, "topk_then_softmax")):
            logits = meta(1024, experts)
            ids, weights = routing.moe_routing(Routing(logits, meta(experts), top_k, scoring, False))
            routing.moe_routing_backward(RoutingBackward(weights, logits, None, ids, scoring, False))
            routing.moe_dispatch(Sorting(ids, experts, 64))
    assert len(log) == 7
    for kernel in log:
        assert kernel.spills == 0, kernel.kernel
        assert kernel.shared <= aot.SHARED_LIMIT.get(target, 99 * 1024), kernel.kernel


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_cuda(arch):
    for kernel, used in resources(cuda_ptx("moe_routing", arch)).items():
        assert used["spill_stores"] == used["spill_loads"] == 0, kernel
