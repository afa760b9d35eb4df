"""What is looked at: the subjects of all cases, at scaled-down and at the catalogue's shapes, and how one is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from ivl_kernels.testing.cases import Case, Cost, Numbers, Shape, Subject, module, names, scaled
from ivl_kernels.testing.catalogue import MODELS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# The name's first word is the op.
SUBJECTS: dict[str, Subject] = {
    name: subject for op in names() for name, subject in getattr(module(op), "SUBJECTS", {}).items()
}


class Job:
    """One case at one shape, its inputs made; `leaves`: those with gradients. Without any there is no backward of ours.

    At the catalogue's own sizes memory is only reserved.
    """

    def __init__(self, name: str, shape: Shape, dtype: str) -> None:
        self.case: Case = SUBJECTS[name].at(shape)
        self.inputs = self.case.inputs(Numbers(DTYPES[dtype], reserve=shape.real))
        self.leaves = self.case.leaves(self.inputs)
        self._costs = self.case.cost(self.inputs) if self.case.cost else (Cost(0), Cost(0))

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.leaves else ("forward",)

    def cost(self, direction: str) -> Cost:
        return self._costs[direction == "backward"]

    def call(self) -> Any:
        return self.case.call(self.inputs, "")


def run(job: Job, call: Callable[[], Any], direction: str, log: list[Any]) -> list[Any]:
    """Calls forward, and backward when asked; the entries of `log` that the direction made."""
    from bench.measure import tensors

    if direction == "forward":
        with torch.no_grad():
            call()
        return log
    for leaf in job.leaves:
        leaf.requires_grad_()
    outs = [t for t in tensors([call()]) if t.requires_grad]
    begin = len(log)
    torch.autograd.grad(outs, job.leaves, [torch.ones_like(t) for t in outs], allow_unused=True)
    for leaf in job.leaves:
        leaf.requires_grad_(False)
    return log[begin:]


def real_shapes(name: str, asked: Sequence[str]) -> Iterator[tuple[Shape, list[str]]]:
    """Shapes at which the machine code can differ, each with the models that share it; sizes asked for as they are."""
    subject = SUBJECTS[name]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for text in asked or MODELS:
        shape = asked_shape(text)
        sizes = tuple(getattr(shape.model, field) for field in subject.varies)
        if not all(sizes):
            continue
        if "=" in text:
            yield replace(shape, real=True), [shape.name]
        else:
            groups.setdefault(sizes, []).append(text)
    for sharing in groups.values():
        for tokens in subject.tokens:
            yield Shape(sharing[0], MODELS[sharing[0]], tokens, batch=subject.batch, real=True), sharing


def asked_shape(text: str) -> Shape:
    """A model's name, or `model,tokens=64,tiles=2,hidden=256,...`: sizes of `Shape` and `ModelShape` replaced."""
    model, *pairs = text.split(",")
    if model not in MODELS:
        raise SystemExit(f"--shape: got '{model}', expected one of {', '.join(MODELS)}")
    sizes = {key.strip(): int(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    own = {field.name for field in fields(Shape)}
    more = {key: value for key, value in sizes.items() if key in own and key != "tokens"}
    widths = {key: value for key, value in sizes.items() if key not in own}
    return scaled(model, sizes.get("tokens", 48), widths, **more)
