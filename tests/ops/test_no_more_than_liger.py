"""Bytes and instructions of norms and SwiGLU against Liger-Kernel's kernels, both on the simulator.

Forward no byte more. Backward, the norms compute again what Liger keeps (and write partial sums by fewer rows), and
SwiGLU writes the activation that Liger keeps from the forward.
"""

import pytest
import torch

from ivl_kernels.ops import layer_norm, rms_norm
from ivl_kernels.ops.mlp import op
from tests.simulator.gpu import TRITON, simulated_gpu

pytest.importorskip("liger_kernel")
if TRITON < (3, 8):
    pytest.skip(
        "the limits are those of Triton 3.8 and 3.9: older ones compile both sides otherwise", allow_module_level=True
    )

# Rows and width: InternViT-300M, Qwen3-0.6B's hidden, Qwen3-8B's, InternViT-6B's; SwiGLU: Qwen3-0.6B's to GPT-OSS's.
NORMS = [(12, 1024), (8, 2048), (6, 4096), (5, 3200)]
GATED = [(8, 3072), (6, 4096), (5, 1000), (2, 12288)]
# At most so many times Liger's bytes and instructions: forward, and forward with backward.
LIMITS = {
    ("rms", False): (1, 1),
    ("layer", False): (1, 1.1),
    ("swiglu", False): (1, 1),
    ("rms", True): (1.07, 1.3),
    ("layer", True): (1.09, 1.55),
    ("swiglu", True): (9 / 8, 1.08),
}


def totals(function):
    with simulated_gpu() as log:
        function()
    return {
        name: sum(getattr(report, name) for report in log)
        for name in ("global_load_bytes", "global_store_bytes", "warp_instructions")
    }


def compare(ours, theirs, kind, backward):
    ours, theirs = totals(ours), totals(theirs)
    moved, their_moved = (t["global_load_bytes"] + t["global_store_bytes"] for t in (ours, theirs))
    bytes_, instructions = LIMITS[kind, backward]
    assert moved <= bytes_ * their_moved, (ours, theirs)
    assert ours["warp_instructions"] <= instructions * theirs["warp_instructions"], (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("shape", NORMS)
def test_norms(shape, kind, backward, dtype):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight, bias = (torch.randn(size).to(dtype).requires_grad_(backward) for size in (shape, shape[1:], shape[1:]))

    def run(function, arguments):
        out = function(*arguments)
        if backward:
            torch.autograd.grad(out, [t for t in arguments if isinstance(t, torch.Tensor)], torch.ones_like(out))

    if kind == "rms":
        ours = lambda: run(lambda *a: rms_norm(*a, 1e-6, backend="triton"), (x, weight))  # noqa: E731
        theirs = lambda: run(lambda *a: LigerRMSNormFunction.apply(*a, 1e-6, 0.0, "llama", False), (x, weight))  # noqa: E731
    else:
        ours = lambda: run(lambda *a: layer_norm(*a, 1e-6, backend="triton"), (x, weight, bias))  # noqa: E731
        theirs = lambda: run(lambda *a: LigerLayerNormFunction.apply(*a, 1e-6), (x, weight, bias))  # noqa: E731
    compare(ours, theirs, kind, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", GATED)
def test_swiglu(shape, backward, dtype):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    from ivl_kernels.ops.mlp import triton as kernels

    rows, inner = shape
    x, gate, up, down = (torch.randn(*s).to(dtype) for s in ((rows, 16), (inner, 16), (inner, 16), (16, inner)))
    halves = [torch.randn(rows, inner).to(dtype).requires_grad_() for _ in range(2)]

    def ours():
        _, pre = kernels.mlp(op.Mlp(x, gate, up, None, down, None, True))
        if backward:
            kernels.mlp_backward(op.MlpBackward(x, x, gate, up, down, pre, True, True, True, False, True, False))

    def theirs():
        out = LigerSiLUMulFunction.apply(*halves)
        if backward:
            torch.autograd.grad(out, halves, torch.ones_like(out))

    compare(ours, theirs, "swiglu", backward)
