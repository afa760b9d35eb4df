"""The loss of a forward with labels, without logits: upstream's body runs without labels, and its head gives the loss.

What the head is asked for goes down beside the call, for its thread and its time; the loss comes back in the place of
the logits, as the output of the head's own module, so that whatever gathers its weight for a call (FSDP, ZeRO,
offloading) does so for this one and for its backward.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.families import families_in, family_of
from ..models.upstream import arguments, class_of, forward_name, replaced_before, signature
from ..nn.losses import NextTokenLoss
from ..ops import LogProb, RowPlan, linear_logprob, row_plan
from ._edit import Editor
from ._patch import Adapter, Feature, Site
from ._report import serving
from .packed import starts_of

REDUCTIONS = ("token", "sample", "square")
_REDUCTION = "_ivl_loss"  # attribute of a patched model
# Keywords of a patched forward that no upstream knows, and those that remote code does not.
OWN = ("row_plan", "loss_denominator", "return_logits", "return_logprobs", "temperature")
LOOSE = ("num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


# (hidden states, head) -> what the head gives in the place of logits
Answer = Callable[[torch.Tensor, Any], Any]


@dataclass
class _Request:
    """What the next head in this thread is asked for."""

    total: int  # hidden states that the answer counts on
    answer: Answer
    logits: bool
    answered: bool = False


class _Asked(threading.local):
    request: _Request | None = None


_ASKED = _Asked()


def _parse(value: Any) -> Any:
    if value is True:
        return "token"
    if value not in REDUCTIONS:
        raise TypeError(f"patch: loss={value!r}, expected True, False, {', '.join(map(repr, REDUCTIONS))}")
    return value


@torch.compiler.disable  # on the host
def plan_of(given: Mapping[str, Any], labels: torch.Tensor, reduction: str) -> RowPlan:
    """The plan of a call: its own, or one made from its labels.

    What is packed is told by `cu_seq_lens_q`, or in a batch of one row by positions that restart.

    Raises:
        TypeError: `row_plan` is neither a `RowPlan` nor a dictionary of its fields.
    """
    made = given.get("row_plan")
    if made is None:
        starts, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
        if starts is None and positions is not None and positions.shape == labels.shape and len(labels) == 1:
            starts = starts_of(positions)
        return row_plan(labels.cpu(), None if starts is None else starts.cpu(), reduction=reduction)
    if isinstance(made, Mapping) and set(made) == set(RowPlan._fields):
        return RowPlan(**made)
    if not isinstance(made, RowPlan):
        raise TypeError(f"row_plan: got {type(made).__name__}, expected an ops.RowPlan or a dictionary of its fields")
    return made


def _denominator(given: Mapping[str, Any], plan: RowPlan) -> Any:
    if given.get("loss_denominator") is not None:
        return given["loss_denominator"]
    count = given.get("num_items_in_batch")
    if count is not None and len(plan.rows) and float(plan.denominator) != len(plan.rows):
        raise ValueError(
            "num_items_in_batch: got a number of tokens, expected a sum of weights, as loss_denominator, for rows "
            "weighted by sample (ivl_kernels.integrations.WeightedLoss gives it to a Trainer)"
        )
    return count


def answered_by_head(total: int, answer: Answer, run: Callable[[], Any], *, logits: bool = False) -> Any:
    """The output of `run()`, a forward whose head (`let_head_answer`) gives `answer` in the place of its logits.

    Args:
        total: hidden states that the answer counts on.
        logits: the head gives the answer and its logits.
    """
    request = _Request(total, answer, logits)
    before, _ASKED.request = _ASKED.request, request
    try:
        output = run()
    finally:
        _ASKED.request = before
    if not request.answered:
        raise RuntimeError("loss: upstream's forward did not call the language model's head; undo this patch")
    return output


def asked(
    reduction: str, given: Mapping[str, Any], labels: torch.Tensor, run: Callable[[], Any], backend: str = ""
) -> Any:
    """The output of `run()`, a forward without labels through a patched head, with the loss of these labels in it."""
    plan, loss_of = plan_of(given, labels, reduction), NextTokenLoss(backend=backend)
    if given.get("return_logprobs"):
        return _with_logprobs(plan, labels.numel(), given.get("temperature") or 1.0, run, backend)
    denominator, with_logits = _denominator(given, plan), bool(given.get("return_logits"))

    def answer(hidden: torch.Tensor, head: Any) -> torch.Tensor:
        over = denominator.to(hidden.device) if isinstance(denominator, torch.Tensor) else denominator
        return loss_of(hidden, head.weight, plan.to(hidden.device), over, head.bias)

    output = answered_by_head(labels.numel(), answer, run, logits=with_logits)
    if isinstance(output, tuple):
        value, *rest = output
        loss, logits = value if with_logits else (value, None)
        return (loss, *(() if logits is None else (logits,)), *rest)
    loss, logits = output.logits if with_logits else (output.logits, None)
    return _changed(output, loss=loss, logits=logits)


def _changed(output: Any, **values: Any) -> Any:
    """An output with other fields. Made anew: one of transformers' keeps in its items what an attribute had before."""
    kept = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return type(output)(**{**kept, **values})


