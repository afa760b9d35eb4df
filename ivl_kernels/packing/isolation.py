"""Does a model keep the samples of a row apart? Asked of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def isolation_problem(model: nn.Module, row: Mapping[str, Any], *, sample: int = 0, token: int | None = None) -> str:
    """What a sample of a packed row does to the others, or "" when nothing at all.

    Runs the model twice, with and without one token of the sample changed, and compares the logits of every other
    sample, and the gradients of its embeddings for a loss over them, bit by bit.

    Args:
        model: takes the row as keyword arguments; in eval mode (dropout would differ between the two runs).
        row: from `collate`.
        sample: which one is changed.
        token: what its first token that is not a placeholder becomes; None: the next id.

    Raises:
        ValueError: the row has no such sample, or no other one.
    """
    starts = row["cu_seq_lens_q"].tolist()
    if not 0 <= sample < len(starts) - 1 or len(starts) < 3:
        raise ValueError(f"sample: got {sample}, expected one of {len(starts) - 1}, two at least")
    given = {name: value for name, value in row.items() if name not in ("labels", "row_plan")}
    begin, end = starts[sample : sample + 2]
    other = torch.ones(starts[-1], dtype=torch.bool, device="cpu")
    other[begin:end] = False
    ids = row["input_ids"].clone()
    ids[0, begin] = (int(ids[0, begin]) + 1) % 100 if token is None else token
    if int(ids[0, begin]) == int(row["input_ids"][0, begin]):
        raise ValueError(f"token: got {token}, which the sample begins with, expected another one")
    (logits, grads), (changed, changed_grads) = (
        _run(model, {**given, "input_ids": x}, other) for x in (row["input_ids"], ids)
    )
    for what, a, b in (("logits", logits, changed), ("gradients", grads, changed_grads)):
        wrong = (a != b).flatten(1).any(1)
        if bool(wrong.any()):
            first = int(other.nonzero()[int(wrong.nonzero()[0])])
            which = next(i for i in range(len(starts) - 1) if starts[i + 1] > first)
            difference = float((a.double() - b.double()).abs().max())
            return f"sample {sample} changes {what} of sample {which} at position {first}, by up to {difference:.1e}"
    return ""


def _run(model: Any, given: dict[str, Any], other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the other samples, and the gradients of their embeddings."""
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.detach().requires_grad_()
        kept.append(out)
        return out * 1

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(**given).logits[0][other.to(given["input_ids"].device)]
            (grads,) = torch.autograd.grad(logits.float().square().mean(), kept[0])
    finally:
        hook.remove()
    return logits.detach(), grads[0][other.to(grads.device)]
