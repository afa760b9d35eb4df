"""V2PE on native and remote-code models, against the unpatched model at explicit positions."""

import copy

import pytest
import torch
import transformers
from models import CHAT_KINDS, FAMILIES, IMAGE_TOKEN, chat_inputs, chat_model, inputs, native_model
from packaging.version import Version
from transformers import DynamicCache

import ivl_kernels
from ivl_kernels.integrations._patch import features as registered
from ivl_kernels.ops import v2pe_position_ids

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*generation flags")
GREEDY = dict(max_new_tokens=5, do_sample=False)
BATCH = ((2,), (1, 1), ())


def patch(model, **features):
    others = {n: False for n, f in registered().items() if n not in features and not f.option}
    return ivl_kernels.patch(model, **others, **features)


def positions(batch, delta, **options):
    return v2pe_position_ids(
        batch["input_ids"], IMAGE_TOKEN, delta, attention_mask=batch.get("attention_mask"), **options
    )


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_delta_one_is_stock(family):
    model, batch = native_model(family), inputs(BATCH)
    expected, tokens = model(**batch).logits, model.generate(**batch, **GREEDY)
    handle = patch(model, v2pe=1)
    assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.generate(**batch, **GREEDY), tokens)
    handle.undo()
    assert torch.equal(model(**batch).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_forward_is_the_model_at_those_positions(family, padding):
    model, batch = native_model(family), inputs(BATCH, padding=padding)
    present = batch["attention_mask"].bool()
    expected = model(**batch, position_ids=positions(batch, 0.25)).logits
    stock = model(**batch).logits
    handle = patch(model, v2pe="1/4", rope=True)
    got = model(**batch).logits
    torch.testing.assert_close(got[present], expected[present], rtol=0, atol=1e-4)
    assert (got - stock)[present].abs().max() > 0.1
    override = model(**batch, v2pe_delta=1).logits
    torch.testing.assert_close(override[present], stock[present], rtol=0, atol=1e-4)
    report = handle.note("v2pe").report
    assert report.delta == "1" and report.saved == (0, 0, 0)
    model(**batch)
    tokens = batch["attention_mask"].sum(1)
    spans = positions(batch, 0.25).masked_fill(~present, 0).amax(1) + 1
    assert handle.note("v2pe").report.span == tuple(spans.tolist())
    assert f"{tokens[0]} tokens in {spans[0]:g} positions" in str(handle.report())


@torch.no_grad()
def test_no_mask_and_no_cache_is_not_taken_for_packed_sequences():
    model, batch = native_model("qwen3"), inputs(((2, 1),))
    mask = batch.pop("attention_mask")
    expected = model(**batch, attention_mask=mask, position_ids=positions(batch, 0.25), use_cache=False).logits
    trap = model(**batch, position_ids=positions(batch, 0.25), use_cache=False).logits
    patch(model, v2pe=0.25)
    got = model(**batch, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (trap - expected).abs().max() > 0.01 or transformers.__version__ < "4.53"


@torch.no_grad()
def test_packed_samples():
    model = native_model("qwen3")
    rows = [inputs(((1,),), seed=s) for s in (0, 1)]
    patch(model, v2pe=0.25)
    expected = torch.cat([model(**{k: v for k, v in r.items() if k != "attention_mask"}).logits for r in rows], 1)
    packed = {k: torch.cat([r[k] for r in rows], 1 if k == "input_ids" else 0) for k in ("input_ids", "pixel_values")}
    ids = torch.cat([torch.arange(r["input_ids"].shape[1]) for r in rows])[None]
    got = model(**packed, position_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def greedy_by_hand(model, batch, delta, steps=5):
    """Greedy decoding without a cache, at positions computed from scratch for every step."""
    batch = dict(batch)
    for _ in range(steps):
        logits = model(**batch, position_ids=positions(batch, delta), use_cache=False).logits
        last = logits[:, -1].argmax(-1, keepdim=True)
        batch["input_ids"] = torch.cat((batch["input_ids"], last), 1)
        batch["attention_mask"] = torch.cat((batch["attention_mask"], torch.ones_like(last)), 1)
    return batch["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_steps_are_integer(family):
    model, batch = native_model(family), inputs(BATCH)
    model.generation_config.eos_token_id = None
    expected = greedy_by_hand(model, batch, 0.25)
    handle = patch(model, v2pe=1 / 16)
    assert torch.equal(model.generate(**batch, **GREEDY, v2pe_delta="1/4"), expected)
    if Version(transformers.__version__) < Version("5"):
        return  # beams with and without a cache differ there in the stock model too
    beams = dict(num_beams=3, num_return_sequences=2)
    cached = model.generate(**batch, **GREEDY, **beams, v2pe_delta="1/4")
    assert torch.equal(cached, model.generate(**batch, **GREEDY, **beams, v2pe_delta="1/4", use_cache=False))
    handle.undo()


@torch.no_grad()
def test_cache_reuse():
    model, batch = native_model("qwen3"), inputs(((2, 1),))
    patch(model, v2pe=0.25)
    del batch["attention_mask"]
    full = model(**batch).logits
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    cut = int((ids[0] == IMAGE_TOKEN).nonzero()[31]) + 3  # in the text between the images
    cache = DynamicCache()
    first = model(input_ids=ids[:, :cut], pixel_values=pixels[:2], past_key_values=cache, use_cache=True)
    copied = copy.deepcopy(cache)
    for continued in (cache, copied):
        second = model(input_ids=ids[:, cut:], pixel_values=pixels[2:], past_key_values=continued, use_cache=True)
        got = torch.cat((first.logits, second.logits), 1)
        torch.testing.assert_close(got, full, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_remote_code(kind):
    model = chat_model(kind)
    batch = chat_inputs(model, BATCH)
    flags = chat_inputs(model, BATCH, flags=True)
    stock, logits = model.generate(**batch, **GREEDY), model(**flags).logits
    handle = patch(model, v2pe="1/16")
    assert torch.equal(model.generate(**batch, **GREEDY, v2pe_delta=1), stock)
    assert torch.equal(model(**flags, v2pe_delta=1).logits, logits)
    got, report = model.generate(**batch, **GREEDY), handle.note("v2pe").report
    spans = positions(batch, 1 / 16).masked_fill(batch["attention_mask"] == 0, 0).amax(1) + 1
    assert report.span == tuple(spans.tolist())

    # By hand: the language model at explicit positions, without a cache.
    ids = batch["input_ids"]
    features = model.extract_feature(batch["pixel_values"]).flatten(0, 1)
    running = dict(input_ids=ids, attention_mask=batch["attention_mask"])
    handle.undo()
    for _ in range(5):
        embeds = model.language_model.get_input_embeddings()(running["input_ids"])
        embeds[running["input_ids"] == IMAGE_TOKEN] = features
        out = model.language_model(
            inputs_embeds=embeds, attention_mask=running["attention_mask"], use_cache=False,
            position_ids=positions(running, 1 / 16),
        )  # fmt: skip
        last = out.logits[:, -1].argmax(-1, keepdim=True)
        running["input_ids"] = torch.cat((running["input_ids"], last), 1)
        running["attention_mask"] = torch.cat((running["attention_mask"], torch.ones_like(last)), 1)
    assert torch.equal(got, running["input_ids"][:, ids.shape[1] :])
    assert torch.equal(model.generate(**batch, **GREEDY), stock)


@torch.no_grad()
def test_flash_spans_do_not_depend_on_the_router():
    model = chat_model("hub", flash=(0.5, 0.0))
    batch = chat_inputs(model, ((4,),))
    tokens = batch["input_ids"].shape[1]
    for flash in (False, True):  # upstream's own packing, and ours
        handle = patch(model, v2pe="1/16", flash=flash)
        model.generate(**batch, **GREEDY)
        report = handle.note("v2pe").report
        assert report.tokens[0] < tokens  # some tiles were compressed
        assert report.span == tuple((positions(batch, "1/16").amax(1) + 1).tolist())
        handle.undo()


@torch.no_grad()
def test_copies_have_their_own_state():
    model, batch = native_model("qwen3"), inputs(BATCH)
    patch(model, v2pe=0.25)
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, expected)
    assert twin.__dict__["_ivl_v2pe"] is not model.__dict__["_ivl_v2pe"]


@pytest.mark.parametrize(
    "value, error", [(True, TypeError), (2, ValueError), ("1/0", ValueError), ("half", ValueError)]
)
def test_wrong_steps(value, error):
    with pytest.raises(error, match="v2pe=True|delta: got"):
        ivl_kernels.patch(native_model("qwen3"), v2pe=value)
