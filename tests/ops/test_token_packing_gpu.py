"""The kernels that pack and move rows, compiled for GPUs that are not here: no spills, wide accesses."""

import importlib

import pytest
import torch

from ivl_kernels.ops.token_packing.op import EmbedText
from ivl_kernels.ops.token_packing.packed import Packing
from tests.simulator import aot
from tests.simulator.gpu import cuda_ptx
from tests.simulator.ptxsim.frontend import resources

packing = importlib.import_module("ivl_kernels.ops.token_packing.triton")


def meta(*size, dtype=torch.bfloat16):
    return torch.empty(*size, dtype=dtype, device="meta")


@pytest.mark.parametrize("target", [*aot.TARGETS, 86, 89])
def test_triton(target):
    embeds, positions, rows = meta(2, 300, 4096), meta(256, dtype=torch.int64), meta(256, 4096)
    with aot.compiling(target) as log:
        for take in (False, True):
            packing._launch(embeds, positions, rows, take)
        packing.embed_text(EmbedText(meta(2, 300, dtype=torch.int64), meta(1000, 4096), 7))
    assert len(log) == 3
    wide = r"(global|buffer)_store_dwordx4" if isinstance(target, str) else r"st\.global\.v4\.b32"
    check(log, target)
    assert all(kernel.count(wide) > 0 for kernel in log)


@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_packing_in_triton(target, padding):
    ids = meta(8, 3392, dtype=torch.int64)
    a = Packing(ids, ids, meta(104, dtype=torch.bool), ids, ids.float(), None, 7, 256, 64, 1000, padding, True, 0)
    with aot.compiling(target) as log:
        _, status, found = packing._scan(a)
        packing._write(a, status, found, meta(5, 8, 3392, dtype=torch.int64), ids.float())
    assert len(log) == 4
    check(log, target)


def check(log, target):
    for kernel in log:
        assert kernel.spills == 0, kernel.kernel
        assert kernel.shared <= aot.SHARED_LIMIT.get(target, 99 * 1024), kernel.kernel


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_cuda(arch):
    ptx = cuda_ptx("token_packing", arch)
    for kernel, used in resources(ptx).items():
        assert used["spill_stores"] == used["spill_loads"] == 0, kernel
    assert "ld.global.v4.u32" in ptx and "st.global.v4.u32" in ptx
