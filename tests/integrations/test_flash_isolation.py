"""Rows laid end to end: what upstream does with positions that restart, and that no row sees another."""

import inspect

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ivl_kernels
from ivl_kernels.integrations import PatchError
from ivl_kernels.models.families import family_of
from ivl_kernels.models.packed import leak, varlen_keywords
from ivl_kernels.models.upstream import is_cache
from ivl_kernels.nn import FlashVision
from tests.models import FAMILIES, chat_inputs, chat_model, inputs, native_model, randomize, text_config

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*past_key_values")
SLIDING = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)


def varlen(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, cu_seq_lens_k=None, **kwargs):
    """What a flash-attention library does with the starts of rows, in plain torch; without them one row sees all."""
    assert attention_mask is None
    bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling, enable_gqa=True
        )
        for a, b in zip(bounds, bounds[1:])
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.fixture
def flash_attention(monkeypatch):
    """Stands for flash-attention 2, which needs a GPU."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", varlen)


def model_of(family, attention):
    if family == "qwen3 sliding":
        model = native_model(text=text_config("qwen3", **SLIDING))
    elif family == "qwen3_moe":  # every expert serves every token: the products keep their shapes, so bits can be equal
        model = native_model(text=text_config("qwen3_moe", num_experts_per_tok=8))
    else:
        model = native_model(family)
    family_of(model).text.config._attn_implementation = attention
    randomize(flash := FlashVision(32, 48, 0.3, 0.1), seed=3)
    flash.attach(model)
    return model


def moved(text, **options):
    """How far a token of the first row moves the second row, in the decoder stack as it is."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 7, 48, generator=generator)
    other = embeds.clone()
    other[0, 1] += 1
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with torch.no_grad():
        outs = [
            text(inputs_embeds=x, position_ids=positions, **{k: v() for k, v in options.items()}).last_hidden_state
            for x in (embeds, other)
        ]
    return float((outs[0] - outs[1])[:, 4:].abs().max())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3 sliding"])
def test_leak_is_what_upstream_does(family, attention):
    text = family_of(model_of(family, attention)).text
    distance = moved(text, use_cache=lambda: False)
    # transformers' products over experts round by where a token comes to lie among the others.
    assert distance <= (1e-6 if family == "qwen3_moe" else 0) if leak(text) == "" else distance > 1e-3
    assert (leak(text) == "") == (family != "gpt_oss")
    # A cache or a mask, and position restarts say nothing: neither goes into a forward with rows end to end.
    assert moved(text, use_cache=lambda: True) > 1e-3
    name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(type(text).forward).parameters)
    assert moved(text, **{name: lambda: DynamicCache(config=text.config)}) > 1e-3
    assert moved(text, attention_mask=lambda: torch.ones(1, 7, dtype=torch.int64), use_cache=lambda: False) > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "qwen3 sliding", "chat qwen2", "chat qwen3"])
