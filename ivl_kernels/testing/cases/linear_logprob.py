"""Log-probabilities, cross-entropy and divergence from a language model's head, whose logits are never all kept."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as functional

from ... import ops
from . import Case, Cost, Numbers
from ._case import Inputs

GRADIENTS = ("hidden", "weight", "bias")


def inputs(n: Numbers, tokens: int, width: int, vocabulary: int) -> Inputs:
    """2 of 3 rows count."""
    rows = torch.randperm(tokens, generator=n.generator, device=n.device)[: tokens * 2 // 3].sort().values
    return {
        "hidden": n.normal(tokens, width),
        "weight": n.normal(vocabulary, width, scale=3 * width**-0.5),
        "bias": n.normal(vocabulary, scale=0.1),
        "targets": torch.randint(vocabulary, (len(rows),), generator=n.generator, device=n.device),
        "rows": rows,
    }


def teacher(n: Numbers, tokens: int, width: int, vocabulary: int) -> Inputs:
    v = inputs(n, tokens, width, vocabulary)
    del v["bias"], v["targets"]
    v["teacher_hidden"] = v["hidden"] + n.normal(tokens, width, scale=0.1)
    return v | {"teacher_weight": v["weight"] + 0.01, "teacher_rows": v["rows"]}


def plain(v: Inputs) -> torch.Tensor:
    logits = functional.linear(v["hidden"][v["rows"]], v["weight"], v["bias"])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits, -1).gather(1, v["targets"][:, None])[:, 0]


def cost(v: Inputs) -> tuple[Cost, Cost]:
    rows, (vocabulary, width), size = v["rows"].numel(), v["weight"].shape, v["hidden"].itemsize
    heads = 2 if "teacher_weight" in v else 1
    products, weights = 2 * rows * width * vocabulary, size * vocabulary * (width + ("bias" in v))
    least = heads * (size * rows * width + weights) + rows * (8 + 8 + 4)  # rows and targets in, a float32 out
    return (
        Cost(least, heads * products, rows * vocabulary),
        # Again, with the gradients of the rows and of the student's weights out; the student's products twice more.
        Cost(least + size * rows * width + weights, (heads + 2) * products, rows * vocabulary),
    )


def cases(large: bool) -> Iterator[Case]:
    sizes = (3072, 1024, 151936) if large else (48, 40, 173)

    def logp(v: Inputs, backend: str, save: str) -> torch.Tensor:
        return ops.linear_logprob(**v, save=save, backend=backend).logp

    def divergence(v: Inputs, backend: str, weighted: bool) -> torch.Tensor:
        weight = None
        if weighted:
            weight = torch.linspace(0, 1, len(v["rows"]), dtype=torch.float32, device=v["rows"].device)
        return ops.linear_kl(**v, row_weight=weight, temperature=0.9, backend=backend)

    yield Case(
        "linear_logprob",
        "all four results",
        lambda n: inputs(n, *sizes),
        lambda v, backend: tuple(ops.linear_logprob(**v, temperature=0.8, softcap=20.0, backend=backend)),
        GRADIENTS,
        cost=cost,
    )
    for save, title in (("nothing", "computed again"), ("logits", "kept")):
        yield Case(
            "linear_logprob",
            f"log-probabilities, logits {title}",
            lambda n: inputs(n, *sizes),
            functools.partial(logp, save=save),
            GRADIENTS,
            plain,
            cost,
        )
    yield Case(
        "linear_ce",
        "a sum",
        lambda n: inputs(n, *sizes),
        lambda v, backend: ops.linear_ce(**v, backend=backend),
        GRADIENTS,
        cost=cost,
    )
    for weighted in (False, True):
        yield Case(
            "linear_kl",
            "a weighted sum" if weighted else "rows",
            lambda n: teacher(n, *sizes),
            functools.partial(divergence, weighted=weighted),
            GRADIENTS[:2],
            cost=cost,
        )
