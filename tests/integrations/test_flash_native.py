"""Flash on transformers-native models: loading, generation, continuation, forward; against a rendition by hand."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from transformers import DynamicCache, InternVLForConditionalGeneration

import ivl_kernels
from ivl_kernels import imaging
from ivl_kernels.models.upstream import cache_of, filled
from ivl_kernels.nn import FlashVision, ImageRouting, Routing
from ivl_kernels.testing.shipped import ShippedRouter, shipped_decision
from tests import synthetic
from tests.models import chat_inputs, chat_model, inputs, native_model, randomize

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*generation flags")
NEW = 5
GREEDY = dict(max_new_tokens=NEW, do_sample=False)
THRESHOLDS = (0.3, 0.1)


def flash_model(family="qwen3", **changes):
    model = native_model(family, **changes)
    randomize(flash := FlashVision(32, 48, *THRESHOLDS), seed=3)
    flash.attach(model)
    model.generation_config.eos_token_id = None
    return model


def by_hand(model, batch, b=0, first=0, tiles=None, compress=None):
    """(ids [1, N'], embeds [1, N', H]) of one row: both projectors for every tile, then one of them picked."""
    present = batch["attention_mask"][b].bool()
    ids = batch["input_ids"][b, present]
    embeds = model.get_input_embeddings()(ids)
    tiles = len(batch["pixel_values"]) if tiles is None else tiles
    if tiles:
        vit = model.model.vision_tower(pixel_values=batch["pixel_values"][first : first + tiles]).last_hidden_state
        router = ShippedRouter(32).eval()
        router.load_state_dict({k: v for k, v in model.flash.state_dict().items() if not k.startswith("mlp2")})
        if compress is None:
            compress = shipped_decision(router(vit), *THRESHOLDS)
        grid = vit[:, 1:].reshape(tiles, 8, 8, 32)
        small = model.flash.mlp2(model.model.pixel_shuffle(grid, 0.25).reshape(tiles, 4, -1))
        full = model.model.multi_modal_projector(model.model.pixel_shuffle(grid, 0.5).reshape(tiles, 16, -1))
        keep = torch.ones_like(ids, dtype=torch.bool)
        where = (ids == 290).nonzero().squeeze(1)
        for t in range(tiles):
            keep[where[16 * t + 4 : 16 * t + 16]] = not compress[t]
        ids, embeds = ids[keep], embeds[keep]
        embeds[ids == 290] = torch.cat([small[t] if compress[t] else full[t] for t in range(tiles)])
    return ids[None], embeds[None]


@torch.no_grad()
def expected_tokens(model, batch, b=0, first=0, tiles=None, compress=None, **options):
    ids, embeds = by_hand(model, batch, b, first, tiles, compress)
    mask = torch.ones_like(ids)
    torch.manual_seed(0)
    out = model.generate(input_ids=ids, inputs_embeds=embeds, attention_mask=mask, **{**GREEDY, **options})
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_each_row_as_if_alone(family, padding):
    model = flash_model(family)
    tiles = ((2,), (), (1, 3), (1,))
    batch = inputs(tiles, padding=padding)
    firsts = [0, 2, 2, 6]
    expected = [expected_tokens(model, batch, b, firsts[b], sum(tiles[b])) for b in range(4)]
    plain = model.generate(**batch, **GREEDY) if padding == "left" else None
    handle = ivl_kernels.patch(model, flash=True)
    assert "flash" in {row.feature for row in handle.report().patched}
    out = model.generate(**batch, **GREEDY)
    length = batch["input_ids"].shape[1]
    assert torch.equal(out[:, :length], batch["input_ids"])
    assert torch.equal(out[:, length:], torch.cat(expected))
    assert torch.equal(model.generate(**batch, **GREEDY), out)  # twice
    routing = handle.last_routing().images
    assert [len(i.compressed) for i in routing] == [2, 1, 3, 1] and any(map(any, (i.compressed for i in routing)))
    assert routing[0].scores and routing[3].compressed == [False]
    handle.undo()
    if plain is not None:
        assert torch.equal(model.generate(**batch, **GREEDY), plain) and not torch.equal(plain, out)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=3),
        dict(num_beams=4, num_return_sequences=2),
        dict(do_sample=True, temperature=1.5, top_k=20),
        dict(do_sample=True, num_return_sequences=3),
        dict(repetition_penalty=1.8),
        dict(no_repeat_ngram_size=2),
    ],
)
def test_generation_modes(options):
    model, batch = flash_model(), inputs(((3, 1),))
    expected = expected_tokens(model, batch, **options)
    ivl_kernels.patch(model)
    torch.manual_seed(0)
    out = model.generate(**batch, **{**GREEDY, **options})
    length = batch["input_ids"].shape[1]
    assert torch.equal(out[:, length:], expected)
    assert torch.equal(out[:, :length], batch["input_ids"].expand(len(out), -1))


@pytest.mark.parametrize("kind", ["native", "chat"])
def test_grids_from_the_sizes_of_the_photographs(kind):
    sizes = [(90, 300), (64, 64), (300, 90), (160, 150)]  # height, width
    tilings = [imaging.tile_image(Image.new("RGB", (w, h)), max_tiles=6, tile=64) for h, w in sizes]
    tiles = tuple(tuple(len(t.tiles) for t in row) for row in (tilings[:3], tilings[3:]))
    assert tiles == ((4, 1, 4), (5,))
    if kind == "native":
        model, batch = flash_model(), inputs(tiles)
    else:
        model = chat_model("hub", flash=(0.3, 0.1))
        batch = chat_inputs(model, tiles)
    handle = ivl_kernels.patch(model, flash=True, strict=True)
    assert handle.last_routing(sizes) is None
    model.generate(**batch, max_new_tokens=1, do_sample=False)
    plain, routing = handle.last_routing(), handle.last_routing(image_sizes=sizes)
    assert [image.grid for image in plain.images] == [None, (1, 1), None, None]
    assert [image.grid for image in routing.images] == [(1, 3), (1, 1), (3, 1), (2, 2)]
    assert [image.grid for image in routing.images] == [(t.rows, t.columns) for t in tilings]
    assert [image.thumbnail for image in routing.images] == [t.thumbnail for t in tilings]
    for mine, theirs in zip(routing.images, plain.images):
        assert (mine.scores, mine.compressed) == (theirs.scores, theirs.compressed)
    assert str(routing) == str(plain)
    with pytest.raises(ValueError, match="image_sizes: got 3, expected 4"):
        handle.last_routing(sizes[:3])
    with pytest.raises(ValueError, match="image 3 has 5 tiles, which height 64, width 200 .* 1 rows x 3 columns"):
        handle.last_routing([*sizes[:3], (64, 200)])


def test_grid_of_two_tiles_is_refused():
    """A picture of one tile has no thumbnail, one of two has three tiles."""
    routing = Routing([ImageRouting(None, True, [], [False, True])])
    for size in ((448, 448), (448, 896)):
        with pytest.raises(ValueError, match="image 0 has 2 tiles"):
            routing.with_grids([size])


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 40), st.sampled_from([64, 448]))
def test_grid_does_not_depend_on_the_limit(height, width, limit, tile):
    columns, rows = imaging.choose_grid(width, height, max_tiles=limit, tile=tile)
    count = columns * rows
    tiles = count + (count > 1)
    routing = Routing([ImageRouting(None, tiles > 1, [], [False] * tiles)], tile=tile)
    assert routing.with_grids([(height, width)]).images[0].grid == (rows, columns)


def test_mask_positions_and_cache_agree_at_each_step():
    model, batch = flash_model(), inputs(((3,), (1,)))
    handle = ivl_kernels.patch(model)
    seen = []

    def record(module, args, kwargs):
        past = filled(cache_of(kwargs))
        seen.append((past, kwargs["attention_mask"], kwargs["position_ids"]))

    model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    model.generate(**batch, **GREEDY)
    dropped = [12 * sum(image.compressed) for image in handle.last_routing().images]
    lengths = batch["attention_mask"].sum(1) - torch.tensor(dropped)
    for step, (past, mask, positions) in enumerate(seen):
        now = int(lengths.max()) + step
        assert past == (now - 1 if step else 0)
        assert mask.shape == (2, now) and torch.equal(mask.sum(1), lengths + step)
        assert torch.equal(positions[:, -1], lengths + step - 1)
    assert len(seen) == NEW


def test_lengths_streamer_and_dict():
    model, batch = flash_model(), inputs(((3,),))
    ivl_kernels.patch(model)
    length = batch["input_ids"].shape[1]
    out = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, max_length=length + NEW, do_sample=False), out)
    positional = {k: v for k, v in batch.items() if k != "input_ids"}
    assert torch.equal(model.generate(batch["input_ids"], **positional, **GREEDY), out)
    with pytest.raises(ValueError, match="max_length"):
        model.generate(**batch, max_length=length)
    model.generation_config.eos_token_id = int(out[0, length + 1])
    short = model.generate(**batch, **GREEDY)
    assert short.shape[1] == length + 2
    longer = model.generate(**batch, **GREEDY, min_length=length + 4)
    assert longer.shape[1] >= length + 4

    class Streamer:
        def __init__(self):
            self.values, self.ended = [], 0

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended += 1

    model.generation_config.eos_token_id = None
    streamer = Streamer()
    model.generate(**batch, **GREEDY, streamer=streamer)
    assert torch.equal(streamer.values[0], batch["input_ids"]) and streamer.ended == 1
    assert torch.equal(torch.cat([v.view(-1) for v in streamer.values]), out[0])
    result = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(result.sequences, out) and len(result.scores) == NEW
    for wrong in (dict(position_ids=torch.zeros_like(batch["input_ids"])), dict(inputs=batch["input_ids"])):
        with pytest.raises(ValueError):
            model.generate(**batch, **GREEDY, **wrong)


def test_continue_a_chat():
    """A second turn on the cache of the first, then one with another image."""
    model, batch = flash_model(), inputs(((3,),))
    handle = ivl_kernels.patch(model)
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    decided = torch.tensor(handle.last_routing().images[0].compressed)
    turn = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
    second = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
    fresh = model.generate(**second, pixel_values=batch["pixel_values"], **GREEDY)
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"].shape[1]), with_kwargs=True
    )
    continued = model.generate(**second, past_key_values=first.past_key_values, **GREEDY, return_dict_in_generate=True)
    assert seen[0] == 4  # the answer's last token and the new turn: nothing else is computed again
    assert torch.equal(continued.sequences, fresh)

    other = inputs(((2,),), seed=9)
    third = torch.cat([continued.sequences, other["input_ids"]], 1)
    everything = {"input_ids": third, "attention_mask": torch.ones_like(third)}
    pixels = torch.cat([batch["pixel_values"], other["pixel_values"]])
    alone = model.generate(**other, **GREEDY)
    decided = torch.cat([decided, torch.tensor(handle.last_routing().images[0].compressed)])
    whole = {**everything, "pixel_values": pixels}
    expected = expected_tokens(model, whole, tiles=5, compress=decided)
    with torch.no_grad():
        logits = model(inputs_embeds=by_hand(model, whole, tiles=5, compress=decided)[1]).logits[:, -1]
    for values in (pixels, other["pixel_values"]):
        cache = copy.deepcopy(continued.past_key_values)
        options = dict(past_key_values=cache, return_dict_in_generate=True, output_logits=True)
        out = model.generate(**everything, pixel_values=values, **options, **GREEDY)
        torch.testing.assert_close(out.logits[0], logits, rtol=1e-3, atol=1e-4)
        assert torch.equal(out.sequences[:, third.shape[1] :], expected)
    assert alone.shape[1] == other["input_ids"].shape[1] + NEW
    with pytest.raises(ValueError, match="got 4 tiles for 5 in input_ids, of which the cache holds 3"):
        model.generate(**everything, pixel_values=pixels[:4], past_key_values=continued.past_key_values, **GREEDY)
    for removed, held, prompt, tiles in ((34, 10, None, pixels), (0, 24, batch["input_ids"].shape[1], pixels[:3])):
        cache = copy.deepcopy(continued.past_key_values)
        if removed:
            cache.crop(-removed)
        with pytest.raises(ValueError, match=f": got {cache.get_seq_length()} positions, {held} of"):
            again = {k: v[:, :prompt] for k, v in everything.items()}
            model.generate(**again, pixel_values=tiles, past_key_values=cache, **GREEDY)


def test_continuation_refused():
    model = flash_model()
    batch = inputs(((3,), (1,)))
    ivl_kernels.patch(model)
    empty = DynamicCache(config=model.config.get_text_config())
    out = model.generate(**batch, **GREEDY, past_key_values=empty)
    again = {"input_ids": out, "attention_mask": torch.ones_like(out), "pixel_values": batch["pixel_values"]}
    with pytest.raises(ValueError, match="batch of one"):
        model.generate(**again, past_key_values=empty, **GREEDY)
    one = inputs(((3,),))
    foreign = model(input_ids=one["input_ids"][:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="no Flash call of this patch made"):
        model.generate(**one, past_key_values=foreign, **GREEDY)


def released(model, folder, prefix="", shards=1, config=None):
    """A checkpoint folder as the Flash release has it: Flash modules beside others, thresholds in the config."""
    tensors = {prefix + k: v.clone() for k, v in model.flash.state_dict().items()}
    tensors |= {"vision_model.x": torch.zeros(2), "language_model.model.layers.0.mlp.gate.weight": torch.ones(3)}
    settings = {
        "flash_relative_threshold": 0.3,
        "flash_absolute_threshold": 0.1,
        "ps_version": "v2",
        "flash_mode": True,
    }
    (folder / "config.json").write_text(json.dumps(settings if config is None else config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names, located = list(tensors), {}
    for i in range(shards):
        part = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, folder / part)
        located |= {n: part for n in names[i::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": located}))


@pytest.mark.parametrize("prefix", ["", "model.", "flash.", "model.flash."])
@pytest.mark.parametrize("shards", [1, 3])
def test_load(tmp_path, prefix, shards):
    model = flash_model()
    released(model, tmp_path, prefix, shards)
    loaded = FlashVision.from_pretrained(tmp_path)
    for name, value in model.flash.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert (loaded.relative_threshold, loaded.absolute_threshold) == (0.3, 0.1)
    assert FlashVision.from_pretrained(tmp_path, dtype=torch.bfloat16).mlp2[1].weight.dtype == torch.bfloat16


# By hand, not from the table under test.
LAYERS = {
    "mlp2": {"0": "norm", "1": "dense1", "4": "dense2", "7": "dense3"},
    "block": {"0": "dense_in", "3": "dense_out", "5": "norm"},
    "gate": {"0": "gate_norm", "1": "gate_proj"},
}


def renamed(tensors):
    """The tensors of a `FlashVision` under the names of transformers' pull request, attentions split."""
    made = {}
    for name, value in tensors.items():
        if "in_proj_" in name:
            holder, leaf = name.split("in_proj_")
            third = len(value) // 3
            for i, part in enumerate(("query", "key", "value")):
                made[f"model.{holder}{part}.{leaf}"] = value[i * third : (i + 1) * third].clone()
        elif name.startswith("mlp2"):
            _, layer, leaf = name.split(".")
            made[f"model.mlp2.{LAYERS['mlp2'][layer]}.{leaf}"] = value
        elif name.startswith("gating.gate"):
            layer, leaf = name.split(".")[2:]
            made[f"model.gating.{LAYERS['gate'][layer]}.{leaf}"] = value
        elif name.startswith("gating"):
            _, block, layer, leaf = name.split(".")
            made[f"model.gating.{block}.{LAYERS['block'][layer]}.{leaf}"] = value
        else:
            made["model." + name] = value
    return made


