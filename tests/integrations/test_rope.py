"""Rotary and V2PE patches on native and remote-code models, against the unpatched models."""

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


def only_rope(model):
    return patch(model, rope=True)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_answers(family, dtype):
    model, batch = native_model(family, dtype=dtype), inputs(BATCH, dtype=dtype)
    expected, tokens = model(**batch).logits, model.generate(**batch, **GREEDY)
    handle = only_rope(model)
    assert [r.state for r in handle.report().rows if r.feature == "rope"] == ["patched"]
    got = model(**batch).logits
    if family in ("qwen2", "gpt_oss"):  # no norm: the very same arithmetic
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 if dtype == torch.float32 else 0.25)
    if dtype == torch.float32:
        assert torch.equal(model.generate(**batch, **GREEDY), tokens)
        assert torch.equal(model.generate(**batch, **GREEDY, num_beams=2)[:, :5], tokens[:, :5])
    handle.undo()
    assert torch.equal(model(**batch).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_and_outputs(implementation):
    model, batch = native_model("qwen3"), inputs(BATCH)
    model.set_attn_implementation(implementation)
    options = dict(output_attentions=implementation == "eager", output_hidden_states=True)
    expected = model(**batch, **options)
    only_rope(model)
    got = model(**batch, **options)
    for g, e in zip(got.hidden_states, expected.hidden_states):
        torch.testing.assert_close(g, e, rtol=0, atol=2e-5)
    if implementation == "eager":
        torch.testing.assert_close(got.attentions[1], expected.attentions[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_gradients(family):
    model, batch = native_model(family), inputs(BATCH)
    model.train()

    def gradients():
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    handle = only_rope(model)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        got = gradients()
        assert set(got) == set(expected)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)
    handle.undo()


@torch.no_grad()
def test_hooks_see_what_they_saw():
    model, batch = native_model("qwen3"), inputs(BATCH)
    attention = model.model.language_model.layers[1].self_attn
    seen = []
    attention.q_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    attention.q_norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**batch)
    only_rope(model)
    model(**batch)
    assert len(seen) == 4  # the hooked norm is still called
    for before, after in zip(seen[:2], seen[2:]):
        torch.testing.assert_close(after, before, rtol=0, atol=2e-5)


def test_internlm3_and_unknown_structures():
    from transformers.models.llama.modeling_llama import LlamaAttention

    class InternLM3Attention(LlamaAttention):
        pass

    class Clipped(LlamaAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
            return super().forward(hidden_states.clamp(-1, 1), position_embeddings, attention_mask, **kwargs)

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    for layer in model.model.layers:
        layer.self_attn.__class__ = InternLM3Attention
    expected = model(ids).logits
    handle = only_rope(model)
    assert torch.equal(model(ids).logits, expected)
    handle.undo()
    model.model.layers[1].self_attn.__class__ = Clipped
    with pytest.warns(ivl_kernels.integrations._patch.PatchWarning, match="nothing was patched"):
        handle = only_rope(model)
    (row,) = [r for r in handle.report().rows if r.feature == "rope"]
    assert row.state == "refused" and "the forward of Clipped does not call" in row.detail


def test_only_this_instance():
    from transformers.models.qwen3 import modeling_qwen3

    before = dict(vars(modeling_qwen3)), modeling_qwen3.Qwen3Attention.forward
    model, other = native_model("qwen3"), native_model("qwen3")
    only_rope(model)
    assert vars(modeling_qwen3) == before[0] and modeling_qwen3.Qwen3Attention.forward is before[1]
    assert "forward" not in vars(other.model.language_model.layers[0].self_attn)


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
