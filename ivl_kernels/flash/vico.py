"""ViCO: the two-stage training of Flash models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models.plain import gathered_in_call, not_plain
from ..models.upstream import StandIn, class_of
from ..nn.losses import ConsistencyLoss, RatioWindow, RouterLoss, loss_ratio
from ..ops import RowPlan, row_plan
from .inputs import Decisions, FlashInputs, flash_inputs, route
from .parts import flash_family, parts_of
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


@dataclass(frozen=True)
class ViCOLoss:
    """The loss of one batch.

    Attributes:
        loss: scalar with gradients: to the model in stage 1, to the router in stage 2.
        compress: [T] bool: the tiles that were compressed; in stage 2 as the router decides now.
        ratios: [T] of stage 2: what compressing a tile does to the consistency loss.
        labels: [T] of stage 2: 0 compress, 1 keep, -100 none.
    """

    loss: torch.Tensor
    compress: torch.Tensor
    ratios: torch.Tensor | None = None
    labels: torch.Tensor | None = None


@dataclass(frozen=True)
class _Batch:
    ids: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor


# (vico, losses of the samples with some tiles compressed, image of each tile, row of each tile) -> ratios [T]
Scorer = Callable[["ViCO", Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor]


def score_images(
    vico: ViCO, losses: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """Each image compressed as a whole, one label for all its tiles: as many forwards as images a row, and one."""
    return _score(losses, image, row)


def score_tiles(
    vico: ViCO, losses: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """Each tile compressed by itself, the others not: as many forwards as tiles a row, and one."""
    return _score(losses, torch.arange(len(row), device=row.device), row)


def _score(losses: Callable[[torch.Tensor], torch.Tensor], group: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """[T] ratios when one group of each row is compressed at a time; groups are numbered over the batch."""
    ratios = torch.full(row.shape, torch.nan, dtype=torch.float64, device=row.device)
    if not len(row):
        return ratios
    full = losses(torch.zeros_like(row, dtype=torch.bool))
    # The number of a group within its row: rows do not see each other, so they take turns at the same time.
    first = torch.full((int(row.max()) + 1,), int(group.max()) + 1, device=row.device).scatter_reduce(
        0, row, group, "amin"
    )
    turn = group - first[row]
    for number in range(int(turn.max()) + 1):
        mine = turn == number
        ratios[mine] = loss_ratio(losses(mine), full)[row[mine]].to(ratios)
    return ratios


class ViCO:
    """ViCO, the two-stage training of Flash models: its forward passes (a call), and its losses (`loss`).

    Stage 1 (consistency): every image gets one ratio, 1/4 or 1/16 with equal odds, for all its tiles; gradients reach
    both projectors and whatever else requires them. The loss is the divergence from a frozen reference at 1/4.
    Stage 2 (router): everything but the router is frozen. A tile is to be compressed where that raises the consistency
    loss by less than the window's threshold; the loss is the router's cross-entropy.

    Args:
        model: a Flash model of either family; see `parts_of`.
        stage: 1 or 2.
        reference: the frozen model that stage 1 began with, of the same vocabulary; only `loss` needs it. It is always
            run in eval mode, without gradients, at 1/4.
        window: of stage 2; None: a `RatioWindow`.
        scorer: of stage 2: makes a ratio for every tile. It is given this object, a function from tiles to compress
            [T] to the consistency loss of each row [B], and the image and the row of each tile: `score_images`
            (default), `score_tiles`, or the caller's.
        generator: of the sampled ratios, on the CPU; None: torch's default.
        backend: force a backend of the ops.

    Source: InternVL3.5 report, section 2.3. No training code was released; this is our reading of it.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: int,
        *,
        reference: nn.Module | None = None,
        window: RatioWindow | None = None,
        scorer: Scorer = score_images,
        generator: torch.Generator | None = None,
        backend: str = "",
    ) -> None:
        if stage not in (1, 2):
            raise ValueError(f"stage: got {stage}, expected 1 or 2")
        if reference is model:
            raise ValueError("reference: got the model itself, expected a frozen copy of it")
        self.model, self.stage, self.generator, self.backend = model, stage, generator, backend
        self.reference, self.scorer = reference, scorer
        self.window = RatioWindow() if window is None else window
        self.consistency, self.routing = ConsistencyLoss(backend=backend), RouterLoss()
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

    def loss(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        compress: torch.Tensor | None = None,
        denominator: Any = None,
    ) -> ViCOLoss:
        """The loss of this stage for a batch, each row of which is a sample.

        Args:
            input_ids, attention_mask: [B, N].
            pixel_values: [T, 3, h, w].
            labels: [B, N], -100 where nothing is supervised: the answers whose distributions are compared.
            compress: [T] bool of stage 1, instead of sampled ratios.
            denominator: of samples in stage 1, of labelled tiles in stage 2; None: of this batch.

        Raises:
            ValueError: no reference, or a head that is not plain.

        No logits are made: both heads go through `ops.linear_kl`. Under `fully_shard` it is refused, because hidden
        states are taken before the head.
        """
        if self.reference is None:
            raise ValueError("reference: got None, expected the frozen model that stage 1 began with")
        batch = _Batch(input_ids, attention_mask, labels)
        training = self.reference.training
        self.reference.eval()
        try:
            with torch.no_grad():
                teacher_parts = parts_of(self.reference, self.backend)
                vit = teacher_parts.vision.tokens_of(pixel_values)
                full = torch.zeros(len(vit), dtype=torch.bool, device=vit.device)
                teacher = self._hidden(self.reference, vit, batch, full)
        finally:
            self.reference.train(training)
        trained = torch.is_grad_enabled() and self.stage == 1
        with torch.set_grad_enabled(trained):
            vit = parts_of(self.model, self.backend).vision.tokens_of(pixel_values)
        if self.stage == 1:
            compress = self.sample(input_ids, attention_mask) if compress is None else compress
            value = self.consistency(*self._hidden(self.model, vit, batch, compress), *teacher, denominator)
            return ViCOLoss(value, compress)
        return self._router_loss(vit, batch, teacher, denominator)

    def _router_loss(self, vit: torch.Tensor, batch: _Batch, teacher: Any, denominator: Any) -> ViCOLoss:
        vision, language = parts_of(self.model, self.backend)
        row = row_of_tile(batch.ids, batch.mask, language.token_id, language.tokens, len(vit)).to(vit.device)
        image = image_of_tile(batch.ids, batch.mask, language.token_id, language.tokens).to(vit.device)

        def losses(compress: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.consistency.per_sample(*self._hidden(self.model, vit, batch, compress), *teacher)

        ratios = self.scorer(self, losses, image, row)
        if ratios.shape != row.shape:
            raise ValueError(f"scorer: gave {list(ratios.shape)}, expected a ratio for each of {len(row)} tiles")
        labels = self.window(ratios)
        decisions = route(vit, vision, groups=row)
        assert decisions.router_logits is not None
        value = self.routing(decisions.router_logits, labels.to(decisions.router_logits.device), denominator)
        return ViCOLoss(value, decisions.compress, ratios, labels)

    def _hidden(
        self, model: nn.Module, vit: torch.Tensor, batch: _Batch, compress: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, RowPlan]:
        """Hidden states before the head, its weight, and the plan of the packed labels."""
        parts, family = parts_of(model, self.backend), flash_family(model)
        assert family is not None
        head, causal = family.head, family.causal
        problem = not_plain(head, nn.Linear, "head") or ("head has a bias" if head.bias is not None else "")
        if problem or gathered_in_call(causal):
            raise ValueError(f"model: {problem or 'is sharded by fully_shard'}, expected a plain head")
        inputs = flash_inputs(
            parts,
            batch.ids,
            vit,
            attention_mask=batch.mask,
            labels=batch.labels,
            decisions=Decisions(compress),
            padding="right",
        )
        packed = inputs.packed
        assert packed.labels is not None
        bare = StandIn(causal, lm_head=lambda hidden: hidden)
        hidden = (
            class_of(causal)
            .forward(
                bare,
                inputs_embeds=inputs.embeds,
                attention_mask=packed.attention_mask,
                position_ids=packed.position_ids,
                use_cache=False,
            )
            .logits
        )
        return hidden, head.weight, row_plan(packed.labels.cpu()).to(hidden.device)

    def state_dict(self) -> dict[str, Any]:
        """Stage, window and the generator's state; the model's weights and the optimizer are the caller's to save."""
        generator = None if self.generator is None else self.generator.get_state()
        return {"stage": self.stage, "window": self.window.state_dict(), "generator": generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError: the state is of the other stage, or of a generator where there is none."""
        if state["stage"] != self.stage:
            raise ValueError(f"state: got one of stage {state['stage']}, expected stage {self.stage}")
        if (state["generator"] is None) != (self.generator is None):
            raise ValueError("generator: got one where the state has none, or the reverse")
        self.window.load_state_dict(state["window"])
        if self.generator is not None:
            self.generator.set_state(state["generator"])