def store(tensors, folder):
    """Two shards with an index; query, key and value of an attention come to lie in different files."""
    (folder / "config.json").write_text(json.dumps({f"flash_{k}_threshold": 0.1 for k in ("relative", "absolute")}))
    located = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for part in set(located.values()):
        save_file({n: t.contiguous() for n, t in tensors.items() if located[n] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": located}))


def test_load_names_of_the_pull_request(tmp_path):
    model, batch = flash_model(), inputs(((3,), (2, 1)))
    tensors = renamed(model.flash.state_dict())
    for name in ("mlp2.dense3.weight", "gating.block4.dense_in.bias", "gating.gate_proj.bias"):
        assert f"model.{name}" in tensors
    assert tensors["model.pooling_before_gating.attn2.key.weight"].shape == (32, 32)
    store(tensors | {"model.language_model.norm.weight": torch.ones(2)}, tmp_path)
    loaded = FlashVision.from_pretrained(tmp_path, relative_threshold=0.3, absolute_threshold=0.1)
    before, after = model.flash.state_dict(), loaded.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    handle = ivl_kernels.patch(model)
    expected = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    scores = [image.scores for image in handle.last_routing().images]
    loaded.attach(model)
    got = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got.logits, expected.logits))
    assert [image.scores for image in handle.last_routing().images] == scores
    model.save_pretrained(tmp_path / "saved")  # under the released names
    again = FlashVision.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "gone", ["pooling_before_gating.attn3.key.bias", "mlp2.dense3.weight", "gating.gate_norm.bias"]
)
def test_load_names_of_the_pull_request_refuses(tmp_path, gone):
    whole = renamed(flash_model().flash.state_dict())
    store({name: value for name, value in whole.items() if name != f"model.{gone}"}, tmp_path)
    with pytest.raises(ValueError, match=rf"does not fit: {gone} is missing \(1 in all\)"):
        FlashVision.from_pretrained(tmp_path)
    store(whole | {"model.gating.block1.dense_mid.weight": torch.ones(2)}, tmp_path)
    with pytest.raises(ValueError, match=r"gating.block1.dense_mid.weight is not expected \(1 in all\)"):
        FlashVision.from_pretrained(tmp_path)
    store(whole | {"gating.gate.0.bias": torch.ones(32)}, tmp_path)  # both layouts at once
    with pytest.raises(ValueError, match=r"gating.gate.0.bias is not expected \(1 in all\)"):
        FlashVision.from_pretrained(tmp_path)
    one = "pooling_before_gating.attn1."
    uneven = {f"model.{one}query.bias": torch.ones(31), f"model.{one}key.bias": torch.ones(33)}
    store(whole | uneven, tmp_path)
    with pytest.raises(ValueError, match=r"attn1.query.bias is \[31\], expected \[32\]; .*key.bias is \[33\]"):
        FlashVision.from_pretrained(tmp_path)


