"""Attention of the vision transformer and the language model on the package's kernel."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ivl_kernels
from ivl_kernels import ops
from ivl_kernels.integrations import attention as adapter
from ivl_kernels.integrations._edit import Editor
from ivl_kernels.integrations._patch import features
from ivl_kernels.testing import assert_accurate, tiny
from tests.against_plain import cache_in, cache_names
from tests.models import chat_model, inputs, native_model

BATCH = ((2,), (1, 1), ())


def patch(model, **options):
    others = {n: False for n, f in features().items() if n != "attention" and not f.option}
    return ivl_kernels.patch(model, attention=True, **others, **options)


@pytest.fixture
def calls(monkeypatch):
    seen = []
    monkeypatch.setattr(adapter, "attention", lambda *a, **k: seen.append(a[0].shape) or ops.attention(*a, **k))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_answers_and_gradients(dtype, calls):
    model = native_model("qwen3", dtype=dtype)
    pixels = inputs(BATCH, dtype=dtype)["pixel_values"]
    vision = model.model.vision_tower
    wide = copy.deepcopy(vision).double()

    def run(module, x):
        module.zero_grad(set_to_none=True)
        out = module(pixel_values=x).last_hidden_state
        out.float().square().mean().backward()
        return out.detach(), {name: p.grad for name, p in module.named_parameters()}

    exact, wide_grads = run(wide, pixels.double())
    plain, grads = run(vision, pixels)
    handle = patch(model, strict=True)
    got, ours = run(vision, pixels)
    assert len(calls) == len(vision.encoder.layer) and handle.report().patched[0].detail.startswith("cpu")
    assert_accurate(got, exact, plain)
    for name, grad in grads.items():
        assert (grad is None) == (ours[name] is None), name
        if grad is not None:
            error, usual = ((g.double() - wide_grads[name]).norm() for g in (ours[name], grad))
            assert error <= 2 * usual + 1e-6 * wide_grads[name].norm(), name
    handle.undo()
    assert torch.equal(vision(pixel_values=pixels).last_hidden_state, plain)


@pytest.fixture
def another(monkeypatch):
    """A function of somebody else in transformers' table."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "another", lambda *a, **k: stock(*a, **k))
    return "another"


@torch.no_grad()
def test_what_else_was_chosen_is_upstreams(calls, another):
    model = native_model("qwen3")
    pixels = inputs(BATCH)["pixel_values"]
    vision = model.model.vision_tower
    handle = patch(model)
    model.set_attn_implementation(another)
    expected = native_model("qwen3")
    expected.set_attn_implementation(another)
    plain = expected.model.vision_tower(pixel_values=pixels).last_hidden_state
    assert torch.equal(vision(pixel_values=pixels).last_hidden_state, plain)
    assert not calls and "another was chosen" in str(handle.report())
    handle.undo()
    assert {row.state for row in patch(model).report().rows if row.feature == "attention"} == {"upstream"}
    model.set_attn_implementation("sdpa")
    patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        vision(pixel_values=pixels)
    assert not calls
    with FlopCounterMode(display=False):  # who counts operations counts torch's
        vision(pixel_values=pixels)
    assert not calls
    vision(pixel_values=pixels)
    assert calls and set(calls) == {(len(pixels), 65, 2, 16)}


