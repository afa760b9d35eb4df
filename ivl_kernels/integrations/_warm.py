"""What serving a patched model will have to compile, compiled before the first request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import _gpu
from ..flash.inputs import project_into, route
from ..flash.parts import flash_family, vision_parts
from ..models.families import Family, families_in, text_stacks
from ..models.layers import run_layers
from ..ops import v2pe_position_ids
from ._edit import attachment

# A multiple of 16 and another number between any two thresholds of the kernels' configurations.
TOKENS = tuple(sorted({n * 2**i + more for i in range(2, 12) for n in (2, 3) for more in (0, 1)} | {12_288, 16_384}))
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 24, 32, 48, 64, 65, 128, 256)
TILES = (1, 2, 3, 7, 13)


@dataclass(frozen=True)
class Variant:
    """A compiled kernel.

    Attributes:
        kernel: its name.
        config: tile sizes, widths and options that it was compiled for, warps and stages among them.
        seconds: that it took, to find it on the disk where `cached`.
        cached: Triton had it on the disk.
    """

    kernel: str
    config: dict[str, Any]
    seconds: float
    cached: bool

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.config.items())
        return f"{self.kernel} {self.seconds:.2f} s{' from the disk' if self.cached else ''} ({options})"


@dataclass(frozen=True)
class WarmUp:
    """What `warm_up` compiled.

    Attributes:
        variants: in the order of compilation, without those that this process had already.
        seconds: the whole call took.
        why: nothing was to be compiled, and why; else empty.
    """

    variants: tuple[Variant, ...]
    seconds: float
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"nothing to compile: {self.why}"
        kernels = len({variant.kernel for variant in self.variants})
        head = f"{len(self.variants)} variants of {kernels} kernels in {self.seconds:.1f} s"
        return "\n".join([head, *map(str, self.variants)])


def warm_up(
    model: nn.Module,
    tokens: Iterable[int] | int = TOKENS,
    *,
    batches: Iterable[int] | int = BATCHES,
    tiles: Iterable[int] | int = TILES,
) -> WarmUp:
    """Compile every variant of a Triton kernel that serving a patched model meets at these sizes.

    Args:
        model: after `patch`, on the device where it will serve, in the dtype that it will serve in.
        tokens: lengths of prompts, or one. Kernels depend on a length by whether 16 divides it and by a few thresholds,
            so that the default serves all lengths up to 16,384.
        batches: numbers of sequences that decode a token at once; the default serves numbers up to 256.
        tiles: image tiles of a prompt; the default serves numbers up to 13.

    Returns:
        The compiled variants: kernel, configuration, seconds.

    Raises:
        TypeError: something else than whole numbers.
        ValueError: a number below 1, or nothing in the model is patched.

    Upstream's own bodies run on zeros: of each decoder stack one layer of each kind, its attention only up to the
    cache; of the vision side the whole transformer; with Flash the router and both projectors, at every number of
    compressed tiles. No gradients, so what only training needs is not compiled. What forces a backend of `patch` is not
    known to Flash's part, the environment variable is.
    """
    sizes = {name: _checked(name, value) for name, value in dict(tokens=tokens, batches=batches, tiles=tiles).items()}
    patched = {feature for module in model.modules() for feature, _ in getattr(attachment(module), "edits", {})}
    if not patched:
        raise ValueError(f"model: nothing in this {type(model).__name__} is patched, expected a model after patch()")
    why = _nothing(model)
    if why:
        return WarmUp((), 0.0, why)
    from .._triton import compilations

    start = time.perf_counter()
    with compilations() as found, torch.no_grad():
        for _, text in text_stacks(model):
            for length in sizes["tokens"]:
                run_layers(text, 1, length)
            for batch in sizes["batches"]:
                run_layers(text, batch, 1)
        for _, family in families_in(model):
            if "v2pe" in patched:
                for length in sizes["tokens"]:
                    _positions(family, length)
            if family.has_vision:
                for count in sizes["tiles"]:
                    _tiles(family, count, "flash" in patched)
    return WarmUp(tuple(Variant(*each) for each in found), time.perf_counter() - start)


def _checked(name: str, values: Iterable[int] | int) -> Sequence[int]:
    values = list(values) if isinstance(values, Iterable) else [values]
    for value in values:
        if type(value) is not int:
            raise TypeError(f"{name}: got {value!r}, expected whole numbers")
    values = sorted(set(values))
    if values and values[0] < 1:
        raise ValueError(f"{name}: got {values[0]}, expected numbers from 1 on")
    return values


def _nothing(model: nn.Module) -> str:
    devices = sorted({p.device.type for p in model.parameters()})
    if "cuda" not in devices and not (devices == ["cpu"] and _gpu.preferred()):
        return f"the model is on {' and '.join(devices)}; kernels of the CPU are compiled when the package is built"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return ""


def _tiles(family: Family, count: int, flash: bool) -> None:
    """Pixels to rows of the language model."""
    side, weight = family.tile_pixels, next(p for p in family.vision.parameters() if p.is_floating_point())
    pixels = torch.zeros(count, 3, side, side, dtype=weight.dtype, device=weight.device)
    getattr(family.core, family.features_name)(pixels)
    if not flash or flash_family(family.model) is None:
        return
    parts = vision_parts(family)
    vit = parts.tokens_of(pixels)
    route(vit, parts)
    embedding = family.embedding.weight
    rows = torch.zeros(count * parts.tokens, embedding.shape[1], dtype=embedding.dtype, device=vit.device)
    for compressed in range(count + 1):
        project_into(rows, vit, torch.arange(count, device=vit.device) < compressed, parts, compressed=compressed)


def _positions(family: Family, length: int) -> None:
    """V2PE of a prompt, as the timeline asks for it, with a token of text behind; with Flash some tiles compressed."""
    ids = torch.zeros(1, length + 1, dtype=torch.int64, device=family.embedding.weight.device)
    mask, delta = torch.ones_like(ids, dtype=torch.bool), torch.ones(1, dtype=torch.float64, device=ids.device)
    flash = flash_family(family.model) is not None
    for compress in (None, mask[0, :1]) if flash else (None,):
        v2pe_position_ids(ids, 1, delta, attention_mask=mask, compress=compress, check=False)
