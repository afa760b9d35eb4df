"""V2PE on native and remote-code models, against the unpatched model at explicit positions."""

import copy
import functools
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers import DynamicCache

import ivl_kernels
from ivl_kernels.integrations._patch import PatchError, PatchWarning
from ivl_kernels.integrations._patch import features as registered
from ivl_kernels.integrations.v2pe import _State
from ivl_kernels.models import families
from ivl_kernels.models.upstream import filled
from ivl_kernels.nn import FlashVision
from ivl_kernels.ops import v2pe_position_ids
from tests.models import CHAT_KINDS, FAMILIES, IMAGE_TOKEN, chat_inputs, chat_model, inputs, native_model, randomize

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


# What rotary_emb sees, call by call.


class Seen(list):
    """Positions of every call of the rotary embedding, in float64."""

    def __init__(self, model):
        text = families.family_of(model).text
        self.handle = text.rotary_emb.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module, args, kwargs):
        self.append((args[1] if len(args) > 1 else kwargs["position_ids"]).double())


def relative(positions, present=None):
    """Distances to the first token that is there: all that a rotation can show."""
    present = torch.ones_like(positions, dtype=torch.bool) if present is None else present
    first = present.long().argmax(1, keepdim=True)
    return torch.where(present, positions - positions.gather(1, first), 0.0)


def sequence(*pieces):
    """Text tokens for an int, visual ones for a list of one int: sequence(5, [16], 4)."""
    ids = [[IMAGE_TOKEN] * p[0] if isinstance(p, list) else [7 + i for i in range(p)] for p in pieces]
    return torch.tensor([sum(ids, [])])


PLAIN = sequence(5, [16], 4, [32], [16], 3, [16], 6)


def language(model):
    return model.model.language_model


@torch.no_grad()
def test_new_tokens_go_on_by_one():
    model, batch = native_model("qwen3"), inputs(((1,),))
    patch(model, v2pe=0.25)
    seen = Seen(model)
    model.generation_config.eos_token_id = None
    model.generate(**batch, max_new_tokens=4, do_sample=False)
    last = float(positions(batch, 0.25)[0, -1])
    assert [float(p[0, -1]) for p in seen] == [last, last + 1, last + 2, last + 3]


def cache_names(model):
    names = set(inspect.signature(type(model).forward).parameters) & {"past_key_values", "cache"}
    return names | {"past_key_values"}


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 4, 5, 6, 13, 20, 21, 22, 24, 25, 26, 57, 58, 72, 73, 76, 91, 97])
def test_a_sequence_in_two_calls_is_one_sequence(cut):
    """Cuts in text, before, in and after an image, in what follows at once; under every name of the cache."""
    model = native_model("qwen3")
    patch(model, v2pe=0.25)
    text = language(model)
    ids = PLAIN
    expected = text(PLAIN).last_hidden_state
    seen = Seen(model)
    text(ids)
    assert torch.equal(seen[0].float(), v2pe_position_ids(ids, IMAGE_TOKEN, 0.25))
    for name in cache_names(model):
        cache = DynamicCache()
        parts = [text(ids[:, :cut], **{name: cache}), text(ids[:, cut:], **{name: copy.deepcopy(cache)})]
        got = torch.cat([part.last_hidden_state for part in parts], 1)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        assert torch.equal(torch.cat(seen[-2:], 1), seen[0])


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 16, 17])
@pytest.mark.parametrize("delta", [0.25, "1/16", 0.3, "random"])
def test_a_sequence_in_many_calls(size, delta):
    model = native_model("qwen2")
    patch(model, v2pe=delta)
    text, seen, cache = language(model), Seen(model), DynamicCache()
    torch.manual_seed(3)
    text(PLAIN)
    torch.manual_seed(3)
    for chunk in PLAIN.split(size, 1):
        text(chunk, past_key_values=cache)
    got = torch.cat(seen[1:], 1)
    if delta != "random":
        assert torch.equal(got, seen[0])
        return
    # Drawn once an image, however it was cut.
    steps = (got[0, 1:] - got[0, :-1])[PLAIN[0, 1:] == IMAGE_TOKEN]
    for run in steps.split([16, 48, 16]):
        assert len(set(run.tolist())) == 1 and float(run[0]) in {2.0**-j for j in range(9)}


