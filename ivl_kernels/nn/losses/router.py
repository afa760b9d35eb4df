"""Training a tile router: labels from ratios of losses, and the loss on them."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import check_shape
from ._common import Number, over

IGNORED = -100


def loss_ratio(compressed: Tensor, full: Tensor, eps: float = 1e-6) -> Tensor:
    """(compressed + eps) / (full + eps), float64: what compressing does to a loss; NaN where both are below eps."""
    check_shape("full", full, compressed.shape)
    a, b = compressed.double(), full.double()
    return torch.where((a < eps) & (b < eps), torch.nan, (a + eps) / (b + eps))


class RatioWindow(nn.Module):
    """Labels of tiles from the last ratios: 0 (compress) below the window's percentile, 1 (keep) from it on.

    Args:
        size: ratios that the window holds; the oldest leave first.
        percentile: of the threshold. 50 gives balanced labels, which is what the report asks for.
        min_count: no labels before the window holds that many.
        group: the ranks that share one window; None: the default group, where there is one.

    `forward(ratios [T])` -> [T] int64 on their device: pushes, then compares; -100 without a label: a ratio that is not
    finite, which is not pushed either, or a window with too little in it. All ranks push all ranks' ratios, so that
    they compare with the same number. The window is in the state dict.
    Source: InternVL3.5, section 2.3; the window's length is not published.
    """

    def __init__(self, size: int = 1024, *, percentile: float = 50.0, min_count: int = 32, group: Any = None) -> None:
        super().__init__()
        if not 1 <= min_count <= size:
            raise ValueError(f"min_count: got {min_count}, expected 1 to the window's {size}")
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile: got {percentile}, expected 0 to 100")
        self.percentile, self.min_count, self.group = percentile, min_count, group
        self._values: deque[float] = deque(maxlen=size)

    @property
    def threshold(self) -> float | None:
        """The percentile, linearly interpolated; None with too little in the window."""
        if len(self._values) < self.min_count:
            return None
        values = torch.tensor(list(self._values), dtype=torch.float64)
        return float(torch.quantile(values, self.percentile / 100))

    def forward(self, ratios: Tensor) -> Tensor:
        check_shape("ratios", ratios, ("T",))
        mine = ratios.detach().double().cpu()
        everyone = [mine[mine.isfinite()].tolist()]
        if dist.is_available() and dist.is_initialized():
            everyone = everyone * dist.get_world_size(self.group)
            dist.all_gather_object(everyone, mine[mine.isfinite()].tolist(), group=self.group)
        for values in everyone:
            self._values.extend(values)
        threshold = self.threshold
        if threshold is None:
            return torch.full(ratios.shape, IGNORED, device=ratios.device)
        labels = (mine >= threshold).long().masked_fill(~mine.isfinite(), IGNORED)
        return labels.to(ratios.device)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(self._values), dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self._values.clear()
        self._values.extend(state.tolist())


class RouterLoss(nn.Module):
    """Cross-entropy of a router's two logits in float32, over the tiles that have labels.

    `forward(logits [T, 2], labels [T], tiles=None)` -> scalar. labels: 0, 1 or -100. tiles: the denominator; None: the
    labelled tiles of this call. No label at all: 0, with gradients of 0.

    Raises:
        ValueError: shapes that do not fit, or on the CPU another label.
    """

    def forward(self, logits: Tensor, labels: Tensor, tiles: Number | None = None) -> Tensor:
        check_shape("logits", logits, ("T", 2))
        check_shape("labels", labels, (len(logits),))
        known = labels != IGNORED
        wrong = known & (labels != 0) & (labels != 1)
        if labels.device.type == "cpu" and bool(wrong.any()):
            raise ValueError(f"labels: got {int(labels[wrong][0])}, expected 0, 1 or {IGNORED}")
        total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
        return over(total, known.sum() if tiles is None else tiles, "tiles")
