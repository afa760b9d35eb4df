"""A case against the truth, on any backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..compare import assert_accurate
from ..poison import poisoned
from ._case import Case, Inputs

FLOAT64_BOUND = 1e-12


def cast(values: Any, dtype: torch.dtype, device: str) -> Any:
    """A nest with its float tensors in `dtype` and everything on `device`."""
    return tree_map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype).detach(), values)


def has_floats(values: Any) -> bool:
    return any(leaf.is_floating_point() for leaf in tree_leaves(values))


def forward_backward(case: Case, inputs: Inputs, backend: str) -> list[torch.Tensor]:
    """Outputs, then the gradients of a fixed weighting of them. Backend "plain": eager torch if the case has it."""
    leaves = case.leaves(inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    if backend == "plain":
        out = case.plain(inputs) if case.plain else case.call(inputs, "reference")
    else:
        out = case.call(inputs, backend)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    grads: tuple[torch.Tensor, ...] = ()
    if leaves:
        even = functools.partial(torch.linspace, -1, 1, dtype=torch.float32)
        weights = [even(o.numel(), device=o.device).to(o.dtype).view_as(o) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights)
        for leaf in leaves:
            leaf.requires_grad_(False)
    return [t.detach() for t in (*outputs, *grads)]


class Checked:
    """A case in one dtype; the truth and plain torch are computed once, for all backends."""

    def __init__(self, case: Case, inputs: Inputs, device: str = "cpu") -> None:
        self.case, self.inputs, self.device = case, inputs, device

    @functools.cached_property
    def truth(self) -> list[torch.Tensor]:
        return forward_backward(self.case, cast(self.inputs, torch.float64, self.device), "reference")

    @functools.cached_property
    def plain(self) -> list[torch.Tensor]:
        return forward_backward(self.case, self.inputs, "plain")

    def check(self, backend: str) -> str:
        """What was found right, in words.

        Raises:
            AssertionError: too far from the truth, other integers than plain torch, or other bits in a second run.
        """
        with poisoned():
            got = forward_backward(self.case, self.inputs, backend)
        for index, (mine, true, base) in enumerate(zip(got, self.truth, self.plain)):
            if mine.dtype == torch.float64:
                # The truth itself is rounded to float64: a fixed, stated bound instead of a ratio.
                error, scale = (mine - true).abs().amax(), true.abs().amax()
                assert error <= FLOAT64_BOUND * scale, f"tensor {index}: error {error:.1e} of {scale:.1e}"
            elif mine.is_floating_point():
                assert_accurate(mine, true, base, f"tensor {index}")
            else:
                assert torch.equal(mine, base), f"tensor {index}: integers differ"
        passes = f"{len(got)} tensors, forward{' and backward' if self.case.gradients else ''}"
        if backend in ("reference", "torch"):  # torch's own kernels, which on a GPU may add with atomics
            return passes
        again = forward_backward(self.case, self.inputs, backend)
        assert all(torch.equal(a, b) for a, b in zip(got, again)), "a second run gives other bits"
        return f"{passes}, deterministic"