@torch.no_grad()
@pytest.mark.parametrize("keep", [3, 12, 21, 22, 40, 90])
def test_a_cropped_cache(keep):
    model = native_model("qwen3")
    patch(model, v2pe=0.25)
    text, cache = language(model), DynamicCache()
    text(PLAIN, past_key_values=cache)
    text(sequence(4), past_key_values=cache)
    cache.crop(keep - PLAIN.shape[1] - 4)  # tokens to remove, negative: the form that every version takes
    other = sequence(2, [16], 3)
    kept = torch.cat((PLAIN, sequence(4)), 1)[:, :keep]
    expected = text(torch.cat((kept, other), 1)).last_hidden_state[:, keep:]
    seen = Seen(model)
    torch.testing.assert_close(text(other, past_key_values=cache).last_hidden_state, expected, rtol=0, atol=2e-5)
    right = v2pe_position_ids(torch.cat((kept, other), 1), IMAGE_TOKEN, 0.25)[:, keep:]
    assert torch.equal(seen[0].float(), right)


@torch.no_grad()
def test_turns_of_a_batch_with_padding():
    """The second turn's mask covers both turns; rows ended their first answer at different tokens."""
    model = native_model("qwen3")
    patch(model, v2pe=0.25)
    first = torch.cat((sequence(3, [16], 10), sequence(9, [16], 4)))
    first_mask = torch.ones_like(first)
    first_mask[1, :4] = 0
    answer, answer_mask = torch.full((2, 3), 11), torch.tensor([[1, 1, 1], [1, 0, 0]])
    second = torch.cat((sequence(1, [16], 4), sequence(0, [16], 5)))
    text, seen, cache = language(model), Seen(model), DynamicCache()
    masks = torch.cat((first_mask, answer_mask, torch.ones_like(second)), 1)

    def run(ids, mask, past):
        at = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        text(ids, attention_mask=mask, position_ids=at, past_key_values=cache)

    run(first, first_mask, 0)
    for i in range(3):
        run(answer[:, i : i + 1], masks[:, : first.shape[1] + i + 1], first.shape[1] + i)
    run(second, masks, first.shape[1] + 3)
    whole = torch.cat((first, answer, second), 1)
    expected = v2pe_position_ids(whole, IMAGE_TOKEN, 0.25, attention_mask=masks)
    present = masks.bool()
    assert torch.equal(relative(torch.cat(seen, 1), present), relative(expected.double(), present))


@torch.no_grad()
def test_a_cache_that_is_not_known_is_refused():
    model, batch = native_model("qwen3"), inputs(((1,),))
    foreign = model(**batch, use_cache=True).past_key_values
    handle = patch(model, v2pe=0.25)
    text = language(model)
    with pytest.raises(ValueError, match="0 of them from calls with v2pe"):
        text(sequence(3), past_key_values=foreign)
    with pytest.raises(ValueError, match="0 of them from calls with v2pe"):
        model.generate(input_ids=torch.cat((batch["input_ids"], sequence(3)), 1), past_key_values=foreign)
    cache = DynamicCache()
    text(PLAIN, past_key_values=cache)
    handle.undo()
    text(sequence(3), past_key_values=cache)
    patch(model, v2pe=0.25)
    with pytest.raises(ValueError, match=f"{PLAIN.shape[1]} of them from calls with v2pe"):
        text(sequence(3), past_key_values=cache)
    handle.undo()
    cache.crop(PLAIN.shape[1] - filled(cache))
    text(sequence(1), past_key_values=cache)  # a single token that was not seen
    patch(model, v2pe=0.25)
    with pytest.raises(ValueError, match=f"{PLAIN.shape[1]} of them from calls with v2pe"):
        text(sequence(3), past_key_values=cache)
    with pytest.raises(TypeError, match="past_key_values: got a tuple"):
        text(sequence(3), past_key_values=((torch.ones(1), torch.ones(1)),))
    packed = DynamicCache()
    at = torch.cat((torch.arange(30), torch.arange(PLAIN.shape[1] - 30)))[None]
    text(PLAIN, position_ids=at, past_key_values=packed)
    with pytest.raises(ValueError, match="0 of them from calls with v2pe"):
        text(sequence(3), past_key_values=packed)
    rows = DynamicCache()
    text(PLAIN.expand(2, -1), past_key_values=rows)
    with pytest.raises(ValueError, match="got 3 rows, expected a multiple of the 2"):
        text(sequence(2).expand(3, -1), past_key_values=rows)


