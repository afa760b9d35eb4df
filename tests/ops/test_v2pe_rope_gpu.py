"""The GPU kernels compile for every target at the head shapes of the released models."""

import pytest
import torch

from ivl_kernels.testing import MODELS

aot = pytest.importorskip("tests.simulator.aot")
triton = pytest.importorskip("triton")

HEADS = sorted({(m.q_heads, m.kv_heads, m.head_dim, m.qk_norm) for m in MODELS.values()})


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
        common = (w, w, 1.0, 1e-6, width, 2, True)
        with aot.compiling(target) as log:
            kernels.rope(q, k, table, table, True, *common, False)
            kernels.rope(q[:, :3], k[:, :3], positions[:, :3], inv_freq[: width // 2], False, *common, False)
            if (q_heads, kv_heads) == (16, 8):
                kernels.rope(q, k, positions, inv_freq[: width // 2], False, *common, False)
                if norm:
                    kernels.norm_backward(q, k, q, k, table, table, True, *common)
        assert log
        for compiled in log:
            few = compiled is log[1]  # of which there are few programs
            assert compiled.spills == 0 and (few or compiled.registers <= 128), (compiled.kernel, compiled.registers)
            assert compiled.shared <= aot.SHARED_LIMIT[target]
        if not isinstance(target, str) and not norm:
            for compiled in log[:2]:
                assert compiled.count(r"ld\.global\S*\.v4") > 0 and compiled.count(r"st\.global\S*\.v4") > 0
