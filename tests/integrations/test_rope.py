"""Rotary patches on native models, against the unpatched models."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

import ivl_kernels
from ivl_kernels.integrations._patch import features as registered
from tests.models import FAMILIES, inputs, native_model, text_config

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


def language(model):
    return model.model.language_model


@torch.no_grad()
def test_hooks_see_what_they_saw():
    model, batch = native_model("qwen3"), inputs(BATCH)
    attention = language(model).layers[1].self_attn
    seen = []
    attention.q_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    attention.q_norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**batch)
    only_rope(model)
    model(**batch)
    assert len(seen) == 4  # the hooked norm is still called
    for before, after in zip(seen[:2], seen[2:]):
        torch.testing.assert_close(after, before, rtol=0, atol=2e-5)


class Keeps(torch.nn.Linear):
    """A projection that hands out the same memory again for the same input."""

    kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = super().forward(x)
        return self.kept


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
@pytest.mark.parametrize("how", ["hook", "global hook", "subclass", "replaced forward"])
def test_what_somebody_holds_is_not_written_to(family, name, how):
    model, batch = native_model(family), inputs(BATCH)
    ids = batch["input_ids"]
    projection = getattr(language(model).layers[0].self_attn, name)
    expected = language(model)(ids).last_hidden_state
    only_rope(model)
    held, handle = [], None

    def keep(module, args, output):
        if module is projection:
            held.append((output, output.clone()))

    if how == "hook":
        handle = projection.register_forward_hook(keep)
    elif how == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(keep)
    elif how == "subclass":
        projection.__class__ = Keeps
    else:
        memory = {}
        projection.forward = lambda x: memory.setdefault("y", torch.nn.functional.linear(x, *projection.parameters()))
    try:
        for _ in range(2):
            got = language(model)(ids).last_hidden_state
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    finally:
        if handle is not None:
            handle.remove()
    assert len(held) == (2 if "hook" in how else 0)
    assert all(torch.equal(output, copy) for output, copy in held)


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-12, 0.3])
def test_the_eps_of_the_norms(eps):
    model, batch = native_model("qwen3", text=text_config("qwen3", rms_norm_eps=eps)), inputs(BATCH)
    for layer in language(model).layers:  # so small that eps counts
        layer.self_attn.q_proj.weight.mul_(1e-3)
        layer.self_attn.k_proj.weight.mul_(1e-3)
    expected = model(**batch).logits
    only_rope(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_norms_of_two_eps():
    model, batch = native_model("qwen3"), inputs(BATCH)
    for layer in language(model).layers:
        layer.self_attn.k_norm.variance_epsilon = 0.4
    expected = model(**batch).logits
    only_rope(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_float64_is_as_exact_as_upstream():
    """Whose norms are in float32 even then."""
    model, batch = native_model("qwen3").double(), inputs(BATCH, dtype=torch.float64)
    expected = model(**batch).logits
    only_rope(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("body, norms", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("autocast", [False, True])
def test_norms_of_another_dtype(body, norms, autocast):
    model, batch = native_model("qwen3", dtype=body), inputs(BATCH)
    for layer in language(model).layers:
        layer.self_attn.q_norm.to(norms)
        layer.self_attn.k_norm.to(norms)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return language(model)(batch["input_ids"]).last_hidden_state

    try:
        expected = run()
    except RuntimeError as error:  # upstream's attention does not take query and value of two dtypes
        only_rope(model)
        with pytest.raises(RuntimeError, match=str(error)[:30]):
            run()
        return
    only_rope(model)
    assert torch.equal(run(), expected)


@torch.no_grad()
def test_compiled_layers_have_their_own_norms():
    model, batch = native_model("qwen3"), inputs(BATCH)
    for i, layer in enumerate(language(model).layers):
        layer.self_attn.q_norm.weight.mul_(1 + i)
        layer.self_attn.k_norm.weight.mul_(2 - i / 2)
    embeds = language(model).embed_tokens(batch["input_ids"])
    expected = language(model)(inputs_embeds=embeds, use_cache=False).last_hidden_state
    only_rope(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(sum("v2pe_rope" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(language(model), backend=backend, fullgraph=True)
    for _ in range(2):
        got = compiled(inputs_embeds=embeds, use_cache=False).last_hidden_state
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert graphs == [2]


@torch.no_grad()
def test_two_models_in_two_threads():
    models = [native_model(family, seed=seed) for family, seed in (("qwen3", 0), ("qwen3", 1), ("qwen2", 2))]
    batches = [inputs(BATCH, seed=seed) for seed in range(3)]
    for model in models:
        only_rope(model)
    expected = [model(**batch).logits for model, batch in zip(models, batches)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(4):
            got = list(pool.map(lambda i: models[i](**batches[i]).logits, range(3)))
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_functional_transforms(family):
    model, batch = native_model(family), inputs(BATCH)
    text = language(model)
    model.set_attn_implementation("eager")  # torch has no forward derivative of the other
    embeds = text.embed_tokens(batch["input_ids"]).detach()
    change = torch.randn_like(embeds)

    def run(x):
        return text(inputs_embeds=x, use_cache=False).last_hidden_state

    def results():
        weights = dict(text.named_parameters())

        def loss(weights):
            options = dict(inputs_embeds=embeds, use_cache=False)
            return torch.func.functional_call(text, weights, kwargs=options).last_hidden_state.square().mean()

        return [
            *torch.func.jvp(run, (embeds,), (change,)),
            torch.func.grad(lambda x: run(x).square().mean())(embeds),
            *torch.func.grad(loss)(weights).values(),
        ]

    expected = results()
    patch(model, rope=True, projector=True, packing=True)
    for got, right in zip(results(), expected):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(embeds, change)
        tangent = torch.autograd.forward_ad.unpack_dual(run(dual)).tangent
    torch.testing.assert_close(tangent, expected[1], rtol=1e-4, atol=1e-5)


def test_layers_that_rotate_by_themselves_are_refused():
    """InternLM2 has its rotation in a layer's `attention`; the stack is built of other names throughout."""

    class InternLM2Attention(torch.nn.Module):
        pass

    class InternLM2DecoderLayer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = InternLM2Attention()

    class InternLM2Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tok_embeddings = torch.nn.Embedding(4, 4)
            self.layers = torch.nn.ModuleList([InternLM2DecoderLayer()])

    with pytest.warns(ivl_kernels.integrations._patch.PatchWarning, match="nothing was patched"):
        handle = ivl_kernels.patch(InternLM2Model())
    (row,) = [r for r in handle.report().rows if r.feature == "rope"]
    assert row.state == "refused" and "InternLM2DecoderLayer has no self_attn" in row.detail


@torch.no_grad()
def test_one_projection_for_q_k_and_v():
    kind = transformers.Phi3Config
    config = kind(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    expected = model(ids).logits
    only_rope(model)
    assert torch.equal(model(ids).logits, expected)


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


@torch.no_grad()
@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "eager_attention_forward"])
def test_names_of_the_module_that_change_after_patching_count(name, monkeypatch):
    from transformers.models.qwen3 import modeling_qwen3

    stock = getattr(modeling_qwen3, name)

    def other(*args, **kwargs):
        first, second = stock(*args, **kwargs)
        return 2 * first, second

    model, batch = native_model("qwen3"), inputs(BATCH)
    model.set_attn_implementation("eager")
    only_rope(model)
    monkeypatch.setattr(modeling_qwen3, name, other)
    plain = native_model("qwen3")
    plain.set_attn_implementation("eager")
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