@torch.no_grad()
def test_embeddings_without_ids_are_refused():
    model, batch = native_model("qwen3"), inputs(((1,),))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    patch(model, v2pe=0.25)
    generate = functools.partial(model.generate, max_new_tokens=2)
    for call in (model, model.model, language(model), generate):
        with pytest.raises(ValueError, match="inputs_embeds: got embeddings without input_ids"):
            call(inputs_embeds=embeds)
    chat = chat_model("hub")
    patch(chat, v2pe=0.25)
    with pytest.raises(ValueError, match="inputs_embeds: got embeddings without input_ids"):
        chat.language_model.generate(inputs_embeds=embeds, max_new_tokens=2)
    chat.language_model.generate(input_ids=sequence(4), max_new_tokens=2)  # text by its ids


@torch.no_grad()
def test_generate_with_embeddings_beside_the_ids():
    model = native_model("qwen3")
    model.generation_config.eos_token_id = None
    patch(model, v2pe=0.25)
    seen = Seen(model)
    expected = model.generate(input_ids=PLAIN, **GREEDY)
    by_ids = list(seen)
    seen.clear()
    embeds = model.get_input_embeddings()(PLAIN)
    got = model.generate(input_ids=PLAIN, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(got[:, -5:], expected[:, -5:]) and all(map(torch.equal, seen, by_ids))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["native", *CHAT_KINDS])
def test_threads(kind):
    model = native_model("qwen3") if kind == "native" else chat_model(kind)
    batches = [
        inputs(((n,),), seed=n) if kind == "native" else chat_inputs(model, ((n,),), flags=True, seed=n)
        for n in (1, 2, 3, 4)
    ]
    patch(model, v2pe=0.25)
    calls = [(i, delta) for i in range(4) for delta in (1, "1/2", "1/4", "1/16")] * 2
    expected = {(i, delta): model(**batches[i], v2pe_delta=delta).logits for i, delta in calls}
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda call: model(**batches[call[0]], v2pe_delta=call[1]).logits, calls))
    wrong = [call for call, logits in zip(calls, got) if not torch.equal(logits, expected[call])]
    assert not wrong


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_static_cache(family, attention):
    if family == "gpt_oss" and attention == "sdpa":
        pytest.skip("GPT-OSS has no sdpa")
    model, batch = native_model(family), inputs(BATCH)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    patch(model, v2pe=0.25)
    seen = Seen(model)
    expected = model.generate(**batch, **GREEDY)
    dynamic = list(seen)
    seen.clear()
    assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation="static"), expected)
    present = batch["attention_mask"].bool()
    assert torch.equal(seen[0][present], dynamic[0][present])
    assert all(map(torch.equal, seen[1:], dynamic[1:]))


