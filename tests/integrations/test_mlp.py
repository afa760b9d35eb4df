"""MLPs of the models in one op, on a processor whose own product is the faster one."""

import copy

import pytest
import torch
from torch import nn

import ivl_kernels
from ivl_kernels import ops
from ivl_kernels.integrations import mlp as adapter
from ivl_kernels.integrations._patch import features
from ivl_kernels.testing import assert_accurate
from tests.integrations.test_linear import NAMES, make
from tests.models import CHAT_KINDS


@pytest.fixture(autouse=True)
def own(monkeypatch):
    monkeypatch.setenv("IVL_CPU_LINEAR", "own")


@pytest.fixture
def calls(monkeypatch):
    seen = []
    for name in ("mlp", "gated_mlp"):
        real = getattr(ops, name)
        monkeypatch.setattr(adapter, name, lambda *a, real=real, name=name, **k: seen.append(name) or real(*a, **k))
    return seen


def patch(model, **options):
    others = {n: False for n, f in features().items() if n != "mlp" and not f.option}
    return ivl_kernels.patch(model, mlp=True, **others, **options)


def wider(name, batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_same_answers(name, dtype, calls):
    model, batch = make(name, dtype)
    plain = model(**batch).logits
    wide, wide_batch = make(name)
    wide.load_state_dict(model.float().state_dict())
    exact = wide.double()(**wider(name, wide_batch)).logits
    model.to(dtype)
    handle = patch(model, strict=True)
    got = model(**batch).logits
    seen = batch["attention_mask"].bool()
    assert_accurate(got[seen], exact[seen], plain[seen])
    gated = "moe" not in name
    assert set(calls) == ({"mlp", "gated_mlp"} if gated else {"mlp"}) and len(calls) == 2 * len(set(calls))
    handle.undo()
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients(checkpointing, frozen):
    model, batch = make("qwen3")
    model.train()
    model.model.vision_tower.requires_grad_(not frozen)

    def gradients(model):
        model.zero_grad(set_to_none=True)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients(model)
    patch(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    got = gradients(model)
    for name, grad in expected.items():
        assert (grad is None) == (got[name] is None), name
        if grad is not None:
            torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_tokens_and_copies():
    model, batch = make("qwen3")
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    tokens = model.generate(**batch, **options)
    patch(model)
    assert torch.equal(model.generate(**batch, **options), tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(**batch, **options), tokens)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: mlp.up_proj.register_forward_hook(lambda module, args, out: 2 * out),
        lambda mlp: mlp.act_fn.register_forward_hook(lambda module, args, out: 2 * out),
        lambda mlp: nn.utils.parametrize.register_parametrization(mlp.up_proj, "weight", nn.Tanh()),
        lambda mlp: setattr(mlp, "act_fn", nn.ReLU()),
        lambda mlp: setattr(mlp, "down_proj", nn.Linear(mlp.down_proj.in_features, 48)),
        lambda mlp: setattr(mlp.gate_proj, "forward", lambda x: nn.functional.linear(x, 2 * mlp.gate_proj.weight)),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_layers_that_are_others(change, before, calls):
    models = make("qwen3")[0], make("qwen3")[0]
    x = torch.randn(2, 20, 48)
    torch.manual_seed(1)
    change(models[0].model.language_model.layers[0].mlp)
    if not before:
        patch(models[1])
    torch.manual_seed(1)
    change(models[1].model.language_model.layers[0].mlp)
    if before:
        patch(models[1])
    assert torch.equal(*(model.model.language_model.layers[0].mlp(x) for model in models))
    assert not calls
    models[1].model.language_model.layers[1].mlp(x)
    assert calls == ["gated_mlp"]


@torch.no_grad()
def test_what_is_upstreams(calls, monkeypatch):
    model, _ = make("qwen3")
    mlp = model.model.language_model.layers[0].mlp
    handle = patch(model)
    x = torch.randn(2, 20, 48)
    with torch.autocast("cpu", torch.bfloat16):
        mlp(x)
    torch.compile(mlp, backend="eager")(x)
    torch.func.vmap(mlp)(x)
    with pytest.raises(RuntimeError, match="dtype"):  # upstream's own error
        mlp(x.double())
    monkeypatch.setenv("IVL_CPU_LINEAR", "blas")
    mlp(x)
    assert not calls and "more: BLAS" in str(handle.report())
    monkeypatch.setenv("IVL_CPU_LINEAR", "own")
    mlp(x)
    assert calls == ["gated_mlp"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "gpt_oss", *CHAT_KINDS])
def test_everything_by_default(name):
    """All defaults, the package's own products among them."""
    model, batch = make(name)
    plain = model(**batch).logits
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    asked = {k: v for k, v in batch.items() if k != "image_flags"}
    tokens = model.generate(**asked, **options)
    handle = ivl_kernels.patch(model, strict=True)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[seen], plain[seen], rtol=0, atol=2e-5)
    assert torch.equal(model.generate(**asked, **options), tokens)
    handle.undo()
    assert torch.equal(model(**batch).logits, plain)
