"""Whoever replaces the forward of a class, for the whole process, is heeded: before, between and after patches."""

import pytest
import torch
from torch import nn

import ivl_kernels
from ivl_kernels.integrations import norms
from tests.models import chat_inputs, chat_model, inputs, native_model

TILES = ((2, 1), ())


@pytest.fixture(autouse=True)
def everything_is_served(monkeypatch):
    monkeypatch.setenv("IVL_CPU_LINEAR", "own")
    monkeypatch.setattr(norms, "_FEW", 0)


def make(name):
    if name == "hub":
        model = chat_model(name)
        return model, chat_inputs(model, TILES, flags=True)
    return native_model(name), inputs(TILES)


def classes(name):
    model = make(name)[0]
    vision = model.vision_model if name == "hub" else model.model.vision_tower
    stack = model.language_model.model if name == "hub" else model.model.language_model
    layer = stack.layers[0]
    projector = model.mlp1 if name == "hub" else model.model.multi_modal_projector
    found = {type(m) for part in (vision, projector, layer) for m in part.modules()}
    kinds = sorted(found - {nn.Identity, nn.Dropout, nn.ModuleList}, key=lambda kind: kind.__name__)
    return [kind for kind in kinds if not kind.__name__.endswith(("Encoder", "Model"))]  # which give no tensor


CASES = [(name, kind) for name in ("qwen3", "qwen3_moe", "gpt_oss", "hub") for kind in classes(name)]


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("name, kind", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_class_with_another_forward(name, kind, when, monkeypatch):
    model, batch = make(name)
    stock = kind.forward

    def more(value):
        return value * 1.25 if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def forward(self, *args, **kwargs):
        out = stock(self, *args, **kwargs)
        return tuple(map(more, out)) if isinstance(out, tuple) else out * 1.25

    def change():
        monkeypatch.setattr(kind, "forward", forward)

    if when != "before":
        handle = ivl_kernels.patch(model)
        plain = model(**batch).logits
    if when == "between":
        handle.undo()
    change()
    if when != "after":
        ivl_kernels.patch(model)
    got = model(**batch).logits
    expected = make(name)[0](**batch).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-4)
    assert when == "before" or not torch.allclose(plain[seen], got[seen], rtol=1e-3, atol=1e-3)