@torch.no_grad()
def test_masks_of_other_forms():
    model, batch = native_model("qwen3"), inputs(BATCH, padding="right")
    ids, present = batch["input_ids"], batch["attention_mask"].bool()
    patch(model, v2pe=0.25)
    seen = Seen(model)
    text, length = language(model), ids.shape[1]
    text(ids, attention_mask=present.long())
    causal = torch.ones(length, length, dtype=torch.bool).tril() & present[:, None, None, :]
    text(ids, attention_mask=causal)
    text(ids, attention_mask=torch.where(causal, 0.0, torch.finfo(torch.float32).min))
    for other in seen[1:]:
        assert torch.equal(other[present], seen[0][present])
    causal[0, 0, 9, 3] = False
    with pytest.raises(ValueError, match="attention_mask: got a mask that is not causal"):
        text(ids, attention_mask=causal)
    with pytest.raises(ValueError, match="attention_mask: got"):
        text(ids, attention_mask=present[:, 1:])
    # What padding sees is nobody's business: everything, for attention that must not meet a row of nothing.
    batch = inputs(BATCH)
    ids, present = batch["input_ids"], batch["attention_mask"].bool()
    causal = torch.ones(length, length, dtype=torch.bool).tril() & present[:, None, None, :]
    text(ids, attention_mask=present.long())
    text(ids, attention_mask=causal | ~present[:, None, :, None])
    assert torch.equal(seen[-1][present], seen[-2][present])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["native", "remote"])
def test_beams_of_different_rows(kind):
    """Rows of the same length whose images span different distances: each row's beams go on where that row ended."""
    ids = torch.cat((sequence(4, [32], 6), sequence(10, [16], 16)))
    ends = v2pe_position_ids(ids, IMAGE_TOKEN, 0.25)[:, -1]
    options = dict(max_new_tokens=4, do_sample=False, num_beams=3, attention_mask=torch.ones_like(ids))
    if kind == "native":
        model = native_model("qwen3")
        model.generation_config.eos_token_id = None
        options |= dict(input_ids=ids)
    else:
        model = chat_model("hub")
        pixels = chat_inputs(model, ((3,),))["pixel_values"]
        options |= dict(input_ids=ids, pixel_values=pixels)
    patch(model, v2pe=0.25)
    seen = Seen(model)
    model.generate(**options)
    decoded = [p[:, -1] for p in seen if p.shape[1] == 1]
    assert len(decoded) == 3
    for step, got in enumerate(decoded):
        assert got.tolist() == (ends.repeat_interleave(3) + step + 1).tolist()


@torch.no_grad()
def test_several_samples_of_a_row():
    model = native_model("qwen3")
    model.generation_config.eos_token_id = None
    ids = torch.cat((sequence(4, [32], 6), sequence(10, [16], 16)))
    ends = v2pe_position_ids(ids, IMAGE_TOKEN, 0.25)[:, -1]
    patch(model, v2pe=0.25)
    seen = Seen(model)
    model.generate(input_ids=ids, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert seen[-1][:, -1].tolist() == (ends.repeat_interleave(2) + 2).tolist()


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(prefill_chunk_size=7), dict(prompt_lookup_num_tokens=4)])
def test_other_ways_of_decoding(options):
    model = native_model("qwen3")
    model.generation_config.eos_token_id = 299  # transformers 4 cannot look up without one
    ids = torch.cat((PLAIN, sequence(6)), 1)
    try:
        model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **options)
    except ValueError as error:
        pytest.skip(f"this transformers cannot: {error}")
    patch(model, v2pe=0.25)
    seen = Seen(model)
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    where = torch.cat(seen, 1)[0].tolist()
    seen.clear()
    got = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **options)
    assert torch.equal(got, expected)
    # What was proposed and not accepted comes again.
    assert {tuple(p[0].tolist())[0] for p in seen} <= set(where) and len(seen) > 1
    assert max(float(p.max()) for p in seen) <= where[-1] + 4


@torch.no_grad()
def test_an_assistant():
    model, helper = native_model("qwen3"), native_model("qwen3", seed=1)
    model.generation_config.eos_token_id = helper.generation_config.eos_token_id = None
    options = dict(input_ids=PLAIN, max_new_tokens=8, do_sample=False)
    try:
        model.generate(**options, assistant_model=helper)
    except (AttributeError, NotImplementedError) as error:
        pytest.skip(f"this transformers cannot: {error}")
    patch(model, v2pe=0.25)
    patch(helper, v2pe=0.25)
    expected = model.generate(**options)
    assert torch.equal(model.generate(**options, assistant_model=helper), expected)