@torch.no_grad()
def test_eager(calls):
    """Served too: with the same answers, and the weights for whoever asks."""
    models = native_model("qwen3"), native_model("qwen3")
    batch = inputs(((2,),))  # a padded row's mask is upstream's
    for model in models:
        model.set_attn_implementation("eager")
    plain = models[0](**batch).logits
    patch(models[1], strict=True)
    got = models[1](**batch).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(got[seen], plain[seen], rtol=0, atol=2e-5)
    assert calls
    ids = torch.randint(1, 280, (1, 9))
    weights, ours = (m.model.language_model(input_ids=ids, output_attentions=True).attentions for m in models)
    assert len(ours) == 2 and all(map(torch.equal, ours, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["repo", "hub", "normalised"])
def test_remote_code_spells_attention_out(kind, dtype, calls):
    options = dict(vision=dict(norm_type="rms_norm", qk_normalization=True)) if kind == "normalised" else {}
    model = chat_model("hub" if kind == "normalised" else kind, dtype=dtype, **options).vision_model
    wide, pixels = copy.deepcopy(model).double(), torch.randn(3, 3, 64, 64).to(dtype)

    def run(module, x):
        module.zero_grad(set_to_none=True)
        out = module(pixel_values=x).last_hidden_state
        out.float().square().mean().backward()
        return out.detach(), {name: p.grad for name, p in module.named_parameters()}

    exact, wide_grads = run(wide, pixels.double())
    plain, grads = run(model, pixels)
    for layer in adapter._spelled(model):
        Editor(("test", "")).method(layer, adapter._method(layer), adapter._spelled_forward(""))
    got, ours = run(model, pixels)
    assert len(calls) == 2
    assert_accurate(got, exact, plain)
    for name, grad in grads.items():
        if grad is not None:
            error, usual = ((g.double() - wide_grads[name]).norm() for g in (ours[name], grad))
            assert error <= 2 * usual + 1e-6 * wide_grads[name].norm(), name


class Spelled(torch.nn.Module):
    """Attention as the released checkpoints spell it out, and variants of it."""

    def __init__(self, change="", dropout=0.0):
        super().__init__()
        self.scale, self.change = 0.25, change
        self.attn_drop = torch.nn.Dropout(dropout)
        self.qkv = torch.nn.Linear(32, 96)

    def _naive_attn(self, x):
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * self.scale) @ k.transpose(-2, -1)
        if self.change == "mask":
            weights = weights + torch.ones(tokens, tokens).tril().log()
        weights = weights.softmax(dim=-2 if self.change == "dim" else -1)
        if self.change == "weights":
            weights = weights * 2
        weights = self.attn_drop(weights)
        return (weights @ v).transpose(1, 2).reshape(rows, tokens, width)

    def forward(self, x):
        return self._naive_attn(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", ["", "mask", "dim", "weights", "dropout", "wide"])
def test_what_else_is_spelled_out(change, training, calls):
    module = Spelled(change, 0.5 if change == "dropout" else 0.0).train(training)
    x = torch.randn(2, 9, 32)
    if change == "wide":
        module, x = module.double(), x.double()
    torch.manual_seed(1)
    plain = module(x)
    assert adapter._spelled(module) == [module]
    Editor(("test", "")).method(module, adapter._method(module), adapter._spelled_forward(""))
    torch.manual_seed(1)
    got = module(x)
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-6)
    assert bool(calls) == (change == "" or change == "dropout" and not training)


def test_remote_code_is_reported():
    vision, text = (row for row in patch(chat_model("hub"), strict=True).report().rows if row.feature == "attention")
    assert vision.state == text.state == "patched" and vision.detail.startswith("cpu")