def _with_logprobs(plan: RowPlan, total: int, temperature: float, run: Callable[[], Any], backend: str) -> Any:
    """The output of `run()` with `log_probs`, an `ops.LogProb` of the plan's rows, and neither loss nor logits."""

    def answer(hidden: torch.Tensor, head: Any) -> LogProb:
        rows = plan.to(hidden.device)
        given: dict[str, Any] = {"bias": head.bias, "temperature": temperature, "backend": backend}
        return linear_logprob(hidden, head.weight, rows.targets, rows.rows, **given)

    output = answered_by_head(total, answer, run)
    if isinstance(output, tuple):
        raise ValueError("return_dict: got False, expected True with return_logprobs")
    found, output = LogProb(*output.logits), _changed(output, logits=None)  # backward hooks make it a plain tuple
    output["log_probs"] = found
    return output


def take_own(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes out of a forward's keywords those that are ours and upstream would not know."""
    parameters = signature(class_of(model).forward).parameters.values()
    unknown = OWN if any(p.kind is p.VAR_KEYWORD for p in parameters) else (*OWN, *LOOSE)
    return {name: kwargs.pop(name) for name in unknown if name in kwargs}


def reduction_of(model: nn.Module) -> str:
    """By what the loss of this patched model is weighted, or ""."""
    return vars(model).get(_REDUCTION, "")


def _model_forward(backend: str) -> Any:
    def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        own = take_own(self, kwargs)
        given = arguments(class_of(self).forward, self, *args, **kwargs)
        labels, family = given.get("labels"), family_of(self)
        if labels is None or family is None:
            return inner(self, *args, **kwargs)
        problem = head_problem(family.head)
        if problem:
            raise RuntimeError(f"loss: {problem}; undo this patch")
        taken = ("self", "labels", "num_items_in_batch", "loss_denominator")
        rest = {name: value for name, value in given.items() if name not in taken}
        return asked(reduction_of(self), {**given, **own}, labels, lambda: inner(self, **rest), backend)

    return forward


def _head_forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    request = _ASKED.request
    if request is None or request.answered:
        return inner(self, *args, **kwargs)
    hidden = args[0] if args else kwargs["input"]
    if hidden[..., 0].numel() != request.total:
        raise ValueError(
            f"labels: got {request.total} for {hidden[..., 0].numel()} hidden states at the head, expected as many "
            "(logits_to_keep cannot be combined with labels)"
        )
    request.answered = True
    value = request.answer(hidden, self)
    return (value, inner(self, hidden)) if request.logits else value


def let_head_answer(head: Any, edit: Editor) -> None:
    """Let this head answer `answered_by_head`."""
    head = _unit(head)
    edit.method(head, forward_name(head), _head_forward, answers=True)


def _unit(head: Any) -> Any:
    """What a unit of FSDP1 holds: called through the unit, it finds its weight gathered."""
    return getattr(head, "_fsdp_wrapped_module", head)


def head_problem(head: Any) -> str:
    """Why this head's logits are not weight times hidden state (plus bias), or ""."""
    if head is None:
        return "there is no head"
    head = _unit(head)
    kind = class_of(head)
    if kind is not nn.Linear:
        return f"the head is a {kind.__module__}.{kind.__name__}, not a plain Linear"
    if type(head) is not kind and hasattr(head, "parametrizations"):
        return "the head is parametrized"
    return replaced_before(head, forward_name(head))


class Loss(Adapter):
    features = {
        "loss": Feature(
            False,
            "forward with labels gives the loss without logits (None unless return_logits=True), or with "
            "return_logprobs=True log_probs; True is 'token', and 'sample' and 'square' weight by sample",
            _parse,
        ),
    }

    def find(self, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Site]:
        for path, family in families_in(model):
            problem = head_problem(family.head)
            yield Site("loss", path, family.model, f"next-token loss, by {options['loss']}", problem)

    def apply(self, site: Site, edit: Editor, options: Mapping[str, Any]) -> None:
        family: Any = family_of(site.module)
        edit.method(site.module, forward_name(site.module), _model_forward(options["backend"]))
        edit.attribute(site.module, _REDUCTION, options["loss"])
        let_head_answer(family.head, edit)
        # Remote code does not say so, and a Trainer then keeps the number of items to itself.
        edit.attribute(site.module, "accepts_loss_kwargs", True)

    def serving(self, site: Site) -> str:
        family: Any = family_of(site.module)
        problem = head_problem(family.head)
        return f"cannot run: {problem}" if problem else serving("linear_ce", _unit(family.head))


ADAPTER = Loss()
