"""The training seam of ViCO: which parameters get gradients, and what is sampled."""

import pytest
import torch

from ivl_kernels.flash import score_images, score_tiles
from ivl_kernels.nn import FlashVision, RatioWindow, ViCO
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


def answers(batch):
    labels = batch["input_ids"].clone()
    labels[:, :-5] = -100
    return labels


def logits_of(model, batch, compress):
    """Packed logits and labels of a Flash forward at given ratios, plain torch from there on."""
    with torch.no_grad():
        out = ViCO(model, 1)(**batch, labels=answers(batch), compress=compress)
    return out.outputs.logits.double(), out.inputs.packed.labels


def divergences(reference, model, batch, compress):
    """[B] by hand."""
    zr, labels_r = logits_of(reference, batch, torch.zeros_like(compress))
    zp, labels_p = logits_of(model, batch, compress)
    means = []
    for row in range(len(zr)):
        q = zr[row][:-1][labels_r[row][1:] != -100].log_softmax(-1)
        p = zp[row][:-1][labels_p[row][1:] != -100].log_softmax(-1)
        means.append((q.exp() * (q - p)).sum(-1).mean())
    return torch.stack(means)


@pytest.mark.parametrize("kind", ["chat", "native"])
def test_consistency_loss(kind):
    (model, batch, flash), (reference, _, _) = build(kind), build(kind)
    with torch.no_grad():
        for p in flash.mlp2.parameters():
            p.mul_(1.2)
    compress = torch.tensor([True, True, True, False, False, True])
    vico = ViCO(model, 1, reference=reference.train())
    out = vico.loss(**batch, labels=answers(batch), compress=compress)
    torch.testing.assert_close(
        out.loss.double(), divergences(reference, model, batch, compress).mean(), rtol=1e-4, atol=1e-6
    )
    assert reference.training
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in flash.mlp2.parameters())
    assert all(p.grad is None for p in reference.parameters())
    full = vico.loss(**batch, labels=answers(batch), compress=torch.zeros_like(compress))
    assert full.loss.item() < 1e-5  # the reference itself
    sampled = ViCO(model, 1, reference=reference, generator=torch.Generator().manual_seed(1))
    state = sampled.state_dict()
    first = sampled.loss(**batch, labels=answers(batch)).compress
    sampled.load_state_dict(state)
    assert torch.equal(sampled.loss(**batch, labels=answers(batch)).compress, first)


@pytest.mark.parametrize("scorer", [score_images, score_tiles])
def test_router_loss(scorer):
    (model, batch, _), (reference, _, _) = build("native"), build("native")
    with torch.no_grad():  # at 1/4 the policy is near the reference, not on it
        model.lm_head.weight.mul_(1.02)
    window = RatioWindow(100, min_count=3)
    vico = ViCO(model, 2, reference=reference, window=window, scorer=scorer)
    out = vico.loss(**batch, labels=answers(batch))
    full = divergences(reference, model, batch, torch.zeros(6, dtype=torch.bool))
    row = [0, 0, 0, 0, 1, 1]
    for tile in range(6):
        compress = torch.zeros(6, dtype=torch.bool)
        same = [[0, 1, 2], [3], [4, 5]]
        compress[next(s for s in same if tile in s) if scorer is score_images else tile] = True
        expected = (divergences(reference, model, batch, compress) / full)[row[tile]]
        assert float(out.ratios[tile]) == pytest.approx(float(expected), rel=2e-2)
    threshold = out.ratios.median() if scorer is score_tiles else None
    assert set(out.labels.tolist()) <= {0, 1} and (threshold is None or 0 < int(out.labels.sum()) < 6)
    torch.testing.assert_close(out.labels, (out.ratios >= window.threshold).long())
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("gating" in name and used(name)), name
    other = ViCO(build("native")[0], 2, reference=reference, window=RatioWindow(100, min_count=3))
    other.load_state_dict(vico.state_dict())
    assert other.window.threshold == window.threshold
    with pytest.raises(ValueError, match="got one of stage 2"):
        ViCO(reference, 1).load_state_dict(vico.state_dict())


def test_no_labels_before_the_window_is_filled():
    (model, batch, _), (reference, _, _) = build("native"), build("native")
    vico = ViCO(model, 2, reference=reference, scorer=lambda vico, losses, image, row: torch.ones(len(row)))
    out = vico.loss(**batch, labels=answers(batch))
    assert out.labels.tolist() == [-100] * 6 and float(out.loss) == 0
    vico.scorer = lambda vico, losses, image, row: torch.ones(2)
    with pytest.raises(ValueError, match=r"scorer: gave \[2\], expected a ratio for each of 6 tiles"):
        vico.loss(**batch, labels=answers(batch))


def test_reference_is_needed():
    model, batch, _ = build("native")
    with pytest.raises(ValueError, match="reference: got None"):
        ViCO(model, 1).loss(**batch, labels=answers(batch))
    with pytest.raises(ValueError, match="reference: got the model itself"):
        ViCO(model, 1, reference=model)
    reference = build("native")[0]
    model.lm_head = torch.nn.Linear(48, 300)
    with pytest.raises(ValueError, match="head has a bias"):
        ViCO(model, 1, reference=reference).loss(**batch, labels=answers(batch))