@torch.no_grad()
def test_tokens_with_everything():
    model, batch = native_model("qwen3"), inputs(BATCH)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    tokens = model.generate(**batch, **options)
    ivl_kernels.patch(model, attention=True, linear=True)
    assert torch.equal(model.generate(**batch, **options), tokens)


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
def test_a_function_of_somebody_else_under_this_name(before, calls, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = native_model("qwen3")
    pixels = inputs(BATCH)["pixel_values"]
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def twice(*args, **kwargs):
        out, weights = stock(*args, **kwargs)
        return 2 * out, weights

    if not before:
        patch(model)
    ALL_ATTENTION_FUNCTIONS.register("sdpa", twice)
    try:
        if before:
            patch(model)
        got = model.model.vision_tower(pixel_values=pixels).last_hidden_state
        expected = native_model("qwen3").model.vision_tower(pixel_values=pixels).last_hidden_state
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", stock)
    assert torch.equal(got, expected) and not calls


LENGTHS = (9, 40)  # within the sliding window of a tiny model, and beyond it


@pytest.fixture
def meanings(monkeypatch):
    """(queries, keys, causal, window, sinks) of every call that is served."""
    seen = []

    def served(q, k, v, *, causal, window, sinks, **options):
        seen.append((q.shape[1], k.shape[1], causal, window, sinks is not None))
        return ops.attention(q, k, v, causal=causal, window=window, sinks=sinks, **options)

    monkeypatch.setattr(adapter, "attention", served)
    return seen


def text_model(name, dtype=torch.float32):
    text = tiny.text_config(name, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = native_model(name, dtype=dtype, text=text).model.language_model
    if name == "gpt_oss":
        model.config._experts_implementation = "eager"
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt_oss"])
def test_language(name, length, dtype, meanings):
    model = text_model(name, dtype)
    wide = copy.deepcopy(model).double()
    ids = torch.randint(1, 280, (2, length))

    def run(module, **given):
        module.zero_grad(set_to_none=True)
        out = module(input_ids=ids, use_cache=False, **given).last_hidden_state
        out.double().square().mean().backward()
        return out.detach(), {name: p.grad for name, p in module.named_parameters()}

    exact, wide_grads = run(wide)
    plain, grads = run(model)
    handle = patch(model, strict=True)
    got, ours = run(model)
    windows = {None, model.config.sliding_window} if name == "gpt_oss" and length > 16 else {None}
    assert {m[3] for m in meanings} == windows and all(m[2] and m[4] == (name == "gpt_oss") for m in meanings)
    assert len(meanings) == len(model.layers)
    assert_accurate(got, exact, plain)
    for key, grad in grads.items():
        if grad is None:
            assert ours[key] is None, key
        elif dtype == torch.float32 or name != "gpt_oss":  # which expert wins a near tie is rounding
            error, usual = ((g.double() - wide_grads[key]).norm() for g in (ours[key], grad))
            assert error <= 2 * usual + 1e-5 * wide_grads[key].norm(), key
    handle.undo()
    assert torch.equal(run(model)[0], plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_with_a_cache(name, meanings):
    """A prompt, tokens one by one past the window, then several at once: every step is served."""
    plain, model = text_model(name), text_model(name)
    patch(model)
    ours = theirs = None
    sinks = name == "gpt_oss"
    for count in (20, 1, 1, 5):
        ids = torch.randint(1, 280, (1, count))

        def step(model, cache):
            given = {} if cache is None else {cache_names(model)[0]: cache}
            output = model(input_ids=ids, use_cache=True, **given)  # noqa: B023
            return output.last_hidden_state, cache_in(output)

        expected, theirs = step(plain, theirs)
        meanings.clear()
        got, ours = step(model, ours)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        assert len(meanings) == len(model.layers) and all(m[4] == sinks for m in meanings), count


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_masks_that_mean_something_else(name, meanings):
    """Padding, packed rows and masks by hand go to upstream's function."""
    model = text_model(name)
    ids = torch.randint(1, 280, (2, 9))
    padded = torch.ones(2, 9, dtype=torch.int64)
    padded[0, :3] = 0
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    free = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril(2)
    slope = torch.zeros(2, 1, 9, 9).masked_fill(~free.tril(), -1e4) - 0.5 * torch.arange(9)
    calls = [dict(attention_mask=padded)]
    if name == "qwen3":  # GPT-OSS does not part packed rows
        calls.append(dict(position_ids=packed, use_cache=False))
    calls += [dict(attention_mask={kind: mask for kind in ("full_attention", "sliding_attention")})
              for mask in ((free, slope) if name == "qwen3" else (slope,))]  # fmt: skip
    expected = [model(input_ids=ids, **given).last_hidden_state for given in calls]
    patch(model)
    for given, plain in zip(calls, expected):
        assert torch.equal(model(input_ids=ids, **given).last_hidden_state, plain)
    assert not meanings
    whole = dict(attention_mask=torch.ones(2, 9, dtype=torch.int64))
    model(input_ids=ids, **whole)
    assert len(meanings) == len(model.layers)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bool", "whole", "nan"])
def test_masks_by_hand(kind, implementation, meanings):
    """Eager attention adds a mask of any kind to its scores; a number that is none is nobody's to leave out."""
    model = text_model("qwen3")
    model.set_attn_implementation(implementation)
    ids = torch.randint(1, 280, (1, 9))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    if kind == "whole":
        mask = mask.long()
    elif kind == "nan":
        mask = torch.zeros(1, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
        mask[..., 3, 5] = torch.nan

    def run():
        try:
            return model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        except RuntimeError as error:
            return str(error)

    expected = run()
    patch(model)
    got = run()
    served = kind == "bool" and implementation == "sdpa"
    assert bool(meanings) == served
    if served:
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    elif isinstance(expected, str):
        assert got == expected
    else:
        assert torch.equal(got.nan_to_num(-1e9), expected.nan_to_num(-1e9))


def test_a_mask_that_is_learned():
    model = text_model("qwen3")
    ids, grads = torch.randint(1, 280, (1, 9)), []
    for patched in (False, True):
        if patched:
            patch(model)
        mask = torch.zeros(1, 1, 9, 9, requires_grad=True)
        out = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        grads += torch.autograd.grad(out.square().mean(), mask)
    assert torch.equal(*grads)


@torch.no_grad()
def test_who_looks_at_the_weights_of_eager_attention(meanings):
    model = text_model("gpt_oss")
    ids = torch.randint(1, 280, (1, 9))
    expected = model(input_ids=ids, output_attentions=True).attentions
    model = text_model("gpt_oss")
    patch(model)
    model(input_ids=ids)
    assert meanings
    meanings.clear()
    got = model(input_ids=ids, output_attentions=True).attentions
    assert len(got) == len(model.layers) and all(torch.equal(a, b) for a, b in zip(got, expected)) and not meanings


@torch.no_grad()
def test_compiled_and_dropped_out(meanings):
    model = text_model("qwen3")
    ids = torch.randint(1, 280, (1, 9))
    plain = model(input_ids=ids, use_cache=False).last_hidden_state
    patch(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).last_hidden_state, plain, rtol=0, atol=1e-5)
    model.train()
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.5
    model(input_ids=ids)
    assert not meanings


def taken(q, mask=None, *rest, has_sinks=False, **options):
    """Whether the call is upstream's."""
    attend = adapter._attend(lambda *a, **k: "stock", "", False, has_sinks)
    return attend(None, q, q, q, mask, *rest, **options) == "stock"


def test_only_known_attention_is_served():
    q = torch.randn(2, 3, 5, 16)
    for options in ({}, dict(is_causal=None), dict(is_causal=True), dict(is_causal=False, dropout=0.0, scaling=0.3)):
        assert not taken(q, **options)
    for options in (dict(dropout=0.1), dict(softcap=1.0), dict(output_attentions=True), dict(s_aux=torch.zeros(3))):
        assert taken(q, is_causal=False, **options)
    assert taken(q, torch.zeros(5, 5), is_causal=False) and taken(q, None, 1, is_causal=False)
    assert taken(q, has_sinks=True) and not taken(q, has_sinks=True, s_aux=torch.zeros(3))
    assert taken(q, has_sinks=True, s_aux=torch.zeros(3).bfloat16())
    assert taken(q, is_causal=False, scaling=torch.tensor(0.3, requires_grad=True))
    assert taken(q, torch.ones(3, 1, 5, 5, dtype=torch.bool)) and not taken(q, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    for width in (0, 12, 264):
        assert taken(torch.randn(2, 3, 5, width), is_causal=False)
    for x in (q[0], q.double(), nn.Parameter(q), q.to("meta")):
        assert taken(x, is_causal=False)
