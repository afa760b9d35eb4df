"""Keys and values written behind the old ones: what a cache holds and gives is what transformers' own gives."""

import copy
import io

import pytest
import torch
from transformers import DynamicCache

import ivl_kernels
from ivl_kernels.integrations import cache as adapter
from ivl_kernels.integrations._patch import features
from tests.against_plain import cache_in, cache_names
from tests.models import inputs, native_model

BATCH = ((2,), (1, 1), ())
GREEDY = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)


def patch(model, **options):
    others = {n: False for n, f in features().items() if n != "cache" and not f.option}
    return ivl_kernels.patch(model, cache=True, **others, **options)


@pytest.fixture
def made(monkeypatch):
    """Memory that was made."""
    rooms = []

    class Room(adapter._Room):
        def __init__(self, *args):
            super().__init__(*args)
            rooms.append(self)

    monkeypatch.setattr(adapter, "_Room", Room)
    return rooms


def language():
    return native_model("qwen3").model.language_model


def step(model, cache, tokens):
    given = {} if cache is None else {cache_names(model)[0]: cache}
    output = model(input_ids=torch.tensor([tokens]), use_cache=True, **given)
    return output.last_hidden_state[:, -1], cache_in(output)


def held(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def same(one, other):
    assert all(torch.equal(a, b) for x, y in zip(one, other) for a, b in zip(x, y))


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt_oss"])
def test_same_tokens(name, beams, made):
    model, batch = native_model(name), inputs(BATCH)
    options = dict(GREEDY, num_beams=beams)
    expected = model.generate(**batch, **options)
    handle = patch(model, strict=True)
    assert torch.equal(model.generate(**batch, **options), expected) and made
    handle.undo()
    count = len(made)
    assert torch.equal(model.generate(**batch, **options), expected) and len(made) == count


@torch.no_grad()
@pytest.mark.parametrize("inference", [False, True])
def test_memory_is_made_once(inference, made):
    plain, model = language(), language()
    patch(model)
    ours = theirs = None
    with torch.inference_mode() if inference else torch.no_grad():
        for tokens in ((1, 2, 3), *((n,) for n in range(4, 40)), (5, 6)):
            expected, theirs = step(plain, theirs, tokens)
            got, ours = step(model, ours, tokens)
            assert torch.equal(got, expected)
        assert len(made) == 2 * len(model.layers)
        same(held(ours), held(theirs))
    if inference:  # its memory may not be written to outside
        assert torch.equal(step(model, ours, (7,))[0], step(plain, theirs, (7,))[0])
        assert len(made) == 4 * len(model.layers)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([0])),
        lambda cache: cache.reset(),
        lambda cache: [setattr(layer, "keys", layer.keys * 2) for layer in cache.layers],
        lambda cache: [layer.values.mul_(2) for layer in cache.layers],
        lambda cache: [setattr(layer.keys, "data", layer.keys * 2) for layer in cache.layers],
    ],
)
def test_a_cache_that_was_changed(change):
    plain, model = language(), language()
    patch(model)
    ours = theirs = None
    for tokens in ((1, 2, 3), (4,), (5,), None, (6,), (7,)):
        if tokens is None:
            change(ours)
            change(theirs)
            continue
        expected, theirs = step(plain, theirs, tokens)
        got, ours = step(model, ours, tokens)
        assert torch.equal(got, expected)
    same(held(ours), held(theirs))


@torch.no_grad()
def test_two_ways_on_from_one_cache():
    """A copy, a shallow copy of the layers, and tensors that somebody kept stay what they were."""
    model = language()
    patch(model)
    cache = None
    for tokens in ((1, 2, 3), (4,), (5,)):
        _, cache = step(model, cache, tokens)
    kept, before = [(layer.keys, layer.values) for layer in cache.layers], held(cache)
    deep, shallow = copy.deepcopy(cache), copy.copy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    stored = io.BytesIO()
    torch.save(cache, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    answers = [step(model, each, (token,))[0] for each, token in ((cache, 6), (shallow, 7), (deep, 7), (loaded, 7))]
    assert torch.equal(answers[1], answers[2]) and torch.equal(answers[1], answers[3])
    assert not torch.equal(answers[0], answers[1])
    same(kept, before)
    fresh = step(model, None, (1, 2, 3, 4, 5, 6))[0]
    torch.testing.assert_close(answers[0], fresh, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_piece_for_all_layers():
    """A prompt's rows of all layers lie in one piece; copies of a cache that was left half filled do not share it."""
    plain, model = language(), language()
    patch(model)
    _, cache = step(model, None, (1, 2, 3))
    assert len({layer.keys.untyped_storage().data_ptr() for layer in cache.layers}) == 1

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    one = DynamicCache(config=model.config)
    hook = model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        step(model, one, (1, 2, 3))
    hook.remove()
    one.layers[0] = type(one.layers[0])()
    other = copy.copy(one)
    other.layers = [copy.copy(layer) for layer in one.layers]
    theirs = None
    for tokens in ((1, 2, 3), (4,)):
        expected, theirs = step(plain, theirs, tokens)
        assert all(torch.equal(step(model, each, tokens)[0], expected) for each in (one, other))
    same(held(one), held(theirs))
    same(held(other), held(theirs))


def test_what_is_upstreams(made):
    """With gradients, other classes of caches, and updates of somebody else."""
    model = language()
    patch(model)

    def twice(cache):
        for tokens in ((1, 2, 3), (4,)):
            _, cache = step(model, cache, tokens)
        return cache

    twice(None)

    class Mine(DynamicCache):
        pass

    with torch.no_grad():
        twice(Mine())
        cache = DynamicCache()
        cache.update = lambda *args, **kwargs: DynamicCache.update(cache, *args, **kwargs)
        twice(cache)
    assert not made
    with torch.no_grad():
        twice(None)
    assert made
