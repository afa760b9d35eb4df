"""Route, pack and project by themselves: the vision side has no language model, the language side no vision."""

import dataclasses
import io

import pytest
import torch

from ivl_kernels import ops
from ivl_kernels.flash import (
    Decisions,
    flash_inputs,
    language_parts,
    pack,
    parts_of,
    project_into,
    route,
    vision_parts,
)
from ivl_kernels.flash.tiles import image_of_tile, row_of_tile, shuffled
from ivl_kernels.models.families import family_of
from ivl_kernels.models.plain import linear_stack
from tests.integrations.test_flash_native import flash_model
from tests.models import chat_inputs, chat_model, inputs, native_model
from tests.simulator.gpu import host_reads, simulated_gpu

TILES = ((3,), (), (1, 2), (1,))


def build(kind):
    if kind == "native":
        return flash_model(), inputs(TILES)
    model = chat_model("hub", flash=(0.3, 0.1), ps_version=kind.removeprefix("chat "))
    return model, chat_inputs(model, TILES)


def sent(*tensors):
    """What another process gets."""
    file = io.BytesIO()
    torch.save(tensors, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.filterwarnings("ignore:ps_version")
@pytest.mark.parametrize("kind", ["native", "chat v1", "chat v2"])
@torch.no_grad()
def test_two_processes(kind):
    model, batch = build(kind)
    parts = parts_of(model)
    vit = parts.vision.tokens_of(batch["pixel_values"])
    whole = flash_inputs(parts, batch["input_ids"], vit, attention_mask=batch["attention_mask"])

    def vision(pixels, groups):
        model, _ = build(kind)
        core = family_of(model).core
        del core.language_model
        mine = vision_parts(family_of(model))
        vit = mine.tokens_of(pixels)
        decisions = route(vit, mine, groups=groups)
        lengths = torch.where(decisions.compress, mine.tokens // 4, mine.tokens)
        features = torch.full((int(lengths.sum()), 48), torch.nan)
        assert project_into(features, vit, decisions.compress, mine) is features
        return sent(decisions.compress, features)

    def language(ids, mask, compress, features):
        model, _ = build(kind)
        family = family_of(model)
        for name in ("vision_tower", "vision_model", "multi_modal_projector", "mlp1", "mlp2", "flash"):
            for holder in (model, family.core):
                holder._modules.pop(name, None)
        mine = language_parts(family)
        packed = pack(ids, compress, mine, attention_mask=mask)
        embeds = packed.embeds.flatten(0, 1)
        ids = packed.ids.flatten()
        embeds[(ids == mine.token_id) & (packed.attention_mask.flatten() != 0)] = features
        return packed, embeds.view_as(packed.embeds)

    groups = row_of_tile(batch["input_ids"], batch["attention_mask"], 290, parts.vision.tokens, len(vit))
    packed, embeds = language(
        batch["input_ids"], batch["attention_mask"], *vision(*sent(batch["pixel_values"], groups))
    )
    assert groups.tolist() == [0, 0, 0, 2, 2, 2, 3]
    assert 0 < int(whole.compress.sum()) < 7
    assert torch.equal(embeds, whole.embeds)
    for name in ("ids", "attention_mask", "position_ids", "tile_rows", "keep", "kept"):
        assert torch.equal(getattr(packed, name), getattr(whole.packed, name))


@torch.no_grad()
def test_the_preparation_reads_from_a_gpu_once():
    """Route, pack and project, for several requests: the packed length and nothing else."""
    model, batch = build("native")
    model = model.bfloat16()
    parts = parts_of(model)
    vit = parts.vision.tokens_of(batch["pixel_values"].bfloat16())
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with simulated_gpu(preferred=True) as log:
        for count, rows in ((7, slice(None)), (3, slice(0, 1))):
            expected = flash_inputs(parts, ids[rows], vit[:count], attention_mask=mask[rows])
            launches = len(log)
            with host_reads() as reads:
                got = flash_inputs(parts, ids[rows], vit[:count], attention_mask=mask[rows])
            assert reads == ["tolist"] and len(log) >= 2 * launches > 10
            del log[:]
            text = got.packed.ids != parts.language.token_id
            assert torch.equal(got.embeds, expected.embeds) and bool(text.any())
        with host_reads() as reads:  # those that must be seen
            int(vit[0, 0, 0]), bool(ids[0, 0]), ids[ids > 0], ids.nonzero(), ids.tolist(), ids[0, 0].item()
            torch.where(ids > 0), torch.equal(ids, ids), torch.arange(ids[0, 0]), ids.to("cpu"), ids.to(ids.device)
            ids.clone()[ids > 0] = 7
            ones = torch.ones_like(ids[0])
            ones.repeat_interleave(ones), ones.repeat_interleave(ones, output_size=len(ones))
            ops.place_rows(torch.zeros(1, 2, 8), torch.tensor([[7, 0]]), torch.ones(1, 8), 7, backend="triton")
        methods = ["__int__", "__bool__", "index", "nonzero", "tolist", "item"]
        operators = ["nonzero", "equal", "_local_scalar_dense", "to", "index_put_", "repeat_interleave"]
        assert reads == [*methods, *operators, "nonzero"]


@torch.no_grad()
def test_features_may_lie_anywhere_and_in_another_dtype():
    model, batch = build("native")
    vision = vision_parts(family_of(model))
    vit = vision.tokens_of(batch["pixel_values"])
    compress = torch.tensor([True, False, False, True, True, False, True])
    rows = project_into(torch.zeros(4 * 4 + 3 * 16, 48), vit, compress, vision)
    starts = torch.tensor([90, 0, 20, 40, 50, 60, 80])
    spread = torch.zeros(100, 48, dtype=torch.float64)
    assert project_into(spread, vit, compress, vision, starts=starts, compressed=4) is spread
    lengths = [4 if small else 16 for small in compress]
    for start, own in zip(starts.tolist(), rows.split(lengths)):
        assert torch.equal(spread[start : start + len(own)], own.double())
    assert int((spread.abs().sum(1) == 0).sum()) == 100 - len(rows)


@pytest.mark.parametrize("called", [False, True])
def test_gradients(called):
    """Of the projectors, the embedding, the tiles and the router; the parameters that nothing reaches keep None."""
    model, batch = build("native")
    parts = parts_of(model)
    if called:
        model.flash.mlp2[1].register_forward_hook(lambda module, args, out: None)
        model.flash.gating.register_forward_hook(lambda module, args, out: None)
    vit = parts.vision.tokens_of(batch["pixel_values"])
    decisions = route(vit, parts.vision)
    decisions = dataclasses.replace(decisions, compress=torch.ones(7, dtype=torch.bool))
    made = flash_inputs(parts, batch["input_ids"], vit, attention_mask=batch["attention_mask"], decisions=decisions)
    valid = made.packed.attention_mask != 0
    (made.embeds[valid].square().sum() + made.decisions.router_logits.softmax(-1)[:, 0].sum()).backward()
    for name, parameter in model.named_parameters():
        unused = any(f"pooling_before_gating.{kind}{i}" in name for kind in ("attn", "norm") for i in (3, 4))
        reached = any(part in name for part in ("vision_tower", "embed_tokens", "flash")) and not unused
        assert (parameter.grad is not None) == reached, name


def test_errors():
    model, batch = build("native")
    parts = parts_of(model)
    vit = parts.vision.tokens_of(batch["pixel_values"])
    with pytest.raises(ValueError, match="vit: got 40 patch tokens a tile, expected 64: 16 placeholders a tile"):
        flash_inputs(parts, batch["input_ids"], vit[:, :41])
    with pytest.raises(ValueError, match="got 6 decisions for 7 tiles"):
        flash_inputs(
            parts, batch["input_ids"], vit[:6], attention_mask=batch["attention_mask"],
            decisions=Decisions(torch.ones(6, dtype=torch.bool)),
        )  # fmt: skip
    with pytest.raises(TypeError, match="model: got InternVLForConditionalGeneration, expected .*FlashVision attached"):
        parts_of(native_model())
    chat = chat_model("hub", flash=(0.3, 0.1), token_id=None)
    with pytest.raises(ValueError, match="token_id: the model has not been told"):
        parts_of(chat)


def test_an_image_ends_with_its_row():
    ids = torch.tensor([[7, 290, 290], [290, 7, 290], [290, 290, 7]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1]])
    assert image_of_tile(ids, None, 290, 1).tolist() == [0, 0, 1, 2, 3, 3]
    assert image_of_tile(ids, mask, 290, 1).tolist() == [0, 0, 1, 2, 3]
    assert row_of_tile(ids, mask, 290, 1, 5).tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("called", [False, True])
def test_gradients_of_the_embedding_alone(called):
    model, batch = build("native")
    model.requires_grad_(False)
    table = model.get_input_embeddings().weight.requires_grad_(True)
    if called:
        model.flash.mlp2[1].register_forward_hook(lambda module, args, out: None)
    parts = parts_of(model)
    vit, kept = parts.vision.tokens_of(batch["pixel_values"]), []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda m, a, out: kept.append((out, out.detach().clone()))
    )
    made = flash_inputs(parts, batch["input_ids"], vit, attention_mask=batch["attention_mask"])
    hook.remove()
    assert kept and all(torch.equal(out, before) for out, before in kept)
    made.embeds[made.packed.attention_mask != 0].sum().backward()
    words = batch["input_ids"][batch["attention_mask"] != 0]
    expected = torch.bincount(words[words != 290], minlength=len(table)).float()
    assert torch.equal(table.grad, expected[:, None].expand_as(table))


@torch.no_grad()
@pytest.mark.parametrize("which", ["full", "small"])
def test_the_eps_of_the_projectors(which):
    model, batch = build("native")
    parts = parts_of(model)
    vit = parts.vision.tokens_of(batch["pixel_values"])
    projector = getattr(parts.vision, which)
    linear_stack(projector.module).norm.eps = 0.4
    compress = torch.full((len(vit),), which == "small")
    count = parts.vision.tokens // 4 if which == "small" else parts.vision.tokens
    got = project_into(torch.empty(len(vit) * count, 48), vit, compress, parts.vision)
    expected = projector.module(shuffled(vit[:, 1:], projector.merge, parts.vision.order))
    torch.testing.assert_close(got, expected.flatten(0, 1), rtol=1e-4, atol=1e-5)
