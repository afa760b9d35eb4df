"""A bar chart of the stages of a generation: plain, patched, and plain under `torch.compile` where it was timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..integrations._verify import Stage

_SMALLEST = 0.005  # of the whole: what is less has no bar of its own to be seen


def drawn(stages: Sequence[Stage], compiled: Mapping[str, float], title: str, path: Path) -> bool:
    """Whether the chart was written: matplotlib may not be installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole = median(stages[-1].plain)
    shown = [s for s in stages if median(s.plain) >= _SMALLEST * whole]
    series = {"plain": [median(s.plain) for s in shown], "patched": [median(s.patched) for s in shown]}
    if compiled:
        series["plain, torch.compile"] = [compiled.get(s.name, 0.0) for s in shown]
    colours = ("#9aa5b1", "#1f77b4", "#e0a030")
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(shown) * len(series)), layout="constrained")
    height = 0.8 / len(series)
    for i, ((label, seconds), colour) in enumerate(zip(series.items(), colours)):
        places = [row + (i - (len(series) - 1) / 2) * height for row in range(len(shown))]
        bars = axes.barh(places, seconds, height, label=label, color=colour)
        texts = [
            f" {s:.3g} s" + (f"  ({stage.ratio:.2f}x)" if label == "patched" and stage.ratio else "")
            for s, stage in zip(seconds, shown)
        ]
        axes.bar_label(bars, texts, fontsize=8)
    axes.set_yticks(range(len(shown)), [s.name for s in shown])
    axes.invert_yaxis()
    axes.set_xlabel("seconds (median)")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
