"""Flash's decisions kept with a cache: right over many turns, an error where they do not belong to what it holds."""

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, StaticCache

import ivl_kernels
from ivl_kernels.models.upstream import filled
from tests.integrations.test_flash_native import GREEDY, by_hand, flash_model
from tests.models import chat_inputs, chat_model, inputs

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*past_key_values")
NAMES = ["past_key_values"]
if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    NAMES.append("cache")
DICT = dict(**GREEDY, return_dict_in_generate=True, output_logits=True)


def turn(sequences, *more):
    """The next prompt: what was said, and more."""
    ids = torch.cat([sequences, *more], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text(*ids):
    return torch.tensor([ids])


def compressed(handle):
    return torch.tensor([c for image in handle.last_routing().images for c in image.compressed])


def check(model, output, prompt, pixels, compress):
    """The answer to a whole prompt whose tiles were decided so, computed without a cache."""
    batch = {**prompt, "pixel_values": pixels}
    with torch.no_grad():
        embeds = by_hand(model, batch, tiles=len(pixels), compress=compress)[1]
        for step, logits in enumerate(output.logits):
            torch.testing.assert_close(logits, model(inputs_embeds=embeds).logits[:, -1], rtol=1e-3, atol=1e-4)
            token = output.sequences[:, prompt["input_ids"].shape[1] + step]
            assert int(logits.argmax()) == int(token)
            embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None]], 1)
    return embeds.shape[1] - 1


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])  # GPT-OSS: every second layer keeps the last 32 positions
@pytest.mark.parametrize("name", NAMES)
def test_second_turn_whatever_the_cache_is_called(name, family):
    model, batch = flash_model(family), inputs(((3,),))
    handle = ivl_kernels.patch(model, moe=False)
    cache = DynamicCache(config=model.config.get_text_config())
    first = model.generate(**batch, **DICT, **{name: cache})
    second = turn(first.sequences, text(5, 6, 7))
    out = model.generate(**second, **DICT, **{name: cache})
    assert filled(cache) == check(model, out, second, batch["pixel_values"], compressed(handle))


@pytest.mark.parametrize("given", ["new images", "all images"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "returned", "deep copies"])
def test_many_turns_on_one_cache(kind, given):
    """An image, another one, text, a third one: the decisions grow with the cache and stay with it."""
    model = flash_model()
    handle = ivl_kernels.patch(model)
    config = model.config.get_text_config()
    cache = {"static": lambda: StaticCache(config=config, max_cache_len=300)}.get(
        kind, lambda: DynamicCache(config=config)
    )()
    images = [inputs(((n,),), seed=n) for n in (3, 2, 4)]
    prompt, decided = turn(text(1, 2), images[0]["input_ids"]), torch.tensor([], dtype=torch.bool)
    seen, out = [], None
    for image, words in ((0, 0), (1, 3), (None, 5), (2, 2), (None, 1)):
        if out is not None:
            prompt = turn(
                out.sequences,
                torch.arange(20, 20 + words)[None],
                *([] if image is None else [images[image]["input_ids"]]),
            )
        new = [] if image is None else [images[image]["pixel_values"]]
        seen += new
        pixels = torch.cat(seen) if given == "all images" else torch.cat(new) if new else None
        options = {} if kind == "returned" and len(decided) == 0 else {"past_key_values": cache}
        out = model.generate(**prompt, pixel_values=pixels, **DICT, **options)
        if kind == "returned":
            cache = out.past_key_values
        latest = compressed(handle)
        assert len(latest) == len(torch.cat(seen)) and torch.equal(latest[: len(decided)], decided)
        decided = latest
        assert filled(cache) == check(model, out, prompt, torch.cat(seen), decided)
        if kind == "deep copies":
            cache = copy.deepcopy(cache)
    assert 0 < int(decided.sum()) < len(decided)


def two_turns(cache=None, **options):
    model, batch = flash_model(), inputs(((3,),))
    ivl_kernels.patch(model, **options)
    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache(model)
    first = model.generate(**batch, **DICT, past_key_values=cache)
    return model, batch, cache, turn(first.sequences, text(5, 6, 7))


def packed_prompt(model, batch):
    return by_hand(model, batch)[1]


def crop_into_image(model, batch, cache):
    cache.crop(-14)  # from the end


def reset(cache):
    cache.reset()
    if filled(cache):  # older transformers zero a dynamic cache and keep its length
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]


def refill(model, cache, embeds, ids=None):
    with torch.no_grad():
        model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)


def refilled(model, batch, cache):
    """As many positions as before, of another image."""
    length = filled(cache)
    reset(cache)
    embeds = packed_prompt(model, {**batch, "pixel_values": batch["pixel_values"] + 1})
    refill(model, cache, torch.cat([embeds, embeds[:, : length - embeds.shape[1]]], 1))
    assert filled(cache) == length


@pytest.mark.parametrize("change", [crop_into_image, refilled])
@pytest.mark.parametrize("pixels", [False, True])
def test_refused_when_the_cache_was_changed(change, pixels):
    model, batch, cache, second = two_turns()
    change(model, batch, cache)
    with pytest.raises(ValueError, match="past_key_values: got"):
        model.generate(
            **second, **GREEDY, past_key_values=cache, **({"pixel_values": batch["pixel_values"]} if pixels else {})
        )


def test_cropped_in_the_answer_goes_on():
    model, batch, cache, second = two_turns()
    whole = model.generate(**second, **GREEDY, past_key_values=copy.deepcopy(cache))
    cache.crop(-2)
    assert torch.equal(model.generate(**second, **GREEDY, past_key_values=cache), whole)


