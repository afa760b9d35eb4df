"""Models of every kind in two halves, and what the whole one answers."""

import ivl_kernels
from ivl_kernels.dvd import LanguageSide, VisionSide
from ivl_kernels.nn import FlashVision
from ivl_kernels.testing import tiny
from tests.models import chat_inputs, chat_model

GREEDY = dict(max_new_tokens=6, do_sample=False)
KINDS = ("native", "native flash", "repo", "hub", "hub flash")


def model_of(kind, *, seed=0, thresholds=(0.5, 0.0)):
    """The same random weights in every process."""
    if kind.startswith("native"):
        model = tiny.native_model(seed=seed)
        if kind.endswith("flash"):
            flash = FlashVision(32, 48, *thresholds, heads=2)
            tiny.randomize(flash, seed=seed + 1).eval().attach(model)
        return model
    return chat_model(kind.split()[0], seed=seed, **({"flash": thresholds} if kind.endswith("flash") else {}))


def inputs_of(model, tiles, **options):
    return tiny.inputs(tiles, **options) if hasattr(model, "model") else chat_inputs(model, tiles, **options)


def requests_of(batch, tiles):
    """Of each row its images' tiles."""
    counts = [count for row in tiles for count in row]
    images = iter(batch["pixel_values"].split(counts)) if counts else iter(())
    return [[next(images) for _ in row] for row in tiles]


def whole(model, batch, **features):
    options = {k: features.pop(k) for k in ("v2pe_delta",) if k in features}
    with ivl_kernels.patched(model, **features):
        return model.generate(**batch, **GREEDY, **options)


def sides(kind, dtype=None, **features):
    """Both, each over a model of its own and patched."""
    vision, language = (model_of(kind).to(dtype) for _ in range(2))
    ivl_kernels.patch(vision)
    ivl_kernels.patch(language, **features)
    return VisionSide(vision), LanguageSide(language)
