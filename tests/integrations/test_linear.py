"""Linear layers of the models on the package's own product, or on the BLAS where that is asked for or faster."""

import copy

import pytest
import torch
from torch import nn

import ivl_kernels
from ivl_kernels import ops
from ivl_kernels._plan import counted
from ivl_kernels.integrations import linear as adapter
from ivl_kernels.integrations._patch import features
from ivl_kernels.ops.linear import choice
from ivl_kernels.testing import assert_accurate
from tests.models import CHAT_KINDS, chat_inputs, chat_model, inputs, native_model

BATCH = ((2,), (1, 1), ())
NAMES = ["qwen2", "qwen3", *CHAT_KINDS]


@pytest.fixture(autouse=True)
def own(monkeypatch):
    monkeypatch.setenv("IVL_CPU_LINEAR", "own")


def make(name, dtype=torch.float32):
    if name in CHAT_KINDS:
        model = chat_model(name).to(dtype)
        return model, {
            k: v.to(dtype) if v.is_floating_point() else v for k, v in chat_inputs(model, BATCH, flags=True).items()
        }
    return native_model(name, dtype=dtype), inputs(BATCH, dtype=dtype)


def patch(model, **options):
    others = {n: False for n, f in features().items() if n != "linear" and not f.option}
    return ivl_kernels.patch(model, linear=True, **others, **options)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_same_answers(name, dtype):
    model, batch = make(name, dtype)
    plain = model(**batch).logits
    wide, wide_batch = make(name)
    exact = (
        wide.load_state_dict(model.float().state_dict())
        and wide.double()(**{k: v.double() if v.is_floating_point() else v for k, v in wide_batch.items()}).logits
    )
    model.to(dtype)
    handle = patch(model, strict=True)
    got = model(**batch).logits
    seen = batch["attention_mask"].bool()
    assert_accurate(got[seen], exact[seen], plain[seen])
    handle.undo()
    assert torch.equal(model(**batch).logits, plain)


def test_every_plain_layer_is_served(monkeypatch):
    model, batch = make("qwen3")
    layers = [
        m
        for root in (model.model.vision_tower, model.model.language_model, model.lm_head)
        for m in root.modules()
        if type(m) is nn.Linear
    ]
    calls = []
    monkeypatch.setattr(adapter, "linear", lambda x, w, b, **k: calls.append(id(w)) or ops.linear(x, w, b, **k))
    patch(model)
    model(**batch)
    assert sorted(calls) == sorted(id(layer.weight) for layer in layers)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing):
    model, batch = make("qwen3")
    model.train()

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
def test_other_layers_and_calls_are_upstreams(monkeypatch):
    from peft import LoraConfig, inject_adapter_in_model

    model, batch = make("qwen3")
    text = model.model.language_model
    seen = []
    text.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    expected = model(**batch).logits
    handle = patch(model)
    got = model(**batch).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=2e-5)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), text)
    with_lora = model(**batch).logits
    handle.undo()
    torch.testing.assert_close(model(**batch).logits, with_lora, rtol=0, atol=2e-5)
    patch(model)
    monkeypatch.setattr(adapter, "linear", lambda *a, **k: pytest.fail("served"))
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    torch.compile(model.model.vision_tower.encoder.layer[0].mlp.fc1, backend="eager")(torch.randn(3, 32))
    with pytest.raises(RuntimeError, match="dtype"):  # upstream's own error
        model.lm_head(torch.randn(2, 48, dtype=torch.float64))


def test_whose_product(monkeypatch):
    assert choice.own(torch.float32, 5)
    monkeypatch.setenv("IVL_CPU_LINEAR", "blas")
    assert not choice.own(torch.float32, 5)
    model, batch = make("qwen3")
    expected = model(**batch).logits
    handle = patch(model)
    assert torch.equal(model(**batch).logits, expected)
    assert "BLAS" in str(handle.report())
    monkeypatch.setenv("IVL_CPU_LINEAR", "auto")
    assert choice.own(torch.float32, 300) in (True, False)
    monkeypatch.setenv("IVL_CPU_LINEAR", "fastest")
    with pytest.raises(ValueError, match="IVL_CPU_LINEAR: got 'fastest', expected auto, own or blas"):
        choice.own(torch.float32, 5)


def test_a_language_model_alone_and_nothing_to_serve():
    import transformers

    from ivl_kernels.testing import tiny

    text = transformers.Qwen3ForCausalLM(tiny.text_config("qwen3")).eval()
    ids = torch.randint(1, 280, (2, 9))
    expected = text(ids).logits
    patch(text, strict=True)
    torch.testing.assert_close(text(ids).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ivl_kernels.integrations.PatchError, match="linear"):
        patch(nn.Linear(2, 2), strict=True)


def test_a_layer_takes_what_it_took():
    model, _ = make("qwen3")
    layer = model.model.language_model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 48)
    plain = layer(x)
    patch(model)
    torch.testing.assert_close(layer(input=x), plain, rtol=0, atol=1e-5)
    with torch.no_grad():
        out = layer(x)
    out.mul_(torch.ones(1, requires_grad=True)).sum().backward()
    y = layer(x.requires_grad_()).pow(3).sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_who_changes_or_counts_layers_is_respected(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = make("qwen3")

    def flops():
        with FlopCounterMode(display=False) as counter:
            model(**batch)
        return counter.get_total_flops()

    plain = flops()
    patch(model)
    assert flops() == plain
    torch.set_default_device("cpu")  # which is a mode as well
    try:
        assert not counted()
    finally:
        torch.set_default_device(None)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch.ones(*x.shape[:-1], self.out_features))
    assert bool((model.lm_head(torch.randn(2, 48)) == 1).all())


@torch.no_grad()
def test_a_bias_of_another_shape_is_upstreams():
    layer = nn.Linear(8, 6)
    layer.bias = nn.Parameter(torch.ones(1))  # which plain torch broadcasts
    x = torch.randn(3, 8)
    expected = layer(x)
    assert torch.equal(adapter._forward("")(nn.Linear.forward, layer, x), expected)
    assert not adapter._serves(x, layer.weight, layer.bias) and adapter._serves(x, layer.weight, None)
