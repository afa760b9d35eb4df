"""The plain model with its vision transformer and decoder stack under `torch.compile`: what to compare a patch with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..integrations import VerifyReport


@contextlib.contextmanager
def compiled(model: Any) -> Iterator[None]:
    import torch

    from ..models.families import family_of

    family = family_of(model)
    assert family is not None
    paths = {id(module): path for path, module in model.named_modules()}
    places = [paths[id(part)].rpartition(".") for part in (family.vision, family.text)]
    before = [model.get_submodule(parent)._modules[name] for parent, _, name in places]
    try:
        for (parent, _, name), part in zip(places, before):
            model.get_submodule(parent)._modules[name] = torch.compile(part)
        yield
    finally:
        for (parent, _, name), part in zip(places, before):
            model.get_submodule(parent)._modules[name] = part
        torch.compiler.reset()


def stages(model: Any, inputs: Mapping[str, Any], tokens: int, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each stage of a generation, compilation apart, by the names of a `VerifyReport`'s stages."""
    import torch

    from ..integrations._stages import stage_times
    from ..integrations._verify import stages_of

    asked = {name: value for name, value in inputs.items() if name != "image_flags"}

    def run() -> None:
        model.generate(**asked, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    with torch.no_grad(), compiled(model):
        run()
        times = [stage_times(model, run, torch.device(device)) for _ in range(rounds)]
    return {stage.name: median(stage.plain) for stage in stages_of(times)}


def table(report: VerifyReport, seconds: Mapping[str, float]) -> str:
    lines = [f"{'stage':<38}{'plain':>12}{'patched':>12}{'compiled':>12}   medians; compiling is not counted"]
    for stage in report.stages:
        each = (median(stage.plain), median(stage.patched), seconds.get(stage.name, float("nan")))
        lines.append(f"{stage.name:<38}" + "".join(f"{1e3 * value:>9.1f} ms" for value in each))
    return "\n".join(lines)