def test_load_refuses_to_guess(tmp_path):
    model = flash_model()
    released(model, tmp_path, config={})
    with pytest.raises(ValueError, match="relative_threshold: .*no flash_relative_threshold"):
        FlashVision.from_pretrained(tmp_path)
    assert (
        FlashVision.from_pretrained(tmp_path, relative_threshold=0.5, absolute_threshold=0.2).absolute_threshold == 0.2
    )
    released(model, tmp_path, config={"flash_relative_threshold": 1, "flash_absolute_threshold": 1, "ps_version": "v1"})
    with pytest.raises(ValueError, match="ps_version"):
        FlashVision.from_pretrained(tmp_path)
    del model.flash.gating.block2
    released(model, tmp_path)
    with pytest.raises(ValueError, match="gating.block2.0.weight is missing"):
        FlashVision.from_pretrained(tmp_path)
    save_file({"language_model.x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no Flash modules"):
        FlashVision.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        FlashVision.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="InternVLForConditionalGeneration"):
        FlashVision(32, 48, 0, 0).attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mlp2 would take 512 and give 48"):
        FlashVision(16, 48, 0, 0).attach(native_model())


def test_save_and_reload(tmp_path):
    model, batch = flash_model(), inputs(((3,), (2,)))
    handle = ivl_kernels.patch(model)
    expected = model.generate(**batch, **GREEDY)
    model.save_pretrained(tmp_path)
    handle.undo()
    fresh = InternVLForConditionalGeneration.from_pretrained(tmp_path).eval()
    FlashVision.from_pretrained(tmp_path).attach(fresh)
    assert fresh.config.flash_relative_threshold == 0.3
    ivl_kernels.patch(fresh)
    assert torch.equal(fresh.generate(**batch, **GREEDY), expected)


