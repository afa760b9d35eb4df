"""`verify`: the report of a right model, of a wrong kernel, and what is measured."""

import json

import pytest
import torch

from ivl_kernels import ops, patch, verify
from ivl_kernels.integrations._stages import PLACEMENT, PROJECTOR
from tests.models import chat_inputs, chat_model, inputs, native_model


def make(name):
    model = native_model() if name == "native" else chat_model(name)
    batch = inputs(((2, 1), ())) if name == "native" else chat_inputs(model, ((2, 1), ()))
    return model, batch


@pytest.mark.parametrize("name", ["native", "repo", "hub"])
def test_passes(name):
    model, batch = make(name)
    model.generate(**batch, max_new_tokens=1)  # transformers leaves marks of its own at the first call
    before = [dict(vars(m)) for m in model.train().modules()]
    steps = []
    report = verify(model, batch, max_new_tokens=4, rounds=1, progress=steps.append)
    assert report.passed and report.tokens == 4 and torch.equal(report.plain_tokens, report.patched_tokens)
    after = [dict(vars(m)) for m in model.modules()]
    assert [list(a) for a in after] == [list(b) for b in before] and model.training
    names = " ".join(layer.name for layer in report.layers)
    assert ("multi_modal_projector" in names or "mlp1" in names) and "layers.1" in names
    stages = {stage.name: stage for stage in report.stages}
    for stage in (PROJECTOR, PLACEMENT):
        assert stages[stage].plain[0] > 0 and stages[stage].patched[0] > 0
    assert stages["all"].ratio > 0 and "plain forward" in steps
    text = str(report)
    assert "verify: PASSED" in text and "all 4 equal" in text and "cpu (float32 on cpu)" in text
    assert json.loads(json.dumps(report.to_dict()))["passed"]


def test_forward_only():
    model, batch = make("native")
    report = verify(model, batch, max_new_tokens=0, rounds=1, memory=False)
    assert report.passed and report.tokens == 0


def test_half_precision_is_judged_by_its_layers():
    model, batch = make("native")
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    report = verify(model.bfloat16(), batch, rounds=0)
    assert report.passed and not report.tokens_decide
    report.first_difference = 1
    assert report.passed and "not held against it" in str(report)


def test_a_wrong_kernel_is_seen(monkeypatch):
    model, batch = make("native")
    right = ops.pixel_shuffle_mlp
    monkeypatch.setattr(ops, "pixel_shuffle_mlp", lambda *a, **k: right(*a, **k).flip(1))
    report = verify(model, batch, rounds=0)
    assert not report.passed and "DIFFERS" in str(report) and "verify: FAILED" in str(report)
    assert not next(layer for layer in report.layers if layer.name == "model.multi_modal_projector").passed
    assert next(layer for layer in report.layers if layer.name == "model.vision_tower").passed
    monkeypatch.setattr(ops, "pixel_shuffle_mlp", lambda *a, **k: right(*a, **k)[:, :, :-1])
    with pytest.raises(ValueError, match="rows"):
        verify(model, batch, rounds=0)
    assert not [m for m in model.modules() if "_ivl" in vars(m)]


def test_only_an_unpatched_model():
    model, batch = make("native")
    patch(model)
    with pytest.raises(ValueError, match="got a patched model"):
        verify(model, batch)
