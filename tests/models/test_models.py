"""The stand-ins behave as the remote code was seen to behave."""

import random

import pytest
import torch

from tests.models import FAMILIES, chat_inputs, chat_model, inputs, native_model

GREEDY = dict(max_new_tokens=4, do_sample=False)
FLASH = (0.3, 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_native(family):
    model, batch = native_model(family), inputs(((2, 1), (), (1,)))
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
        other = model(**{**batch, "pixel_values": batch["pixel_values"] + 1}).logits
    assert (model(**batch).logits - other).abs().max() > 0.1
    assert model.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 4


@pytest.mark.parametrize("kind", ["repo", "hub"])
@pytest.mark.parametrize("select_layer", [-1, -2])
@pytest.mark.parametrize("ps_version", ["v1", "v2"])
@pytest.mark.filterwarnings("ignore:ps_version")
def test_chat(kind, select_layer, ps_version):
    model = chat_model(kind, select_layer=select_layer, ps_version=ps_version)
    batch = chat_inputs(model, ((2, 1), (1,)))
    assert model.generate(**batch, **GREEDY).shape == (2, 4)
    features = model.extract_feature(batch["pixel_values"])
    assert torch.equal(model.generate(**batch, visual_features=features, **GREEDY), model.generate(**batch, **GREEDY))
    batch = chat_inputs(model, ((2, 1), (1,)), flags=True)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert (model.mlp1[1].weight.grad is not None) and (kind == "repo" or model.mlp2[1].weight.grad is None)
    with pytest.raises(Exception):  # noqa: B017
        model(**batch, return_dict=False)
    with pytest.raises(AttributeError):
        model(**{**batch, "image_flags": None})


@pytest.mark.parametrize("kind", ["repo", "hub"])
def test_chat_without_token_id(kind):
    model = chat_model(kind)
    batch = chat_inputs(model, flags=True)
    model.img_context_token_id = None
    with pytest.raises(AssertionError):
        model.generate(input_ids=batch["input_ids"])
    with pytest.raises(AttributeError):
        model(**batch)


def test_chat_counts(capsys):
    """More tiles than placeholders, and fewer."""
    for kind in ("repo", "hub"):
        model = chat_model(kind)
        batch = chat_inputs(model, flags=True)
        right = model(**batch, labels=batch["input_ids"])
        more = {k: torch.cat([batch[k], batch[k][:1]]) for k in ("pixel_values", "image_flags")}
        fewer = {k: batch[k][:1] for k in ("pixel_values", "image_flags")}
        out = model(**{**batch, **more}, labels=batch["input_ids"])
        if kind == "repo":
            assert torch.equal(out.logits, right.logits) and out.loss == 0
            with pytest.raises(RuntimeError):
                model(**{**batch, **fewer})
        else:
            less = model(**{**batch, **fewer}, labels=batch["input_ids"])
            assert torch.equal(out.logits, less.logits) and not torch.equal(out.logits, right.logits)
            assert out.loss == less.loss != 0
        assert "warning" in capsys.readouterr().out
        with pytest.raises(RuntimeError):
            model.generate(**{**batch, **{"pixel_values": more["pixel_values"]}})


def test_flash():
    model = chat_model("hub", flash=FLASH)
    batch = chat_inputs(model, ((2, 1),))
    lengths = []
    model.language_model.register_forward_pre_hook(
        lambda m, a, k: lengths.append(k["inputs_embeds"].shape[1] if k.get("inputs_embeds") is not None else 1),
        with_kwargs=True,
    )
    random.seed(0)
    expected = random.random(), random.random()
    random.seed(0)
    model.generate(**batch, **GREEDY)
    assert random.random() == expected[1]
    dropped = batch["input_ids"].shape[1] - lengths[0]
    assert dropped % 192 == 0 and dropped > 0
    lengths.clear()
    model.flash_mode = False
    model.generate(**batch, **GREEDY)
    assert lengths[0] == batch["input_ids"].shape[1]
    model.flash_mode = True
    with pytest.raises(RuntimeError):
        model.generate(**chat_inputs(model, ((1,), (1,))))
    with pytest.raises(UnboundLocalError):
        model.generate(**batch, visual_features=torch.zeros(3, 256, 48))
    holes = {**batch, "attention_mask": batch["attention_mask"].clone()}
    holes["attention_mask"][0, 0] = 0
    with pytest.raises(AssertionError):
        model.generate(**holes)
    assert model.generate(input_ids=batch["input_ids"][:, :4], attention_mask=torch.ones(1, 4), **GREEDY).shape == (
        1,
        4,
    )