@torch.no_grad()
@pytest.mark.skipif(transformers.__version__.startswith(("5.0.", "5.1.")), reason="no second turn of Flash there")
def test_turns_of_flash():
    """Text is where it is without compression, also in a second turn with another image."""
    model = native_model("qwen3")
    randomize(flash := FlashVision(32, 48, 0.3, 0.1), seed=3)
    flash.attach(model)
    model.generation_config.eos_token_id = None
    first, new = inputs(((3,),)), inputs(((2,),), seed=5)
    patch(model, v2pe=0.25, flash=True)
    seen = Seen(model)
    result = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat((result.sequences, new["input_ids"]), 1)
    second = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=new["pixel_values"])
    whole = model.generate(**second, past_key_values=result.past_key_values, **GREEDY)
    got = torch.cat(list(seen), 1)[0].tolist()
    assert len(got) < whole.shape[1] - 1  # tiles were compressed, and nothing was computed twice
    at = v2pe_position_ids(whole, IMAGE_TOKEN, 0.25)[0, :-1]
    text = at[whole[0, :-1] != IMAGE_TOKEN].tolist()
    assert [p for p in got if p in text] == sorted(p for p in got if p in text) and set(text) <= set(got)
    assert got[-1] == text[-1]


@torch.no_grad()
def test_the_same_step_for_compressed_tiles():
    model = chat_model("hub", flash=(0.5, 0.0))
    batch = chat_inputs(model, ((4,),))
    spans = {}
    for flash in (False, True):
        for step in ("span", "same"):
            handle = patch(model, v2pe="1/16", flash=flash, v2pe_compressed_step=step)
            model.generate(**batch, **GREEDY)
            spans[flash, step] = handle.note("v2pe").report
            handle.undo()
    same, span = spans[True, "same"], spans[True, "span"]
    small = (batch["input_ids"].shape[1] - same.tokens[0]) // 192
    assert small and same.span[0] == span.span[0] - small * 192 / 16
    assert spans[False, "same"] == same and spans[False, "span"] == span
    with pytest.raises(ValueError, match="v2pe_compressed_step='half'"):
        patch(model, v2pe="1/16", v2pe_compressed_step="half")


@torch.no_grad()
def test_adapters_around_the_language_model():
    """`use_llm_lora` of the remote code puts the language model into PEFT, one level deeper."""
    peft = pytest.importorskip("peft")
    model = chat_model("repo")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    plain, batch = chat_model("repo"), chat_inputs(model, BATCH)
    model.language_model = peft.get_peft_model(model.language_model, config)
    handle = patch(model, v2pe=0.25, rope=True)
    assert {row.state for row in handle.report().rows} == {"patched"}
    patch(plain, v2pe=0.25)
    flags = chat_inputs(model, BATCH, flags=True)
    torch.testing.assert_close(model(**flags).logits, plain(**flags).logits, rtol=0, atol=2e-5)
    assert torch.equal(model.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY))


