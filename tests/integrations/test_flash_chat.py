"""Patched Flash generation of the remote-code model, against the shipped path."""

import copy
import random

import pytest
import torch

import ivl_kernels
from ivl_kernels.testing import poisoned
from ivl_kernels.testing.shipped import shipped_decision
from tests.models import chat_inputs, chat_model

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:ps_version")
GREEDY = dict(max_new_tokens=5, do_sample=False)
FLASH = (0.3, 0.1)


def model_and(tiles, **changes):
    model = chat_model("hub", **{"flash": FLASH, **changes})
    return model, chat_inputs(model, tiles)


def row(batch, b, tiles):
    """Row b of a batch by itself, without its padding; `tiles` of every row."""
    present = batch["attention_mask"][b].bool()
    one = {k: batch[k][b : b + 1, present] for k in ("input_ids", "attention_mask")}
    first = sum(tiles[:b])
    if tiles[b]:
        one["pixel_values"] = batch["pixel_values"][first : first + tiles[b]]
    return one


@pytest.mark.parametrize("tiles", [((1,),), ((3,),), ((2, 1),), ((1, 1, 1, 1),)])
@pytest.mark.parametrize("changes", [{}, {"ps_version": "v1"}, {"family": "qwen2"}, {"flash": (0.0, 0.0)}])
def test_batch_of_one_equals_shipped(tiles, changes):
    model, batch = model_and(tiles, **changes)
    random.seed(1)
    expected, drawn = model.generate(**batch, **GREEDY), random.random()
    handle = ivl_kernels.patch(model)
    random.seed(1)
    with poisoned():
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
    assert random.random() == drawn
    routing = handle.last_routing()
    assert [len(image.scores) for image in routing.images] == list(tiles[0])
    small, full, gate = model.extract_feature_flash(batch["pixel_values"], torch.ones(sum(tiles[0]), dtype=torch.int64))
    decided = shipped_decision(gate, model.flash_relative_threshold, model.flash_absolute_threshold)
    assert [c for image in routing.images for c in image.compressed] == decided.tolist()
    assert routing.images[0].grid == ((1, 1) if tiles[0][0] == 1 else None)
    assert routing.images[0].thumbnail == (tiles[0][0] > 1)
    assert f"{int(decided.sum())} of {sum(tiles[0])} tiles" in str(handle.report())


def test_router_as_shipped_bit_for_bit():
    model, batch = model_and(((5,),))
    model.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    _, _, gate = model.extract_feature_flash(batch["pixel_values"], torch.ones(5, dtype=torch.int64))

    def scores(**options):
        with ivl_kernels.patched(model, **options) as handle:
            model.generate(**batch, **GREEDY)
            row = next(row for row in handle.report().rows if row.feature == "flash")
            assert ("as shipped" in row.what) == ("flash_folded" in options)
            return handle.last_routing().images[0].scores

    vision = dict(attention=False, norms=False, mlp=False, linear=False)  # the tokens that the router sees, bit for bit
    assert scores(flash_folded=False, backend="cpu", **vision) == gate[:, 0].tolist()
    assert scores() != gate[:, 0].tolist()


def test_what_the_language_model_sees():
    model, batch = model_and(((4,),))
    seen = []

    def record(module, args, kwargs):
        seen.append(kwargs)

    model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    options = dict(**GREEDY, return_dict_in_generate=True, output_logits=True)
    expected, first = model.generate(**batch, **options), seen[0]
    seen.clear()
    ivl_kernels.patch(model)
    got = model.generate(**batch, **options)
    torch.testing.assert_close(seen[0]["inputs_embeds"], first["inputs_embeds"], rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[0]["position_ids"], first["position_ids"])
    assert (seen[0].get("attention_mask") is None) == (first.get("attention_mask") is None)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_each_row_as_if_alone(padding):
    tiles = ((2,), (), (1, 3), (1,))
    model = chat_model("hub", flash=FLASH)
    batch = chat_inputs(model, tiles, padding=padding)
    counts = [sum(t) for t in tiles]
    expected = [model.generate(**row(batch, b, counts), **GREEDY) for b in range(len(tiles))]
    handle = ivl_kernels.patch(model)
    got = model.generate(**batch, **GREEDY)
    assert torch.equal(got, torch.cat(expected))
    together = [image.compressed for image in handle.last_routing().images]
    alone = []
    for b in (0, 2, 3):
        model.generate(**row(batch, b, counts), **GREEDY)
        alone += [image.compressed for image in handle.last_routing().images]
    assert together == alone and any(map(any, alone))


