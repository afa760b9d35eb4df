"""The vision transformer's attention on the package's kernel."""

import copy

import pytest
import torch
from torch import nn

import ivl_kernels
from ivl_kernels import ops
from ivl_kernels.integrations import attention as adapter
from ivl_kernels.integrations._patch import features
from ivl_kernels.testing import assert_accurate
from tests.models import chat_model, inputs, native_model

BATCH = ((2,), (1, 1), ())


def patch(model, **options):
    others = {n: False for n, f in features().items() if n != "attention" and not f.option}
    return ivl_kernels.patch(model, attention=True, **others, **options)


@pytest.fixture
def calls(monkeypatch):
    seen = []
    monkeypatch.setattr(adapter, "attention", lambda *a, **k: seen.append(a[0].shape) or ops.attention(*a, **k))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_answers_and_gradients(dtype, calls):
    model = native_model("qwen3", dtype=dtype)
    pixels = inputs(BATCH, dtype=dtype)["pixel_values"]
    vision = model.model.vision_tower
    wide = copy.deepcopy(vision).double()

    def run(module, x):
        module.zero_grad(set_to_none=True)
        out = module(pixel_values=x).last_hidden_state
        out.float().square().mean().backward()
        return out.detach(), {name: p.grad for name, p in module.named_parameters()}

    exact, wide_grads = run(wide, pixels.double())
    plain, grads = run(vision, pixels)
    handle = patch(model, strict=True)
    got, ours = run(vision, pixels)
    assert len(calls) == len(vision.encoder.layer) and handle.report().patched[0].detail.startswith("native")
    assert_accurate(got, exact, plain)
    for name, grad in grads.items():
        assert (grad is None) == (ours[name] is None), name
        if grad is not None:
            error, usual = ((g.double() - wide_grads[name]).norm() for g in (ours[name], grad))
            assert error <= 2 * usual + 1e-6 * wide_grads[name].norm(), name
    handle.undo()
    assert torch.equal(vision(pixel_values=pixels).last_hidden_state, plain)


@torch.no_grad()
def test_what_else_was_chosen_is_upstreams(calls):
    model = native_model("qwen3")
    pixels = inputs(BATCH)["pixel_values"]
    vision = model.model.vision_tower
    handle = patch(model)
    model.set_attn_implementation("eager")
    expected = native_model("qwen3")
    expected.set_attn_implementation("eager")
    plain = expected.model.vision_tower(pixel_values=pixels).last_hidden_state
    assert torch.equal(vision(pixel_values=pixels).last_hidden_state, plain)
    assert not calls and "eager was chosen" in str(handle.report())
    handle.undo()
    assert [row.state for row in patch(model).report().rows if row.feature == "attention"] == ["refused"]
    model.set_attn_implementation("sdpa")
    patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        vision(pixel_values=pixels)
    assert not calls
    vision(pixel_values=pixels)
    assert calls and set(calls) == {(len(pixels), 65, 2, 16)}


def test_remote_code_computes_attention_itself():
    with pytest.warns(UserWarning, match="nothing was patched"):
        handle = patch(chat_model("hub"))
    (row,) = [row for row in handle.report().rows if row.feature == "attention"]
    assert row.state == "refused" and "does not choose its attention" in row.detail


@torch.no_grad()
def test_tokens_with_everything():
    model, batch = native_model("qwen3"), inputs(BATCH)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    tokens = model.generate(**batch, **options)
    ivl_kernels.patch(model, attention=True, linear=True)
    assert torch.equal(model.generate(**batch, **options), tokens)


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
def test_a_function_of_somebody_else_under_this_name(before, calls, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = native_model("qwen3")
    pixels = inputs(BATCH)["pixel_values"]
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def twice(*args, **kwargs):
        out, weights = stock(*args, **kwargs)
        return 2 * out, weights

    if not before:
        patch(model)
    ALL_ATTENTION_FUNCTIONS.register("sdpa", twice)
    try:
        if before:
            patch(model)
        got = model.model.vision_tower(pixel_values=pixels).last_hidden_state
        expected = native_model("qwen3").model.vision_tower(pixel_values=pixels).last_hidden_state
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", stock)
    assert torch.equal(got, expected) and not calls


def taken(q, *rest, **options):
    """Whether the call is upstream's."""
    attend = adapter._attend(lambda *a, **k: "stock", "")
    return attend(None, q, q, q, *rest, **options) == "stock"


def test_only_plain_attention_is_served():
    q = torch.randn(2, 3, 5, 16)
    assert not taken(q, is_causal=False) and not taken(q, is_causal=False, dropout=0.0, scaling=0.3)
    for options in ({}, dict(is_causal=None), dict(is_causal=True), dict(is_causal=False, dropout=0.1)):
        assert taken(q, **options)
    assert taken(q, torch.zeros(5, 5), is_causal=False) and taken(q, None, 1, is_causal=False)
    for width in (0, 12, 264):
        assert taken(torch.randn(2, 3, 5, width), is_causal=False)
    for x in (q[0], q.double(), nn.Parameter(q), q.to("meta")):
        assert taken(x, is_causal=False)
