"""The kernels that move rows, route and sort, compiled for GPUs that are not here: no spills, wide accesses."""

import importlib

import pytest
import torch

from ivl_kernels.ops.moe_routing.op import Routing, RoutingBackward, Sorting
from tests.simulator import aot
from tests.simulator.gpu import CUDA_SOURCES, cuda_ptx
from tests.simulator.ptxsim.frontend import resources

packing = importlib.import_module("ivl_kernels.ops.token_packing.triton")
routing = importlib.import_module("ivl_kernels.ops.moe_routing.triton")


def meta(*size, dtype=torch.bfloat16):
    return torch.empty(*size, dtype=dtype, device="meta")


@pytest.mark.parametrize("target", [*aot.TARGETS, 86, 89])
def test_triton(target):
    embeds, positions, rows = meta(2, 300, 4096), meta(256, dtype=torch.int64), meta(256, 4096)
    with aot.compiling(target) as log:
        for take in (False, True):
            packing._launch(embeds, positions, rows, take)
        for experts, top_k, scoring in ((128, 8, "softmax_then_topk"), (32, 4, "topk_then_softmax")):
            logits = meta(1024, experts)
            ids, weights = routing.moe_routing(Routing(logits, meta(experts), top_k, scoring, False))
            routing.moe_routing_backward(RoutingBackward(weights, logits, None, ids, scoring, False))
            routing.moe_dispatch(Sorting(ids, experts, 64))
    assert len(log) == 9
    for kernel in log:
        assert kernel.spills == 0, kernel.kernel
        assert kernel.shared <= aot.SHARED_LIMIT.get(target, 99 * 1024), kernel.kernel
    for kernel in log[:2]:
        wide = r"global_store_dwordx4" if isinstance(target, str) else r"st\.global\.v4\.b32"
        assert kernel.count(wide) > 0, kernel.kernel


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("source", CUDA_SOURCES)
def test_cuda(source, arch):
    ptx = cuda_ptx(source, arch)
    for kernel, used in resources(ptx).items():
        assert used["spill_stores"] == used["spill_loads"] == 0, kernel
    assert source != "token_packing" or ("ld.global.v4.u32" in ptx and "st.global.v4.u32" in ptx)
