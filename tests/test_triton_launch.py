"""Kernels that are launched without Triton's look-up: the same compiled code with the same arguments."""

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from ivl_kernels import ops
from ivl_kernels._triton import Kernel, cdiv, next_power_of_2
from ivl_kernels.testing.cases import Numbers, all_cases, cast
from tests.simulator.gpu import simulated_gpu
from tests.simulator.idle import idle_gpu


@Kernel
@triton.jit(do_not_specialize=["n"])
def scale_kernel(x, bias, out, n, stride, factor, BLOCK: tl.constexpr):
    """Documented."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i * stride, i < n, 0.0) * factor
    if bias is not None:
        value += tl.load(bias + i, i < n, 0.0)
    tl.store(out + i, value, i < n)


X = torch.zeros(64)
CALLS = {
    "plain": (X, None, X, 5, 3, 0.5, 16),
    "another value": (X, None, X, 7, 5, 2.5, 16),
    "integer 1": (X, None, X, 5, 1, 0.5, 16),
    "multiple of 16": (X, None, X, 5, 32, 0.5, 16),
    "64 bits": (X, None, X, 5, 2**33, 0.5, 16),
    "negative": (X, None, X, 5, -(2**31), 0.5, 16),
    "unaligned": (X[1:], None, X, 5, 3, 0.5, 16),
    "aligned elsewhere": (X[4:], None, X, 5, 3, 0.5, 16),
    "with bias": (X, X, X, 5, 3, 0.5, 16),
    "another dtype": (X.half(), None, X, 5, 3, 0.5, 16),
    "another constant": (X, None, X, 5, 3, 0.5, 32),
}


def launched(idle, kernel, call):
    kernel[(2,)](*call[:-1], BLOCK=call[-1], num_warps=2, enable_fp_fusion=True)
    metadata, *grid, _, _, _, _, _, _ = idle.last[: 4 + 6]
    return metadata.hash, grid, idle.last[10:]


def test_the_compiled_kernel_that_triton_would_take():
    with idle_gpu() as idle:
        expected = {name: launched(idle, scale_kernel.function, call) for name, call in CALLS.items()}
        for _ in range(2):  # the second time from what was kept
            for name, call in CALLS.items():
                got = launched(idle, scale_kernel, call)
                assert got[:2] == expected[name][:2], name
                assert all(a is b or a == b for a, b in zip(got[2], expected[name][2], strict=True)), name
        before = len(scale_kernel._compiled)
        launched(idle, scale_kernel, CALLS["another value"])
        assert len(scale_kernel._compiled) == before  # found
        assert idle.launches == 3 * len(CALLS) + 1


def test_profilers_hear_of_launches(monkeypatch):
    hook = knobs.HookChain()
    hook.add(print)
    with idle_gpu() as idle:
        launched(idle, scale_kernel, CALLS["plain"])
        launched(idle, scale_kernel, CALLS["plain"])
        assert idle.last[7:10] == (None, None, None)  # metadata and hooks
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
        launched(idle, scale_kernel, CALLS["plain"])
        assert hook in idle.last


def test_a_keyword_that_is_no_constant_is_left_to_triton():
    with idle_gpu() as idle:
        before = len(scale_kernel._compiled)
        for factor in (0.25, 0.75):
            scale_kernel[(1,)](X, None, X, 5, 3, factor=factor, BLOCK=16, enable_fp_fusion=True)
            assert idle.last[-2] == factor
        assert len(scale_kernel._compiled) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_op_leaves_a_kernel_to_triton(dtype, monkeypatch):
    first = Kernel._first

    def kept(self, key, grid, args, constants):
        compiled = first(self, key, grid, args, constants)
        assert key in self._compiled, self.__name__
        return compiled

    monkeypatch.setattr(Kernel, "_first", kept)
    with idle_gpu() as idle:
        for case in all_cases():
            if case.graph:
                case.call(cast(case.inputs(Numbers()), dtype, "cpu"), "")
        assert idle.launches > 40


def test_a_kernel_is_its_function_in_all_else():
    assert scale_kernel.__name__ == "scale_kernel" and scale_kernel.__doc__ == "Documented."
    assert scale_kernel.arg_names == scale_kernel.function.arg_names
    out = torch.zeros(5)
    with simulated_gpu() as log:
        scale_kernel[(1,)](torch.arange(10.0), torch.ones(5), out, 5, 2, 3.0, BLOCK=16)
    assert out.tolist() == [1, 7, 13, 19, 25] and len(log) == 1


def test_whole_integers():
    for a in range(70):
        assert next_power_of_2(a) == triton.next_power_of_2(a)
        assert all(cdiv(a, b) == triton.cdiv(a, b) for b in range(1, 20))


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_an_op_finds_its_kernels_again(rows):
    from ivl_kernels.ops.norm.triton import norm_kernel

    with idle_gpu() as idle:
        for step in range(3):
            ops.rms_norm(torch.zeros(rows, 48), torch.zeros(48))
            if step == 0:
                known = len(norm_kernel._compiled)
        assert len(norm_kernel._compiled) == known and idle.launches == 3