@pytest.mark.parametrize("layout", [True, "unpadded"])
def test_forward_when_asked(layout):
    model, tiles = flash_model(), ((3,), (1, 2))
    batch = inputs(tiles)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain = model(**batch, labels=labels)
    with torch.no_grad():
        rows = [by_hand(model, batch, b, 3 * b, 3) for b in range(2)]
        alone = [model(inputs_embeds=embeds).logits[0] for _, embeds in rows]
    with ivl_kernels.patched(model):
        torch.testing.assert_close(model(**batch, labels=labels).logits, plain.logits, rtol=1e-4, atol=1e-4)
    ivl_kernels.patch(model, flash_forward=layout)
    out = model(**batch, labels=labels)
    if layout is True:
        got = [out.logits[b, : len(alone[b])] for b in range(2)]
    else:
        got = out.logits[0].split([len(logits) for logits in alone])
    for mine, theirs in zip(got, alone):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    own = [torch.nn.functional.cross_entropy(x[:-1], ids[0, 1:], reduction="sum") for x, (ids, _) in zip(alone, rows)]
    count = sum(ids.shape[1] - 1 for ids, _ in rows)
    torch.testing.assert_close(out.loss, sum(own) / count, rtol=1e-4, atol=1e-5)
    out.loss.backward()
    assert model.flash.mlp2[1].weight.grad is not None
    assert model.model.multi_modal_projector.linear_1.weight.grad is not None


