"""RMSNorms of the models in one pass."""

import copy

import pytest
import torch
from torch import nn
from transformers import InternVLForConditionalGeneration

import ivl_kernels
from ivl_kernels import ops
from ivl_kernels.integrations import norms as adapter
from ivl_kernels.integrations._patch import features
from ivl_kernels.testing import assert_accurate, tiny
from tests.integrations.test_linear import NAMES, make


@pytest.fixture(autouse=True)
def every_row(monkeypatch):
    monkeypatch.setattr(adapter, "_FEW", 0)


@pytest.fixture
def calls(monkeypatch):
    seen = []
    monkeypatch.setattr(adapter, "fused", lambda *a, **k: seen.append(a[0].shape) or ops.rms_norm(*a, **k))
    return seen


def patch(model, **options):
    others = {n: False for n, f in features().items() if n != "norms" and not f.option}
    return ivl_kernels.patch(model, norms=True, **others, **options)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*NAMES, "gpt_oss"])
def test_same_answers(name, dtype, calls):
    model, batch = make(name, dtype)
    plain = model(**batch).logits
    wide, wide_batch = make(name)
    wide.load_state_dict(model.float().state_dict())
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # the others have no float64
    exact = wide.double()(**{k: v.double() if v.is_floating_point() else v for k, v in wide_batch.items()}).logits
    model.to(dtype)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    asked = {k: v for k, v in batch.items() if k != "image_flags"}
    tokens = model.generate(**asked, **options)
    handle = patch(model, strict=True)
    got = model(**batch).logits
    assert len(calls) >= 2 * 2 + 1
    seen = batch["attention_mask"].bool()
    assert_accurate(got[seen], exact[seen], plain[seen])
    if dtype == torch.float32:
        assert torch.equal(model.generate(**asked, **options), tokens)
    handle.undo()
    assert torch.equal(model(**batch).logits, plain)


def test_vision_transformers_with_rms_norm(calls):
    """InternViT-6B's: layers' and q/k norms; forward and gradients."""
    vision = tiny.vision_config(norm_type="rms_norm", use_qk_norm=True)
    model = tiny.randomize(InternVLForConditionalGeneration(tiny.native_config(vision=vision))).eval()
    tower, pixels = model.model.vision_tower, torch.randn(2, 3, 64, 64)
    wide = copy.deepcopy(tower).double()

    def run(module, x):
        module.zero_grad(set_to_none=True)
        out = module(pixel_values=x).last_hidden_state
        out.square().mean().backward()
        return out.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}

    exact, plain = run(wide, pixels.double()), run(tower, pixels)
    patch(model)
    got = run(tower, pixels)
    assert len(calls) == 2 * 4
    assert_accurate(got[0], exact[0], plain[0])
    assert set(got[1]) == set(plain[1])
    for name, grad in plain[1].items():
        error, usual = ((g.double() - exact[1][name]).norm() for g in (got[1][name], grad))
        assert error <= 2 * usual + 1e-6 * exact[1][name].norm(), name


@torch.no_grad()
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.register_forward_hook(lambda module, args, out: 2 * out),
        lambda norm: nn.utils.parametrize.register_parametrization(norm, "weight", nn.Tanh()),
        lambda norm: norm.double(),
        lambda norm: setattr(norm, "forward", lambda x: 3 * x),
    ],
)
def test_norms_that_are_others(change, before, calls):
    models = make("qwen3")[0], make("qwen3")[0]
    x = torch.randn(2, 20, 48)
    change(models[0].model.language_model.norm)
    if before:
        change(models[1].model.language_model.norm)
        patch(models[1])
    else:
        patch(models[1])
        change(models[1].model.language_model.norm)
    assert torch.equal(*(model.model.language_model.norm(x) for model in models)) and not calls
    models[1].model.language_model.layers[0].input_layernorm(x)
    assert calls


@torch.no_grad()
def test_what_is_upstreams(calls, monkeypatch):
    model, _ = make("qwen3")
    norm = model.model.language_model.norm
    patch(model)
    x = torch.randn(2, 20, 48)
    plain = type(norm).forward(norm, x)
    torch.compile(norm, backend="eager")(x)
    torch.func.vmap(norm)(x)
    norm(x.double())
    monkeypatch.setattr(adapter, "_FEW", 40)
    norm(x)
    assert not calls
    monkeypatch.setattr(adapter, "_FEW", 39)
    norm(x)
    assert calls
    monkeypatch.setattr(type(norm), "forward", lambda self, x: -x)
    assert torch.equal(norm(x), -x) and not torch.equal(plain, -x)