def test_asked_for_and_not_able_to_act():
    class Rotates(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary_emb = torch.nn.Identity()

    model = native_model("qwen2")
    language(model).layers[0].self_attn = Rotates()
    with pytest.warns(PatchWarning, match="v2pe: .* have a rotary_emb of their own: the answers are the stock ones"):
        handle = ivl_kernels.patch(model, v2pe=0.25)
    (row,) = [row for row in handle.report().rows if row.feature == "v2pe"]
    assert row.state == "refused"
    with pytest.raises(PatchError, match="v2pe: .* rotary_emb of their own"):
        ivl_kernels.patch(model, v2pe=0.25, strict=True)

    model = native_model("qwen2")
    del language(model).rotary_emb
    with pytest.warns(PatchWarning, match="v2pe: .* calls no rotary_emb .*: the answers are the stock ones"):
        ivl_kernels.patch(model, v2pe=0.25)
    with pytest.warns(PatchWarning, match="v2pe: nothing in this Qwen2Model is recognised"):
        ivl_kernels.patch(language(native_model("qwen2")), v2pe=0.25)


@torch.no_grad()
def test_a_language_model_put_in_later():
    model, batch = native_model("qwen3"), inputs(((1,),))
    handle = patch(model, v2pe=0.25)
    model.model.language_model = language(native_model("qwen3", seed=1))
    assert "does nothing" in handle.report().rows[0].detail
    with pytest.raises(RuntimeError, match="v2pe: the language model was replaced after patching"):
        model(**batch)


@torch.no_grad()
def test_a_trace_is_refused():
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = native_model("qwen3")

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    traced = Logits()
    patch(traced, v2pe=0.25)
    with pytest.raises(RuntimeError, match="v2pe: positions depend on the ids"):
        torch.jit.trace(traced, (PLAIN,))


@torch.no_grad()
def test_compiled():
    model = native_model("qwen3")
    patch(model, v2pe=0.25, rope=True)
    text = language(model)
    prompts = [PLAIN, PLAIN.flip(1), sequence(3, [80], 15)]
    expected = [text(ids, use_cache=False).last_hidden_state for ids in prompts]
    torch._dynamo.reset()
    graphs, counts = [], []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(text, backend=backend)
    for ids, right in zip(prompts, expected):
        torch.testing.assert_close(compiled(ids, use_cache=False).last_hidden_state, right, rtol=0, atol=2e-5)
        counts.append(len(graphs))
    assert counts[0] and counts[-1] == counts[0]  # nothing is compiled again for the shift of another call


@torch.no_grad()
@pytest.mark.parametrize("order", [[1, 0], [1, 1], [0, 1]])
def test_rows_of_a_cache_in_another_order_are_refused(order):
    model, batch = native_model("qwen3"), inputs(((2,), (1,)))
    patch(model, v2pe="1/16")
    cache = DynamicCache(config=model.config.get_text_config())
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    model(**batch, **{name: cache}, use_cache=True)
    cache.reorder_cache(torch.tensor(order))
    ids = torch.tensor([[5, 6], [7, 8]])
    mask = torch.cat((batch["attention_mask"], torch.ones_like(ids)), 1)
    if order == [0, 1]:
        model(input_ids=ids, attention_mask=mask, **{name: cache})
    else:
        with pytest.raises(ValueError, match="in another order"):
            model(input_ids=ids, attention_mask=mask, **{name: cache})


@torch.no_grad()
def test_padding_of_an_earlier_call_stays_padding():
    """A second turn whose mask has forgotten it: what is in the cache was placed as it was."""
    model = native_model("qwen3")
    handle = patch(model, v2pe=0.25)
    text, seen, reports = language(model), Seen(model), []
    first, second = sequence(9, [16], 4), sequence(1, [16], 4)
    mask = torch.ones(1, first.shape[1] + second.shape[1], dtype=torch.int64)
    mask[0, :4] = 0
    at = (mask.cumsum(1) - 1).clamp(min=0)
    for later in (mask, torch.ones_like(mask)):
        cache, past = DynamicCache(), first.shape[1]
        text(first, attention_mask=mask[:, :past], position_ids=at[:, :past], past_key_values=cache)
        text(second, attention_mask=later, position_ids=at[:, past:], past_key_values=cache)
        reports.append(str(handle.note("v2pe")))
    assert torch.equal(seen[3], seen[1])
    assert reports == ["46 tokens in 22 positions (24 saved), delta 0.25"] * 2


def test_a_call_reaches_the_language_model_once_any_part_of_it_does():
    state = _State(None, 0.25, "span", "")
    outer = state.enter(None)
    for reaches in (True, False):
        inner = state.enter(None)
        state.call.reached = reaches
        assert state.leave(inner) == reaches
    assert state.leave(outer)