def test_read_at_call_time():
    model, batch = model_and(((4,),))
    handle = ivl_kernels.patch(model)
    model.generate(**batch, **GREEDY)
    before = sum(handle.last_routing().images[0].compressed)
    model.flash_relative_threshold = 0.9
    model.generate(**batch, **GREEDY)
    assert 0 < sum(handle.last_routing().images[0].compressed) < before
    model.flash_mode = False
    plain = model.generate(**batch, **GREEDY)
    handle.undo()
    assert torch.equal(model.generate(**batch, **GREEDY), plain)


def test_what_raised_raises():
    model, batch = model_and(((2, 1),))
    ivl_kernels.patch(model)
    without = {k: v for k, v in batch.items() if k != "attention_mask"}
    holes = batch["attention_mask"].clone()
    holes[0, 0] = 0
    cut = batch["input_ids"].clone()
    cut[0, 20] = 3
    text = torch.full_like(batch["input_ids"], 3)
    state = random.getstate()
    for change, message in (
        ({"attention_mask": holes}, "1 zeros in a batch of one"),
        ({"input_ids": cut}, "row 0 has a run of"),
        ({"pixel_values": batch["pixel_values"][:2]}, "got 2 decisions for 3 tiles"),
        ({"input_ids": text}, "got 3 decisions for 0 tiles"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**{**batch, **change}, **GREEDY)
    assert random.getstate() == state
    with pytest.raises(TypeError, match="attention_mask"):
        model.generate(**without, **GREEDY)
    with pytest.raises(UnboundLocalError):
        model.generate(**batch, visual_features=torch.zeros(3, 256, 48), **GREEDY)
    with pytest.raises(TypeError):
        model.generate(**batch, use_cache=True, **GREEDY)
    model.img_context_token_id = None
    with pytest.raises(AssertionError):
        model.generate(**batch, **GREEDY)
    model.img_context_token_id = 290
    del model.flash_absolute_threshold
    with pytest.raises(AttributeError, match="flash_absolute_threshold"):
        model.generate(**batch, **GREEDY)


def test_train_mode_is_the_shipped_path():
    """Its dropouts are live there."""
    model, batch = model_and(((3,),))
    model.train()
    torch.manual_seed(5)
    expected = model.generate(**batch, **GREEDY)
    ivl_kernels.patch(model)
    torch.manual_seed(5)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


def test_helpers_copies_and_undo():
    model, batch = model_and(((3,),))
    expected = model.generate(**batch, **GREEDY)
    before = dict(model.__dict__)
    handle = ivl_kernels.patch(model)
    assert "extract_feature_flash" not in model.__dict__ and "compress_visual_tokens_in_sentence" not in model.__dict__
    twin = copy.deepcopy(model)
    handle.undo()
    assert model.__dict__ == before
    assert torch.equal(model.generate(**batch, **GREEDY), expected)
    assert torch.equal(twin.generate(**batch, **GREEDY), expected)


def test_text_only_and_bfloat16():
    model, batch = model_and(((3,),))
    text = {"input_ids": batch["input_ids"][:, :4], "attention_mask": batch["attention_mask"][:, :4]}
    expected = model.generate(**text, **GREEDY)
    handle = ivl_kernels.patch(model)
    assert torch.equal(model.generate(**text, **GREEDY), expected) and handle.last_routing() is None
    model.to(torch.bfloat16)
    half = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    assert model.generate(**half, **GREEDY).shape == (1, 5)
    with pytest.raises(RuntimeError):
        model.generate(**batch, **GREEDY)


def test_wrapped_projector_is_called():
    """A projector with a hook (or LoRA) is not read but called."""
    model, batch = model_and(((3,),))
    model.mlp1[1].register_forward_hook(lambda m, a, out: out * 1.5)
    model.mlp2[4].register_forward_hook(lambda m, a, out: out * 0.5)
    expected = model.generate(**batch, **GREEDY)
    ivl_kernels.patch(model)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


def by_hand(model, batch, labels):
    """Embeddings and labels of a batch of one, from the shipped helpers."""
    ids = batch["input_ids"]
    tiles = len(batch["pixel_values"])
    small, full, gate = model.extract_feature_flash(batch["pixel_values"], torch.ones(tiles, dtype=torch.int64))
    compress = shipped_decision(gate, model.flash_relative_threshold, model.flash_absolute_threshold)
    chosen = torch.cat([small[t] if compress[t] else full[t] for t in range(tiles)])
    embeds = model.get_input_embeddings()(ids)[0]
    embeds, kept_ids, _, keep = model.compress_visual_tokens_in_sentence(
        embeds, ids[0], batch["attention_mask"][0], model.img_context_token_id, compress
    )
    embeds[kept_ids == model.img_context_token_id] = chosen
    return embeds[None], labels[:, keep]


@pytest.mark.parametrize("layout", [True, "unpadded"])
def test_forward_when_asked(layout):
    tiles = ((3,), (1, 2), ())
    model = chat_model("hub", flash=FLASH)
    batch = chat_inputs(model, tiles)
    labels = torch.where(batch["input_ids"] == 290, -100, batch["input_ids"]).masked_fill(
        batch["attention_mask"] == 0, -100
    )
    flags = torch.ones(6, 1, dtype=torch.int64)
    plain = model(**batch, image_flags=flags, labels=labels)
    with ivl_kernels.patched(model):
        again = model(**batch, image_flags=flags, labels=labels)
        torch.testing.assert_close(again.logits, plain.logits, rtol=1e-4, atol=1e-4)
    losses, logits, weights = [], [], []
    with torch.no_grad():
        for b in range(2):
            one = row(batch, b, [3, 3, 0])
            own = labels[b : b + 1, batch["attention_mask"][b].bool()]
            embeds, kept = by_hand(model, one, own)
            out = model.language_model(inputs_embeds=embeds, labels=kept)
            logits.append(out.logits[0])
            weights.append((kept[:, 1:] != -100).sum())
            losses.append(out.loss)
    handle = ivl_kernels.patch(model, flash_forward=layout)
    two = {k: v[:2] for k, v in batch.items() if k != "pixel_values"} | {"pixel_values": batch["pixel_values"]}
    # A dummy tile, flagged 0, is not routed.
    two["pixel_values"] = torch.cat([two["pixel_values"][:3], two["pixel_values"][:1], two["pixel_values"][3:]])
    seven = torch.tensor([1, 1, 1, 0, 1, 1, 1])
    out = model(**two, image_flags=seven, labels=labels[:2])
    if layout is True:
        for b in range(2):
            torch.testing.assert_close(out.logits[b, : len(logits[b])], logits[b], rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(out.logits[0], torch.cat(logits), rtol=1e-3, atol=1e-3)
    mean = sum(loss * w for loss, w in zip(losses, weights)) / sum(weights)
    torch.testing.assert_close(out.loss, mean, rtol=1e-4, atol=1e-5)
    out.loss.backward()
    assert model.mlp1[1].weight.grad is not None and model.mlp2[1].weight.grad is not None
    assert model.gating.gate[1].weight.grad is None
    with pytest.raises(ValueError, match="position_ids"):
        model(**two, image_flags=seven, position_ids=torch.zeros(2, 5))
    with pytest.raises(AttributeError):
        model(**two)
    assert len(handle.last_routing().images) == 3


def test_forward_default_leaves_gradients_none():
    model, batch = model_and(((2,),))
    ivl_kernels.patch(model)
    model(**batch, image_flags=torch.ones(2, 1, dtype=torch.int64), labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is None for m in (model.mlp2, model.gating, model.pooling_before_gating) for p in m.parameters())


def test_refused_structures():
    model = chat_model("hub", flash=FLASH)
    model.mlp2 = torch.nn.Sequential(*model.mlp2[:5])
    report = ivl_kernels.patch(model, flash_forward=True).report()
    row = next(r for r in report.rows if r.feature == "flash")
    assert row.state == "refused" and "mlp2" in row.detail
    with pytest.raises(TypeError, match="flash_forward"):
        ivl_kernels.patch(chat_model("hub", flash=FLASH), flash_forward="packed")


def test_each_tile_is_projected_once_into_place(monkeypatch):
    model, batch = model_and(((5,),))
    calls, real = [], ivl_kernels.ops.pixel_shuffle_mlp

    def record(*args, **options):
        calls.append(options)
        return real(*args, **options)

    monkeypatch.setattr(ivl_kernels.ops, "pixel_shuffle_mlp", record)
    monkeypatch.setattr(model.mlp1, "forward", None)
    monkeypatch.setattr(model.mlp2, "forward", None)
    ivl_kernels.patch(model)
    model.generate(**batch, **GREEDY)
    assert [call["merge"] for call in calls] == [2, 4]
    assert sorted(torch.cat([call["tile_indices"] for call in calls]).tolist()) == [0, 1, 2, 3, 4]
    assert calls[0]["out"].data_ptr() == calls[1]["out"].data_ptr()
