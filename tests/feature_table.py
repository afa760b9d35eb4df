"""Which feature is right on the transformers that runs `python -m tests.feature_table`: prints one JSON object.

Each feature is patched by itself and all defaults together, on every model that this version can build, and compared
with the plain model: logits, tokens of two turns with a cache, positions of new tokens under V2PE, Flash's second turn,
the loss, samples end to end in a row against each alone.
A cell is "right", "refused: why", "absent" (nothing of that kind in the model), "raises: what" or "WRONG: how".
"""

import json
import os
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["IVL_CPU_LINEAR"] = "own"  # the package's products, also where the BLAS is faster
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402

import ivl_kernels  # noqa: E402
from ivl_kernels.integrations._patch import features  # noqa: E402
from ivl_kernels.nn import FlashVision  # noqa: E402
from ivl_kernels.packing import Sample, collate  # noqa: E402
from tests import against_plain as plain  # noqa: E402
from tests.models import chat_inputs, chat_model, inputs, native_model, randomize  # noqa: E402

FEATURES = [name for name, feature in features().items() if not feature.option]
MODELS = {
    "Qwen2": ("native", "qwen2"),
    "Qwen3": ("native", "qwen3"),
    "Qwen3-MoE": ("native", "qwen3_moe"),
    "GPT-OSS": ("native", "gpt_oss"),
    "GitHub code (Qwen2)": ("repo", "qwen2"),
    "checkpoint code (Qwen3)": ("hub", "qwen3"),
    "checkpoint code (Qwen3-MoE)": ("hub", "qwen3_moe"),
}
TOLERANCE = 5e-5


class Wrong(Exception):
    pass


def only(feature, **values):
    return {n: False for n, f in features().items() if n not in (feature, *values) and not f.option} | values


def same(what, got, expected):
    if got.shape != expected.shape:
        raise Wrong(f"{what}: {list(got.shape)} for {list(expected.shape)}")
    if got.dtype == torch.int64:
        if not torch.equal(got, expected):
            raise Wrong(f"{what} differ")
    elif not (got - expected).abs().max() <= TOLERANCE:
        raise Wrong(f"{what} off by {float((got - expected).abs().max()):.2g}")


def build(kind, family, flash):
    """(model, batch) with Flash's modules where the feature is Flash."""
    if kind == "native":
        model = native_model(family)
        if flash:
            router().attach(model)
        model.generation_config.eos_token_id = None
        return model, inputs(((3,),) if flash else ((2,), (1, 1)))
    model = chat_model(kind, family, **({"flash": plain.THRESHOLDS} if flash else {}))
    return model, chat_inputs(model, ((3,),) if flash else ((2,), (1, 1)))


def router():
    return randomize(FlashVision(32, 48, *plain.THRESHOLDS), seed=3).eval()


def patched(model, feature):
    """Why the feature is refused, "absent", or "" when it is patched."""
    options = only(feature, **{feature: plain.DELTA if feature == "v2pe" else True}) if feature else {}
    handle = ivl_kernels.patch(model, **options)
    rows = [row for row in handle.report().rows if row.feature == (feature or row.feature)]
    if feature and all(row.state == "not found" for row in rows):
        return "absent"
    refused = sorted({row.detail for row in rows if row.state == "refused"})
    return f"refused: {'; '.join(refused)}" if refused and feature else ""