def test_without_flash_attached():
    model = native_model()
    row = next(r for r in ivl_kernels.patch(model).report().rows if r.feature == "flash")
    assert row.state == "not found"


@pytest.mark.parametrize("end", [None, 7, [3, 7]])
def test_the_mask_that_is_made_where_none_is_given(end):
    """A pad id that ends a text as well is no padding, as transformers has it."""
    model, batch = flash_model(), inputs(((2,),))
    batch["input_ids"][0, :2] = 7
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 7, end
    ivl_kernels.patch(model)
    options = dict(GREEDY, min_new_tokens=NEW)
    got = model.generate(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], **options)
    mask = (batch["input_ids"] != 7).long() if end is None else torch.ones_like(batch["input_ids"])
    assert torch.equal(got, model.generate(**{**batch, "attention_mask": mask}, **options))
    other = model.generate(**{**batch, "attention_mask": 1 - mask + (batch["input_ids"] != 7).long()}, **options)
    assert end is None or not torch.equal(got, other)


def test_inputs_of_another_name_are_refused():
    """Rather than waiting for images that never come."""
    name = "transformers.models.internvl.modeling_internvl"
    other = synthetic.changed(name, synthetic.edit((r"\bpixel_values\b", "images")))
    model = flash_model()
    model.__class__ = other.InternVLForConditionalGeneration
    rows = [row for row in ivl_kernels.patch(model).report().rows if row.feature == "flash"]
    assert [row.state for row in rows] == ["refused"] and "takes no pixel_values" in rows[0].detail
