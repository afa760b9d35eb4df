"""ViCO: the two-stage training of Flash models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .inputs import Decisions, FlashInputs, flash_inputs, route
from .parts import parts_of
from .tiles import image_of_tile, row_of_tile


@dataclass(frozen=True)
class ViCOOutput:
    """One forward pass of ViCO training.

    Attributes:
        outputs: of the language model, over the packed sequence (`logits` [B, N', V], `loss` when labels were given).
        inputs: what went into it; `inputs.packed.labels` and `.loss_weights` fit the logits.
        router_logits: [T, 2] (column 0: compressing is harmless), differentiable in stage 2; None in stage 1.
    """

    outputs: Any
    inputs: FlashInputs
    router_logits: torch.Tensor | None


class ViCO:
    """The forward passes of ViCO, the two-stage training of Flash models; the losses are the caller's.

    Stage 1 (consistency): every image gets one ratio, 1/4 or 1/16 with equal odds, for all its tiles; gradients reach
    both projectors and whatever else requires them. Stage 2 (router): everything but the router is frozen, its logits
    come with gradients, and the language model runs without them, at the decisions given as `compress`.

    Args:
        model: a Flash model of either family; see `parts_of`.
        stage: 1 or 2.
        generator: of the sampled ratios, on the CPU; None: torch's default.
        backend: force a backend of the ops.

    Source: InternVL3.5 report, section 2.3. No training code was released; this is our reading of it.
    """

    def __init__(
        self, model: nn.Module, stage: int, *, generator: torch.Generator | None = None, backend: str = ""
    ) -> None:
        if stage not in (1, 2):
            raise ValueError(f"stage: got {stage}, expected 1 or 2")
        self.model, self.stage, self.generator, self.backend = model, stage, generator, backend
        self._required: dict[str, bool] = {}
        if stage == 2:
            parts = parts_of(model, backend)
            self._required = {name: p.requires_grad for name, p in model.named_parameters()}
            model.requires_grad_(False)
            parts.vision.router.requires_grad_(True)

    def restore(self) -> None:
        """Make the parameters that stage 2 froze require gradients as before."""
        for name, parameter in self.model.named_parameters():
            if name in self._required:
                parameter.requires_grad_(self._required[name])

    def sample(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[T] bool: a ratio for each image of the batch, the same for all its tiles."""
        language = parts_of(self.model, self.backend).language
        owner = image_of_tile(input_ids, attention_mask, language.token_id, language.tokens)
        images = int(owner[-1]) + 1 if len(owner) else 0
        return (torch.rand(images, generator=self.generator) < 0.5).to(owner.device)[owner]

    def __call__(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        compress: torch.Tensor | None = None,
        **options: Any,
    ) -> ViCOOutput:
        """One pass; `compress` [T] bool overrides the sampled (stage 1) or the routed (stage 2) decisions."""
        parts = parts_of(self.model, self.backend)
        vision, language = parts
        trained = torch.is_grad_enabled() and self.stage == 1
        with torch.set_grad_enabled(trained):
            vit = vision.tokens_of(pixel_values)
        if self.stage == 1:
            decisions = Decisions(self.sample(input_ids, attention_mask) if compress is None else compress)
        else:
            groups = row_of_tile(input_ids, attention_mask, language.token_id, language.tokens, len(vit))
            decisions = route(vit, vision, groups=groups.to(vit.device))
            decisions = decisions if compress is None else replace(decisions, compress=compress)
        with torch.set_grad_enabled(trained):
            inputs = flash_inputs(
                parts,
                input_ids,
                vit,
                attention_mask=attention_mask,
                labels=labels,
                loss_weights=loss_weights,
                decisions=decisions,
                padding="right",
            )
            packed = inputs.packed
            outputs = language.causal(
                inputs_embeds=inputs.embeds,
                attention_mask=packed.attention_mask,
                position_ids=packed.position_ids,
                labels=packed.labels,
                **options,
            )
        return ViCOOutput(outputs, inputs, decisions.router_logits)
