"""Runs a model plain and patched, compares them layer by layer and times both."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..models.families import families_in, family_of
from ..models.upstream import forward_name
from ._edit import Editor
from ._patch import patched
from ._report import PatchReport
from ._stages import PLACEMENT, PROJECTOR, STAGES, can_measure_memory, stage_memory, stage_times

# Largest allowed root-mean-square difference, relative to that of the plain output. A layer of a transformer in
# bfloat16 is itself about 1e-2 away from the same layer in float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


_NOISE = "(Where a feature is not patched, plain and patched run the same code: that ratio is this machine's noise.)"


@dataclass(frozen=True)
class Layer:
    """How far the patched output of one module is from the plain one."""

    name: str
    max_error: float
    relative_error: float
    limit: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.relative_error <= self.limit


@dataclass(frozen=True)
class Stage:
    """Seconds of every round, and peak growth of memory in bytes (None where it cannot be measured)."""

    name: str
    plain: Sequence[float]
    patched: Sequence[float]
    plain_memory: float | None = None
    patched_memory: float | None = None

    @property
    def ratio(self) -> float | None:
        """Median over rounds of plain over patched."""
        ratios = [a / b for a, b in zip(self.plain, self.patched) if b > 0]
        return median(ratios) if ratios else None


@dataclass
class VerifyReport:
    """What `verify` found; `passed` is the verdict, `str()` prints tables."""

    patch: PatchReport
    layers: list[Layer] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    tokens: int = 0
    first_difference: int | None = None
    tokens_decide: bool = True
    plain_tokens: torch.Tensor | None = None
    patched_tokens: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return (
            bool(self.layers)
            and all(layer.passed for layer in self.layers)
            and (self.first_difference is None or not self.tokens_decide)
        )

    def parity(self, most: int = 12) -> str:
        """The table of layers: all of them, or the worst `most`."""
        shown, left = self.layers, 0
        if len(shown) > most:
            worst = sorted(shown, key=lambda layer: (layer.passed, -layer.relative_error / layer.limit))[:most]
            shown, left = [layer for layer in shown if layer in worst], len(shown) - most
        rows = [("output of", "max error", "relative", "limit", "")]
        for layer in shown:
            verdict = layer.problem or ("ok" if layer.passed else "DIFFERS")
            rows.append(
                (layer.name, f"{layer.max_error:.2e}", f"{layer.relative_error:.2e}", f"{layer.limit:.0e}", verdict)
            )
        lines = [_table(rows)]
        if left:
            lines.append(f"and {left} layers that are closer")
        if self.tokens:
            equal = self.first_difference is None
            lines.append(
                f"greedy tokens: all {self.tokens} equal"
                if equal
                else f"greedy tokens: DIFFER from token {self.first_difference} of {self.tokens} on"
                + ("" if self.tokens_decide else " (rounding of this dtype can do that: not held against it)")
            )
        return "\n".join(lines)

    def performance(self) -> str:
        """The table of time and memory by stage."""
        rows: list[tuple[str, ...]] = [
            ("stage", "plain", "spread", "patched", "spread", "plain/patched", "memory plain", "patched")
        ]
        for stage in self.stages:
            ratio = stage.ratio
            rows.append(
                (
                    stage.name,
                    *(text for times in (stage.plain, stage.patched) for text in _times(times)),
                    "-" if ratio is None else f"{ratio:.2f}x",
                    _size(stage.plain_memory),
                    _size(stage.patched_memory),
                )
            )
        return _table(rows)

    def __str__(self) -> str:
        parts = [str(self.patch), self.parity()]
        if self.stages:
            parts.append(self.performance() + "\n" + _NOISE)
        parts += self.notes
        parts.append("verify: PASSED" if self.passed else "verify: FAILED")
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "patch": self.patch.to_dict(),
            "layers": [{**asdict(layer), "passed": layer.passed} for layer in self.layers],
            "stages": [{**asdict(stage), "ratio": stage.ratio} for stage in self.stages],
            "tokens": self.tokens,
            "first_difference": self.first_difference,
            "tokens_decide": self.tokens_decide,
            "notes": list(self.notes),
        }


def verify(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 8,
    rounds: int = 3,
    tolerance: float | None = None,
    memory: bool = True,
    progress: Callable[[str], None] | None = None,
    **features: Any,
) -> VerifyReport:
    """Run a model plain and patched on the same inputs, compare every layer and the tokens, and time both.

    Args:
        model: as for `patch`; unpatched. It is left as it was.
        inputs: keyword arguments of its `generate`: input_ids, attention_mask, pixel_values, ...
        max_new_tokens: greedy tokens to generate and compare; 0 compares and times a forward only.
        rounds: timed rounds; in each, plain and patched run one after the other. 0: no timing.
        tolerance: allowed root-mean-square difference relative to the plain output; None: by dtype.
        memory: also measure peak memory by stage.
        progress: called with a few words before each step.
        **features: as for `patch`.

    Returns:
        The report. `report.passed`: every layer within the tolerance and, in float32 and float64, all tokens equal.

    Raises:
        ValueError: the model is patched already.

    Layers are the entries of the model's module lists, the projector, the vision and the language model; their outputs
    of the plain run are kept until they have been compared.
    """
    if any("_ivl" in vars(module) for module in model.modules()):
        raise ValueError("model: got a patched model, expected a plain one (verify patches it itself)")
    say = progress or (lambda text: None)
    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    model.eval()

    def forward() -> Any:
        return model(**_forward_inputs(model, inputs))

    def generate() -> Any:
        options = dict(max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False)
        return model.generate(**{k: v for k, v in inputs.items() if k != "image_flags"}, **options)  # type: ignore

    run = generate if max_new_tokens else forward
    plain_times: list[dict[str, float]] = []
    patched_times: list[dict[str, float]] = []
    plain_memory: dict[str, float] = {}
    patched_memory: dict[str, float] = {}
    try:
        with torch.no_grad():
            say("plain forward")
            kept: dict[str, list[torch.Tensor]] = {}
            with _observed(model, lambda name, out: kept.setdefault(name, []).append(out)):
                forward()
            plain_tokens = patched_tokens = None
            if max_new_tokens:
                say("plain generate")
                plain_tokens = generate()
            with patched(model, **features) as handle:
                say("patched forward")
                report = VerifyReport(handle.report())
                compare = _Comparer(kept, report.layers, tolerance)
                with _observed(model, compare):
                    forward()
                compare.finish()
                if max_new_tokens:
                    say("patched generate")
                    patched_tokens = generate()
                report.patch = handle.report()
            if rounds:
                say("warming up")
                run()
            for i in range(rounds):
                for ours in (False, True) if i % 2 == 0 else (True, False):
                    say(f"timing, round {i + 1} of {rounds}")
                    gc.collect()
                    if ours:
                        with patched(model, **features):
                            patched_times.append(stage_times(model, run, device))
                    else:
                        plain_times.append(stage_times(model, run, device))
            if rounds and memory and can_measure_memory(device):
                say("memory")
                plain_memory = stage_memory(model, run, device)
                with patched(model, **features):
                    patched_memory = stage_memory(model, run, device)
    finally:
        for module, mode in training.items():
            module.training = mode
    if plain_tokens is not None and patched_tokens is not None:
        report.plain_tokens, report.patched_tokens = plain_tokens, patched_tokens
        report.tokens = max_new_tokens
        report.tokens_decide = next(model.parameters()).dtype in (torch.float32, torch.float64)
        report.first_difference = _first_difference(
            plain_tokens[:, -max_new_tokens:], patched_tokens[:, -max_new_tokens:]
        )
    report.stages = stages_of(plain_times, patched_times, plain_memory, patched_memory)
    return report


def _forward_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(inputs)
    family = family_of(model)
    if family is not None and "pixel_values" in inputs:
        result |= {k: v for k, v in family.forward_inputs(inputs["pixel_values"]).items() if k not in inputs}
    return result


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    parts = {
        id(part)
        for _, family in families_in(model)
        for part in (family.vision, family.projector, family.language, family.head)
    }
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        in_list = name.isdigit() and isinstance(model.get_submodule(parent), nn.ModuleList)
        if (in_list and "expert" not in parent) or id(module) in parts:
            yield path, module


def _output(out: Any) -> torch.Tensor | None:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(out, name, None), torch.Tensor):
            return getattr(out, name)
    first = out[0] if isinstance(out, (tuple, list)) and out else out
    return first if isinstance(first, torch.Tensor) else None


@contextlib.contextmanager
def _observed(model: nn.Module, take: Callable[[str, torch.Tensor], Any]) -> Iterator[None]:
    """Hands every layer's output to `take`. Not by hooks: whoever looks by a hook is shown upstream's own code."""

    def seen(path: str) -> Callable[..., Any]:
        def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
            out = inner(self, *args, **kwargs)
            tensor = _output(out)
            if tensor is not None:
                take(path, tensor.detach())
            return out

        return forward

    edit = Editor(("verify", ""))
    try:
        for path, module in _layers(model):
            edit.method(module, forward_name(module), seen(path))
        yield
    finally:
        edit.roll_back()


class _Comparer:
    """Compares each output with the plain one kept for it, and lets go of that."""

    def __init__(self, kept: dict[str, list[torch.Tensor]], layers: list[Layer], tolerance: float | None) -> None:
        self._kept, self._layers, self._tolerance = kept, layers, tolerance

    def __call__(self, name: str, got: torch.Tensor) -> None:
        limit = self._tolerance if self._tolerance is not None else TOLERANCE.get(got.dtype, 1e-4)
        if not self._kept.get(name):
            self._layers.append(Layer(name, float("nan"), float("inf"), limit, "not called in the plain model"))
            return
        plain = self._kept[name].pop(0)
        if plain.shape != got.shape or plain.dtype != got.dtype:
            problem = f"{list(got.shape)} {got.dtype}, plain {list(plain.shape)} {plain.dtype}"
            self._layers.append(Layer(name, float("nan"), float("inf"), limit, problem))
            return
        plain, got = plain.double(), got.double()
        # Fully masked rows are NaN in some attention implementations, plain and patched alike.
        same = (plain == got) | (plain.isnan() & got.isnan())
        error = torch.where(same, torch.zeros_like(got), got - plain)
        scale = float(plain.nan_to_num(0, 0, 0).square().mean().sqrt())
        relative = float(error.square().mean().sqrt()) / scale if scale else float(error.abs().max())
        problem = "" if bool(error.isfinite().all()) else "not finite"
        self._layers.append(Layer(name, float(error.abs().max()), relative, limit, problem))

    def finish(self) -> None:
        for name, left in self._kept.items():
            if left:
                limit = self._tolerance or TOLERANCE.get(left[0].dtype, 1e-4)
                self._layers.append(Layer(name, float("nan"), float("inf"), limit, "not called in the patched model"))


def _first_difference(plain: torch.Tensor, patched: torch.Tensor) -> int | None:
    if plain.shape != patched.shape:
        return 0
    different = (plain != patched).any(0).nonzero()
    return int(different[0]) if len(different) else None


def stages_of(
    plain: Sequence[dict[str, float]],
    ours: Sequence[dict[str, float]] = (),
    plain_memory: Mapping[str, float] = MappingProxyType({}),
    our_memory: Mapping[str, float] = MappingProxyType({}),
) -> list[Stage]:
    """What was measured in each stage, and in some of them together."""

    def stage(label: str, names: Sequence[str]) -> Stage:
        def total(values: dict[str, float]) -> float:
            return sum(values.get(name, 0.0) for name in names)

        def largest(values: Mapping[str, float]) -> float | None:
            return max((values[name] for name in names if name in values), default=None)

        return Stage(
            label, [total(v) for v in plain], [total(v) for v in ours], largest(plain_memory), largest(our_memory)
        )

    if not plain:
        return []
    seen = {name for values in (*plain, *ours) for name in values}
    rows = [stage(name, [name]) for name in STAGES if name in seen]
    both = stage("vision output to language model input", [PROJECTOR, PLACEMENT])
    return [*rows, both, stage("all", list(seen))]


def _times(seconds: Sequence[float]) -> tuple[str, str]:
    if not seconds:
        return "-", "-"
    return f"{1e3 * median(seconds):.1f} ms", f"{1e3 * min(seconds):.1f}-{1e3 * max(seconds):.1f}"


def _size(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f} MB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