def test_a_token_of_one_row_moves_no_other(family, attention, flash_attention):
    """Outputs and gradients of the other rows stay equal bit for bit."""
    if family.startswith("chat"):
        model = chat_model("hub", family.split()[1], flash=(0.3, 0.1))
        family_of(model).text.config._attn_implementation = attention
        batch = chat_inputs(model, ((2,), (1,), (2,)), flags=True)
    else:
        model, batch = model_of(family, attention), inputs(((2,), (1,), (2,)))
    handle = ivl_kernels.patch(model, flash_forward="unpadded")
    refused = [row for row in handle.report().rows if row.feature == "flash" and row.state == "refused"]
    if (family, attention) == ("qwen3 sliding", "flash_attention_2"):
        assert "layer 1 of Qwen3Model has sliding_window" in refused[0].detail
        with pytest.raises(ValueError, match="flash_forward: got 'unpadded' and a batch of 3.*has sliding_window"):
            model(**batch)
        return
    assert not refused
    # transformers' own products over experts round by where a token comes to lie among the others.
    ours = any(row.feature == "moe" for row in handle.report().patched)
    exact = ours or family != "qwen3_moe"
    tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-3, atol=1e-3)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    where = int((changed["attention_mask"][1] == 0).sum()) + 2
    changed["input_ids"][1, where] = 7 + (changed["input_ids"][1, where] == 7)
    found = []
    for given in (batch, changed):
        model.zero_grad()
        logits = model(**given).logits[0]
        lengths = [int(given["attention_mask"][b].sum()) for b in range(3)]
        tokens = 256 if family.startswith("chat") else 16
        routing = handle.last_routing().images
        lengths = [n - (tokens - tokens // 4) * sum(image.compressed) for n, image in zip(lengths, routing)]
        assert sum(lengths) == len(logits)
        rows = logits.split(lengths)
        (rows[0].square().sum() + rows[2].square().sum()).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((rows, grads))
    (rows, grads), (others, other_grads) = found
    for b in (0, 2):
        torch.testing.assert_close(rows[b], others[b], **tolerance)
    assert (rows[1] - others[1]).abs().max() > 1e-3
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], **tolerance, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_refused_where_rows_see_each_other(attention):
    model = model_of("gpt_oss", attention)
    handle = ivl_kernels.patch(model, flash_forward="unpadded", moe=False)
    refused = [row for row in handle.report().rows if row.feature == "flash" and row.state == "refused"]
    assert len(refused) == 1 and "layer 0 of GptOssModel gets" in refused[0].detail
    with pytest.raises(ValueError, match="flash_forward: got 'unpadded' and a batch of 2.*GptOssModel gets"):
        model(**inputs(((2,), (1,))))
    one = inputs(((3,),))
    alone = model(**one).logits  # nothing to keep apart
    handle.undo()
    ivl_kernels.patch(model, flash_forward=True, moe=False)
    torch.testing.assert_close(alone, model(**one).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(PatchError, match="GptOssModel gets"):
        ivl_kernels.patch(model_of("gpt_oss", attention), flash_forward="unpadded", strict=True, moe=False)


@pytest.mark.parametrize("attention", ["flex_attention", "mine", "kernels-community/flash-attn"])
def test_refused_for_attention_that_is_not_known(attention, monkeypatch):
    model = model_of("qwen3", "eager")
    ivl_kernels.patch(model, flash_forward="unpadded")
    batch = inputs(((2,), (1,)))
    model(**batch)
    family_of(model).text.config._attn_implementation_internal = attention  # asked at the call
    with pytest.raises(ValueError, match=f"attention '{attention}' of Qwen3Model keeps rows apart is not known"):
        model(**batch)


def test_refused_with_a_cache_and_with_v2pe():
    model, batch = model_of("qwen3", "sdpa"), inputs(((2,), (1,)))
    ivl_kernels.patch(model, flash_forward="unpadded")
    cache = DynamicCache(config=model.config.get_text_config())
    assert is_cache(cache)
    name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(type(model).forward).parameters)
    with pytest.raises(ValueError, match=f"{name}: got a cache, expected none"):
        model(**batch, **{name: cache})
    other = model_of("qwen3", "sdpa")
    ivl_kernels.patch(other, flash_forward="unpadded", v2pe=1 / 4)
    with pytest.raises(ValueError, match="v2pe knows no rows end to end"):
        other(**batch)


def test_names_that_flash_attention_takes(monkeypatch):
    import transformers.modeling_flash_attention_utils as utils

    class Renamed:
        __annotations__ = {"q_starts": object, "max_length_q": object}

    starts = torch.tensor([0, 2], dtype=torch.int32)
    assert set(varlen_keywords(starts, 2)) <= set(utils.FlashAttentionKwargs.__annotations__)
    monkeypatch.setattr(utils, "FlashAttentionKwargs", Renamed)
    with pytest.raises(
        ValueError, match="takes q_starts, max_length_q, not cu_seq_lens_q, cu_seq_lens_k, max_length_k"
    ):
        varlen_keywords(starts, 2)
    model = model_of("qwen3", "flash_attention_2")
    assert "takes q_starts" in leak(family_of(model).text)


def test_sinks_under_flash_attention_are_not_known(flash_attention):
    text = text_config("gpt_oss", layer_types=["full_attention", "full_attention"])
    model = native_model(text=text)
    try:
        family_of(model).text.config._attn_implementation = "flash_attention_2"
    except ValueError as error:
        pytest.skip(f"this transformers refuses it itself: {error}")
    assert "has sinks" in leak(family_of(model).text)