def compare_loss(kind, family):
    stock, batch = build(kind, family, flash=False)
    model, _ = build(kind, family, flash=False)
    if kind != "native":
        batch = chat_inputs(stock, ((2,), (1, 1)), flags=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[labels == plain.TOKEN] = -100
    expected = stock(**batch, labels=labels).loss
    why = patched(model, "loss")
    if not why:
        same("loss", model(**batch, labels=labels).loss, expected)
    return why


def compare_packed(kind, family):
    stock, _ = build(kind, family, flash=False)
    model, _ = build(kind, family, flash=False)
    make = inputs if kind == "native" else lambda tiles, **seed: chat_inputs(model, tiles, **seed)
    alone = [make(((2,),), seed=1), make(((1,),), seed=2)]
    row = collate([Sample(b["input_ids"][0], b["input_ids"][0], b["pixel_values"]) for b in alone])
    given = {name: row[name] for name in ("input_ids", "position_ids", "pixel_values")}
    if kind != "native":
        flag = {"image_flags": torch.ones(len(given["pixel_values"]), 1, dtype=torch.int64)}
        alone = [b | {"image_flags": flag["image_flags"][: len(b["pixel_values"])]} for b in alone]
        given |= flag
    expected = torch.cat([stock(**b).logits for b in alone], 1)
    if (stock(**given).logits - expected).abs().max() < 0.01:
        raise Wrong("the check does not see neighbours")
    why = patched(model, "packed")
    if not why:
        same("logits", model(**given).logits, expected)
    return why


def compare(kind, family, feature):
    """Raises `Wrong` where the patched model differs from the plain one; returns why it is not patched, or ""."""
    if feature in ("loss", "packed"):
        return (compare_loss if feature == "loss" else compare_packed)(kind, family)
    flash, v2pe = feature == "flash", feature == "v2pe"
    stock, batch = build(kind, family, flash)
    model, _ = build(kind, family, flash)
    if kind == "native" and flash:
        tokens, logits, held = plain.packed_turns(stock, batch, router())
        why = patched(model, feature)
        for name in () if why else plain.cache_names(model):
            got, ours, length = plain.generated_turns(model, batch, cache_name=name)
            if length != held:
                raise Wrong(f"{length} positions in the cache, {held} packed ({name}=)")
            same("tokens of two turns", got, tokens)
            same("logits of two turns", ours, logits)
    elif kind == "native":
        tokens, logits = plain.turns(stock, batch, fractional=v2pe)
        if v2pe and (plain.turns(stock, batch)[1] - logits).abs().max() < 0.1:
            raise Wrong("the check does not see positions")
        why = patched(model, feature)
        for cached in () if why else (False, True):
            got, ours = plain.turns(model, batch, cached=cached)
            same(f"logits{' with a cache' if cached else ''}", ours, logits)
            same("tokens", got, tokens)
    else:
        tokens = (
            plain.chat_generated_turns(stock, batch) if flash else plain.chat_turns(stock, batch, fractional=v2pe)[0]
        )
        flags = chat_inputs(stock, ((2,), (1, 1)), flags=True)
        logits = None if flash or v2pe else stock(**flags).logits
        why = patched(model, feature)
        if not why:
            if logits is not None:
                same("logits", model(**flags).logits, logits)
            same("tokens of two turns", plain.chat_generated_turns(model, batch), tokens)
    return why


def where(error):
    """The last frame of the package in an error's traceback, if any."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "ivl_kernels/" in f.filename]
    return f" ({Path(frames[-1].filename).name})" if frames else ""


@torch.no_grad()
def cell(kind, family, feature):
    try:
        return compare(kind, family, feature) or "right"
    except Wrong as error:
        return f"WRONG: {error}"
    except Exception as error:
        return f"raises: {type(error).__name__}: {str(error).splitlines()[0][:160]}{where(error)}"


def main():
    torch.set_num_threads(1)
    cells = {}
    for name, (kind, family) in MODELS.items():
        cells[name] = {feature or "all defaults": cell(kind, family, feature) for feature in (*FEATURES, "")}
        for feature, text in cells[name].items():
            if feature == "moe" and text == "absent" and "moe" not in family and family != "gpt_oss":
                cells[name][feature] = ""  # a dense model has none in any version
            if feature == "flash" and kind == "repo":
                cells[name][feature] = ""  # nor has that code a Flash
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({**versions, "cells": cells}))


if __name__ == "__main__":
    main()
