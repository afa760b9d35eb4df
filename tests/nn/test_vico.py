"""The training seam of ViCO: which parameters get gradients, and what is sampled."""

import pytest
import torch

from ivl_kernels.nn import FlashVision, ViCO
from tests.models import chat_inputs, chat_model, inputs, native_model, randomize

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
TILES = ((3, 1), (2,))


def build(kind):
    if kind == "chat":
        model = chat_model("hub", flash=(0.3, 0.1))
        return model, chat_inputs(model, TILES), model
    model = native_model()
    randomize(flash := FlashVision(32, 48, 0.3, 0.1), seed=3)
    flash.attach(model)
    return model, inputs(TILES), flash


def used(name):
    """attn3, attn4, norm3 and norm4 of the pooling never run."""
    return not any(f"pooling_before_gating.{kind}{i}" in name for kind in ("attn", "norm") for i in (3, 4))


@pytest.mark.parametrize("kind", ["chat", "native"])
@pytest.mark.parametrize("training", [False, True])
def test_stage_one(kind, training):
    model, batch, flash = build(kind)
    model.train(training)
    vico = ViCO(model, 1, generator=torch.Generator().manual_seed(1))
    compress = torch.tensor([True, True, True, False, True, True])
    labels = batch["input_ids"]
    out = vico(**batch, labels=labels, loss_weights=torch.rand(labels.shape), compress=compress)
    assert out.outputs.logits.shape[:2] == out.inputs.packed.labels.shape == out.inputs.packed.loss_weights.shape
    assert out.router_logits is None
    out.outputs.loss.backward()
    for name, parameter in model.named_parameters():
        router = "gating" in name
        # The class token of the last layer reaches nothing, but its parameters do.
        assert (parameter.grad is None) == router, name
        assert router or torch.isfinite(parameter.grad).all(), name
    full = model.mlp1 if kind == "chat" else model.model.multi_modal_projector
    for projector in (full, flash.mlp2):
        assert all(p.grad.abs().sum() > 0 for p in projector.parameters())


def test_stage_one_gradients_equal_plain_torch():
    """The projector op against the modules themselves."""
    model, batch, flash = build("native")
    compress = torch.tensor([True, False, True, False, True, False])
    grads = []
    for hooked in (False, True):
        model.zero_grad()
        if hooked:  # a hook makes the projectors be called instead of read
            for layer in (flash.mlp2[1], model.model.multi_modal_projector.linear_1):
                layer.register_forward_hook(lambda m, a, out: None)
        ViCO(model, 1)(**batch, labels=batch["input_ids"], compress=compress).outputs.loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_one_ratio_an_image():
    model, batch, _ = build("native")
    draws = set()
    for seed in range(20):
        vico = ViCO(model, 1, generator=torch.Generator().manual_seed(seed))
        sample = vico.sample(batch["input_ids"], batch["attention_mask"]).tolist()
        again = ViCO(model, 1, generator=torch.Generator().manual_seed(seed))
        assert again.sample(batch["input_ids"], batch["attention_mask"]).tolist() == sample
        assert len(set(sample[:3])) == 1 and len(set(sample[4:])) == 1
        draws.add(tuple(sample))
    assert len(draws) > 4


@pytest.mark.parametrize("kind", ["chat", "native"])
def test_stage_two(kind):
    model, batch, _ = build(kind)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    vico = ViCO(model, 2)
    for decided in (torch.ones(6, dtype=torch.bool), None):
        out = vico(**batch, labels=batch["input_ids"], compress=decided)
        assert out.router_logits.shape == (6, 2) and out.router_logits.requires_grad
        assert not out.outputs.logits.requires_grad and torch.isfinite(out.outputs.loss)
    torch.nn.functional.cross_entropy(out.router_logits, torch.tensor([0, 1, 0, 1, 0, 1])).backward()
    for name, parameter in model.named_parameters():
        router = "gating" in name
        assert parameter.requires_grad == router, name
        assert (parameter.grad is None) == (not (router and used(name))), name
    vico.restore()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_wrong_stage():
    with pytest.raises(ValueError, match="stage: got 3"):
        ViCO(native_model(), 3)
    with pytest.raises(TypeError, match="FlashVision attached"):
        ViCO(native_model(), 2)
