"""Rotary patches on native models, against the unpatched models."""

import pytest
import torch
import transformers
from models import FAMILIES, inputs, native_model

import ivl_kernels
from ivl_kernels.integrations._patch import features as registered

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
