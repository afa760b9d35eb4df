"""Denominators of weighted losses for transformers' Trainer."""

from __future__ import annotations

from typing import Any


class WeightedLoss:
    """Mix-in for a `transformers.Trainer`: the loss of a step is divided by the weights of all its rows.

        class PackedTrainer(WeightedLoss, Trainer): ...

    A Trainer counts supervised tokens over the micro-batches of a step (and over ranks with
    `average_tokens_across_devices`); this sums the denominators of their row plans the same way, so that "sample" and
    "square" reductions are exact however a step is split. For models patched with `loss=`, and batches from
    `packing.collate`.

    Raises (in training):
        ValueError: the model takes no number of items, so that the Trainer would scale the loss by the accumulation
            steps once more.
    """

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        me: Any = self
        plans = [batch["row_plan"] for batch in batches if isinstance(batch, dict) and "row_plan" in batch]
        if not plans:
            return batches, count
        if not me.model_accepts_loss_kwargs or count is None:
            raise ValueError("model: takes no num_items_in_batch, expected one patched with loss= before the Trainer")
        total = sum(plan["denominator"] for plan in plans)
        if me.args.average_tokens_across_devices and me.args.world_size > 1:
            total = me.accelerator.gather(total.to(device)).sum()
        for batch in batches:
            batch["loss_denominator"] = total
        return batches, count
