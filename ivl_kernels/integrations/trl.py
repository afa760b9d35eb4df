"""TRL's trainers on this package's ops: subclasses of its DPO and GRPO trainers. Needs trl 1.16.

TRL asks its models for single tokens' log-probabilities with `fused_lm_head=True`. The models of these trainers answer
that from `ops.linear_logprob`: only the rows with labels reach the head, whose weight is read inside its own forward,
and nothing is rounded to 16 bits on the way. Everything else, the metrics too, is TRL's.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ..models.upstream import forward_name
from ..nn.losses import MPOLoss
from ..ops import linear_logprob
from ._edit import Editor
from .loss import answered_by_head, head_problem, let_head_answer

_KEY = ("trl", __name__)
_PARTS = {"sigmoid": 0, "bco_pair": 1, "sft": 2}
_SHIFT = "reward_shift.pt"


@torch.no_grad()
def _is_best(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, tile: int = 8192) -> Tensor:
    """[N] bool: the target has the largest logit; a tile of the vocabulary at a time."""
    best = torch.full(targets.shape, -torch.inf, device=hidden.device)
    word = torch.zeros_like(targets)
    for begin in range(0, len(weight), tile):
        z = (hidden @ weight[begin : begin + tile].T.to(hidden.dtype)).float()
        z = z if bias is None else z + bias[begin : begin + tile]
        top, where = z.max(-1)
        word = torch.where(top > best, where + begin, word)
        best = torch.maximum(best, top)
    return word == targets


def _answer(targets: Tensor, rows: Tensor, temperature: float, top: bool, backend: str) -> Any:
    def answer(hidden: Tensor, head: Any) -> tuple[Tensor, ...]:
        given: dict[str, Any] = {"bias": head.bias, "temperature": temperature, "backend": backend}
        found = linear_logprob(hidden, head.weight, targets, rows, **given)
        best = found.logp.new_zeros(len(rows), dtype=torch.bool)
        if top:
            best = _is_best(hidden.flatten(0, -2)[rows], head.weight, head.bias, targets)
        return (*found, best)

    return answer


def _forward(temperature: float, top: bool, backend: str) -> Any:
    def forward(
        inner: Any,
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            if labels is not None:
                kwargs["labels"] = labels
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels
            return inner(self, *args, **kwargs)
        if shift_labels is None and labels is None:
            raise ValueError("labels: got None, expected labels with fused_lm_head=True")
        given: Any = labels if shift_labels is None else shift_labels
        wanted = given[:, 1:] if shift_labels is None else given
        mask = wanted != -100
        rows = (torch.arange(given.numel(), device=given.device).view_as(given)[:, : wanted.shape[1]])[mask]
        count = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        answer = _answer(wanted[mask], rows, temperature, top, backend)
        output = answered_by_head(given.numel(), answer, lambda: inner(self, *args, **kwargs))
        logp, lse, entropy, mean, best = output.logits
        loss = -logp.sum() / (max(len(rows), 1) if count is None else count)
        aux = output.get("aux_loss")
        if aux is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return FusedCausalLMOutput(
            loss=loss,
            log_probs=placed(logp),
            entropy=placed(entropy),
            mean_logits=placed(mean.detach()),
            is_top1=placed(best),
            label_mask=mask,
            aux_loss=aux,
        )

    return forward


def serve_fused_head(model: nn.Module, *, temperature: float = 1.0, top: bool = False, backend: str = "") -> Editor:
    """Let `model(labels=..., fused_lm_head=True)` of one model answer as TRL's `FusedCausalLMOutput`, from our op.

    Args:
        model: a causal language model of transformers, or an InternVL.
        temperature: the logits are divided by it.
        top: fill `is_top1`, at the price of one more product with the head, without gradients.

    Returns:
        What takes it back: `.roll_back()`.

    Raises:
        ValueError: a head that is not plain, or whose logits the model scales or caps.
    """
    any_model: Any = model
    head, config = any_model.get_output_embeddings(), any_model.config.get_text_config()
    scaled = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    names = [name for name in scaled if getattr(config, name, None) not in (None, 1, 1.0)]
    problem = head_problem(head) or (f"the model changes its logits by {names[0]}" if names else "")
    if problem:
        raise ValueError(f"model: {problem}, expected a plain head")
    edit = Editor(_KEY)
    try:
        let_head_answer(head, edit)
        edit.method(model, forward_name(model), _forward(temperature, top, backend))
    except BaseException:
        edit.roll_back()
        raise
    return edit


class _OnOurHead:
    """Puts our head under the models of a TRL trainer once it has put its own there."""

    def _serve(self, *, temperature: float, top: bool) -> None:
        me: Any = self
        for model, metrics in ((me.model, top), (getattr(me, "ref_model", None), False)):
            if model is not None:
                model = me.accelerator.unwrap_model(model)
                base = model.get_base_model() if hasattr(model, "get_base_model") else model
                serve_fused_head(base, temperature=temperature, top=metrics)


class MPOTrainer(_OnOurHead, DPOTrainer):
    """`trl.DPOTrainer` for mixed preference optimization with the reward shift that TRL's `bco_pair` lacks.

    The weights are those of the config's loss types, any of "sigmoid", "bco_pair" and "sft": for InternVL
    `DPOConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.1)`. `mpo` is the
    `nn.MPOLoss`; its shift is saved in every checkpoint and taken up by `resume_from_checkpoint`.

    Raises:
        ValueError: other loss types, a divergence other than "reverse_kl", WPO weights or `ld_alpha`.
    """

    def __init__(self, *args: Any, mpo: MPOLoss | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        other = [name for name in self.loss_types if name not in _PARTS]
        if other:
            raise ValueError(f"loss_type: got {other[0]!r}, expected {', '.join(map(repr, _PARTS))}")
        if self.f_divergence_type != "reverse_kl" or self.use_weighting or self.ld_alpha is not None:
            raise ValueError("args: got a divergence, use_weighting or ld_alpha, expected none of them with MPO")
        weights = [0.0, 0.0, 0.0]
        for name, weight in zip(self.loss_types, self.loss_weights):
            weights[_PARTS[name]] += weight
        self.mpo = MPOLoss(self.beta, tuple(weights)) if mpo is None else mpo  # type: ignore[arg-type]
        self._serve(temperature=1.0, top=True)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: Any) -> Any:
        if "ref_chosen_logps" not in inputs:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        seen: list[Any] = []

        def recorded(**kwargs: Any) -> Any:
            seen.append(model(**kwargs))
            return seen[-1]

        before = getattr(self, "precompute_ref_logps")  # noqa: B009 (mypy without trl)
        self.precompute_ref_logps = True
        try:  # TRL's own metrics, and its loss, which has no shift
            result = super()._compute_loss(recorded, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = before
        mask = seen[0].label_mask
        offsets = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        self.mpo.train(self.model.training)
        out = self.mpo(seen[0].log_probs[:, -mask.shape[1] :][mask], offsets, reference.to(seen[0].log_probs))
        loss = out.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * seen[0].aux_loss
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["rewards/shift"].append(float(out.shift))
        return (loss, result[1]) if return_outputs else loss

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        from transformers.trainer_utils import get_last_checkpoint

        path = resume_from_checkpoint
        path = get_last_checkpoint(self.args.output_dir) if path is True else path
        if path and os.path.isfile(os.path.join(path, _SHIFT)):
            self.mpo.load_state_dict(torch.load(os.path.join(path, _SHIFT), weights_only=True))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            torch.save(self.mpo.state_dict(), os.path.join(folder, _SHIFT))


class GSPOTrainer(_OnOurHead, GRPOTrainer):
    """`trl.GRPOTrainer` at sequence level: `GRPOConfig(importance_sampling_level="sequence", loss_type="grpo")`.

    The loss is TRL's, on our log-probabilities; it equals `nn.GSPOLoss(empty="zero")` of them.

    Raises:
        ValueError: another level or loss type.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (self.importance_sampling_level, self.loss_type) != ("sequence", "grpo"):
            raise ValueError(
                f"args: got importance_sampling_level={self.importance_sampling_level!r} and loss_type="
                f"{self.loss_type!r}, expected 'sequence' and 'grpo', which are GSPO"
            )
        self._serve(temperature=self.temperature, top=False)
