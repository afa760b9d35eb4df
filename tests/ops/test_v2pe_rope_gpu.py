"""The GPU kernels compile for every target at the head shapes of the released models."""

import pytest
import torch

from ivl_kernels.ops.v2pe_rope.op import NormBackward, Rope
from ivl_kernels.testing import MODELS

aot = pytest.importorskip("tests.simulator.aot")
triton = pytest.importorskip("triton")

HEADS = sorted({(m.q_heads, m.kv_heads, m.head_dim, m.qk_norm) for m in MODELS.values()})

WIDE = (
    [r"ld\.global\S*\.v4", r"st\.global\S*\.v4"],
    [r"(global|buffer)_load_dwordx4", r"(global|buffer)_store_dwordx4"],  # AMD
)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles(target, monkeypatch):
    from ivl_kernels.ops.v2pe_rope import triton as kernels

    monkeypatch.setattr(kernels, "_packed", lambda q: q.element_size() == 2 and not isinstance(target, str))
    inv_freq = torch.empty(64, device="meta")
    # Every width, with and without norm, everywhere; every head count on one target.
    shapes = HEADS if target == 90 else sorted({(16, 8, d, norm) for _, _, d, norm in HEADS})
    for q_heads, kv_heads, width, norm in shapes:
        q, k = (torch.empty(1, 256, h, width, device="meta", dtype=torch.bfloat16) for h in (q_heads, kv_heads))
        w = torch.empty(width, device="meta", dtype=torch.bfloat16) if norm else None
        table = torch.empty(1, 256, width, device="meta", dtype=torch.bfloat16)
        positions = torch.empty(1, 256, device="meta")
        inverse, common = inv_freq[: width // 2], (w, w, 1.0, 1e-6, width, 2, True)
        with aot.compiling(target) as log:
            kernels.v2pe_rope(Rope(q, k, table, table, True, *common))
            kernels.v2pe_rope(Rope(q[:, :3], k[:, :3], positions[:, :3], inverse, False, *common))
            if (q_heads, kv_heads) == (16, 8):
                kernels.v2pe_rope(Rope(q, k, positions, inverse, False, *common))
                if norm:
                    kernels.v2pe_rope_norm_backward(NormBackward(q, k, Rope(q, k, table, table, True, *common)))
        assert log
        for compiled in log:
            few = compiled is log[1]  # of which there are few programs
            assert compiled.spills == 0 and (few or compiled.registers <= 128), (compiled.kernel, compiled.registers)
            assert compiled.shared <= aot.SHARED_LIMIT[target]
        if not norm:
            for compiled in log[:2]:  # 16 bytes a lane
                assert all(compiled.count(wide) for wide in WIDE[isinstance(target, str)])
                assert not compiled.count(r"(global|buffer)_(load|store)_dwordx2")