def test_reset_starts_anew():
    model, batch, cache, second = two_turns()
    reset(cache)
    assert not filled(cache)
    other = inputs(((2,),), seed=5)
    assert torch.equal(model.generate(**other, **GREEDY, past_key_values=cache), model.generate(**other, **GREEDY))
    with pytest.raises(ValueError, match="past_key_values: got|pixel_values: got"):
        model.generate(**second, **GREEDY, past_key_values=cache)  # the chat from before the reset


def test_refused_for_another_prompt():
    model, batch, cache, second = two_turns()
    second["input_ids"][0, 1] += 1
    with pytest.raises(ValueError, match="got a cache of another prompt"):
        model.generate(**second, **GREEDY, past_key_values=cache)


@pytest.mark.parametrize("pixels", [False, True])
def test_refused_when_no_flash_call_filled_it(pixels):
    model, batch = flash_model(), inputs(((3,),))
    cache = DynamicCache(config=model.config.get_text_config())
    first = model.generate(**batch, **DICT, past_key_values=cache)  # plain
    ivl_kernels.patch(model)
    second = turn(first.sequences, text(5, 6, 7))
    more = {"pixel_values": batch["pixel_values"]} if pixels else {}
    with pytest.raises(ValueError, match="no Flash call of this patch made"):
        model.generate(**second, **GREEDY, past_key_values=cache, **more)
    # A cache whose class forgot what was kept with it.
    model, batch, cache, second = two_turns()
    vars(cache).pop("_ivl_flash")
    with pytest.raises(ValueError, match="no Flash call of this patch made"):
        model.generate(**second, **GREEDY, past_key_values=cache, **more)


def test_refused_when_flash_is_off_now():
    model, batch, cache, second = two_turns()
    model.config.flash_mode = False
    with pytest.raises(ValueError, match="past_key_values: got a cache that Flash filled"):
        model.generate(**second, **GREEDY, past_key_values=cache)


@pytest.mark.parametrize("pixels", [False, True])
def test_refused_for_a_batch(pixels):
    model, batch = flash_model(), inputs(((3,), (2,)))
    ivl_kernels.patch(model)
    cache = DynamicCache(config=model.config.get_text_config())
    first = model.generate(**batch, **DICT, past_key_values=cache)
    more = {"pixel_values": batch["pixel_values"]} if pixels else {}
    again = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences), **more}
    with pytest.raises(ValueError, match="past_key_values: got a filled cache and a batch of 2"):
        model.generate(**again, **GREEDY, past_key_values=cache)
    # One row with the cache of several beams.
    beams = model.generate(**inputs(((3,),)), **DICT, num_beams=3)
    again = turn(beams.sequences, text(5, 6, 7))
    with pytest.raises(ValueError, match="past_key_values: got"):
        model.generate(**again, **GREEDY, past_key_values=beams.past_key_values)


def test_text_alone_is_upstream():
    model = flash_model()
    ivl_kernels.patch(model)
    cache = DynamicCache(config=model.config.get_text_config())
    first = model.generate(**turn(text(1, 2, 3)), **GREEDY, past_key_values=cache)
    second = turn(first, text(5, 6))
    assert torch.equal(model.generate(**second, **GREEDY, past_key_values=cache), model.generate(**second, **GREEDY))


def test_remote_code_goes_on_where_its_decisions_are_the_same():
    """The released code decides for all tiles at every call: a new image can change what the cache has."""
    model = chat_model("hub", flash=(0.3, 0.1))
    batch = chat_inputs(model, ((3,),))
    handle = ivl_kernels.patch(model)
    cache = DynamicCache(config=model.config.llm_config)
    first = model.generate(**batch, **GREEDY, past_key_values=cache)
    decided = compressed(handle)
    second = {**turn(batch["input_ids"], first, text(5, 6, 7)), "pixel_values": batch["pixel_values"]}
    out = model.generate(**second, **GREEDY, past_key_values=cache)
    assert torch.equal(out, model.generate(**second, **GREEDY))
    outcomes = set()
    for threshold in (0.3, 0.95):
        model.flash_relative_threshold = threshold
        other, again = chat_inputs(model, ((2,),), seed=1), copy.deepcopy(cache)
        third = turn(second["input_ids"], out, other["input_ids"])
        third["pixel_values"] = torch.cat([batch["pixel_values"], other["pixel_values"]])
        expected = model.generate(**third, **GREEDY)
        same = torch.equal(compressed(handle)[:3], decided)
        outcomes.add(same)
        if same:
            assert torch.equal(model.generate(**third, **GREEDY, past_key_values=again), expected)
        else:
            with pytest.raises(ValueError, match="past_key_values: got"):
                model.generate(**third, **GREEDY, past_key_values=again)
    assert outcomes == {True, False}
    without = {name: value for name, value in second.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="got a cache that Flash filled"):
        model.generate(**without, **GREEDY, past_key_values=cache)
    plain = chat_model("hub", flash=(0.3, 0.1))
    filled_before = DynamicCache(config=model.config.llm_config)
    plain.flash_mode = False
    plain.generate(**batch, **GREEDY, past_key_values=filled_before)
    with pytest.raises(ValueError, match="no Flash call of this patch made"):
        model.generate(**second, **GREEDY, past_key_values=filled_before)


def test_refused_when_there_is_nothing_new():
    """The cache holds all of the prompt: no token is left whose answer could be computed."""
    model, batch, cache, second = two_turns()
    ids = second["input_ids"][:, :-4]  # the last token that was chosen is not in the cache
    with pytest.raises(ValueError, match="expected fewer than the prompt has"):
        model.generate(**turn(ids), **GREEDY, past_key_values=cache)
    more = second["input_ids"][:, :-3]
    assert model.generate(**turn(more), **GREEDY, past_key_values=cache).shape[1] > more.shape[1]
