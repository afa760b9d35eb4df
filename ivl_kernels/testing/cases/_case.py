"""What a case is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..catalogue import MODELS, ModelShape

Inputs = dict[str, Any]


class Numbers:
    """Where the numbers of inputs come from: the same ones for every backend.

    Args:
        dtype: of the floats.
        device: where they are made.
        seed: of the generator.
        reserve: memory is only reserved; for shapes at which nothing runs.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0, reserve: bool = False
    ) -> None:
        self.dtype, self.device, self.reserve = dtype, device, reserve
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(
        self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        dtype = dtype or self.dtype
        if self.reserve:
            return torch.empty(shape, dtype=dtype, device=self.device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.randn(shape, generator=self.generator, dtype=wide, device=self.device)
        return (values.mul_(scale) + shift if shift else values.mul_(scale)).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """From 0 to 1; with a dtype of its own always filled."""
        if self.reserve and dtype is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        wide = torch.float64 if (dtype or self.dtype) == torch.float64 else torch.float32
        return torch.rand(shape, generator=self.generator, dtype=wide, device=self.device).to(dtype or self.dtype)

    def linear(self, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [outputs, inputs] and bias of a layer that keeps the size of what goes through it."""
        return self.normal(outputs, inputs, scale=inputs**-0.5), self.normal(outputs, scale=0.1)

    def choices(self, rows: int, count: int, k: int) -> torch.Tensor:
        """[rows, k] distinct numbers below `count`; filled also where memory is only reserved."""
        return self.uniform(rows, count, dtype=torch.float32).topk(k).indices


@dataclass(frozen=True)
class Cost:
    """What one direction of a call costs.

    Attributes:
        least: bytes. Every byte of the inputs that the result depends on is read once and every byte of the results is
            written once, as stored; nothing between. The inputs of a backward are the gradients of the results and what
            it needs of the forward's inputs and results. This is what "least" means everywhere in this repository.
        flops: of the matrix products.
        elements: what counts of instructions are divided by.
        planned: bytes that the launches of our GPU kernels must move, given how the work is split into launches: with
            what one leaves for the next, without what is left to the vendor's products. None: the least.
    """

    least: int
    flops: int = 0
    elements: int = 1
    planned: int | None = None

    @property
    def moved(self) -> int:
        return self.least if self.planned is None else self.planned


@dataclass(frozen=True)
class Case:
    """One call of a public op at one shape.

    Attributes:
        op: the raw op whose backends are checked (a key of `_library.OPS`).
        name: what is special about these inputs.
        inputs: by name; floats in the dtype of the `Numbers` and nothing else that depends on it. A nest of tuples and
            lists is fine. What is float32 by contract does not belong here: inputs are cast to every dtype.
        call: (inputs, backend) -> a tensor or a tuple of tensors.
        gradients: names of the inputs that get gradients.
        plain: the same by eager torch in the dtype of the inputs, which sets the tolerance; None: the reference does
            (it computes in float32, so it is the stricter measure).
        cost: of the forward and of the backward.
        graph: the op promises that a CUDA graph can capture it.
        peers: the same by others' kernels, or a part of the work that is worth a comparison.
    """

    op: str
    name: str
    inputs: Callable[[Numbers], Inputs]
    call: Callable[[Inputs, str], Any]
    gradients: tuple[str, ...] = ()
    plain: Callable[[Inputs], Any] | None = None
    cost: Callable[[Inputs], tuple[Cost, Cost]] | None = None
    graph: bool = False
    peers: dict[str, Callable[[Inputs], Any]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.op}: {self.name}"

    def leaves(self, inputs: Inputs) -> list[torch.Tensor]:
        """The tensors that get gradients."""
        return [leaf for name in self.gradients for leaf in tree_leaves(inputs[name])]


@dataclass(frozen=True)
class Timed:
    """A row of the benchmark: a case in one dtype, ours against eager, torch.compile and the case's peers.

    Attributes:
        op, name: of the row; the name is unique within the op.
        params: what was varied, for the JSON.
        training: forward and backward; else forward without gradients.
        compile: time torch.compile of the eager form too.
        mutates: names of inputs that the call changes; restored, untimed, before every call.
        unchecked: variants that compute something else, such as the products alone.
        exact: the bits of the eager form are asked for; else the accuracy rule, with the reference in float64.
        seconds: measuring time, all variants together.
    """

    op: str
    name: str
    case: Case
    dtype: torch.dtype
    params: dict[str, Any]
    training: bool = False
    compile: bool = True
    mutates: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    exact: bool = False
    seconds: float = 6.0


@dataclass(frozen=True)
class Shape:
    """Widths of a model and how much goes through it.

    Attributes:
        name: of the row.
        tiles, side: image tiles, and patches a side of one.
        real: the catalogue's own sizes, at which nothing runs.
    """

    name: str
    model: ModelShape
    tokens: int = 3392
    tiles: int = 13
    side: int = 32
    batch: int = 1
    real: bool = False


def scaled(model: str, tokens: int = 48, widths: dict[str, int] | None = None, **more: Any) -> Shape:
    """A few tokens through the model; `widths` replaces sizes of the model."""
    changes: dict[str, Any] = dict(widths or {})
    name = ", ".join([model, *(f"{k} {v}" for k, v in ({"tokens": tokens} | more | changes).items())])
    return Shape(name, replace(MODELS[model], **changes), tokens, **more)


@dataclass(frozen=True)
class Subject:
    """An op, or a way to call it, whose GPU kernels `bench.inspect` counts and compiles.

    Attributes:
        at: the case at a shape.
        backends: whose kernels; "ours" is the best of each op.
        small: the simulated shapes.
        varies: what of a model its machine code depends on; models that agree share a row, and those where one of them
            is 0 are left out.
        tokens, batch: at the real shapes.
        memory_bound: the limits on traffic apply.
        dtypes: of "bf16" and "fp32"; an op of integers has none and is counted once, as bf16.
    """

    at: Callable[[Shape], Case]
    backends: tuple[str, ...]
    small: tuple[Shape, ...]
    varies: tuple[str, ...]
    tokens: tuple[int, ...] = (3392,)
    batch: int = 1
    memory_bound: bool = True
    dtypes: tuple[str, ...] = ("bf16", "fp32")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
