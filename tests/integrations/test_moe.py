"""Experts of Qwen3-MoE and GPT-OSS models, alone and inside InternVL, patched and plain."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from models import inputs, native_model, randomize, text_config
from torch import nn

from ivl_kernels.integrations import PatchError, experts, patch, patched
from ivl_kernels.integrations._patch import PatchWarning
from ivl_kernels.nn import FusedExperts

FAMILIES = ("qwen3_moe", "gpt_oss")
V5 = int(transformers.__version__.split(".")[0]) >= 5
only_5 = pytest.mark.skipif(not V5, reason="stacked experts with an interface are of transformers 5")
MOE = dict(projector=False, packing=False, flash=False, rope=False, moe=True)


@pytest.fixture
def served(monkeypatch):
    """How many calls the ops have served since the last question."""
    calls = []
    for name in ("moe_experts", "moe_experts_list"):
        op = getattr(experts, name)
        monkeypatch.setattr(experts, name, lambda *args, op=op, **kwargs: (calls.append(op), op(*args, **kwargs))[1])

    def count():
        number = len(calls)
        calls.clear()
        return number

    return count


@pytest.fixture(autouse=True, scope="module")
def _known():
    """Classes are judged once, by the ops too: not while their calls are counted."""
    for family in FAMILIES:
        patch(language_model(family), **MOE)


def language_model(family, dtype=torch.float32, **changes):
    kind = transformers.Qwen3MoeForCausalLM if family == "qwen3_moe" else transformers.GptOssForCausalLM
    return randomize(kind(text_config(family, **changes))).to(dtype).eval()


def tokens(batch=2, length=13, seed=0):
    return torch.randint(1, 290, (batch, length), generator=torch.Generator().manual_seed(seed))


def rows(handle):
    return [row for row in handle.report().rows if row.feature == "moe" and row.what == "experts"]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_language_model(family):
    model, ids = language_model(family), tokens()
    with torch.no_grad():
        plain = model(ids).logits
        with patched(model, strict=True, **MOE) as handle:
            got = model(ids).logits
            assert [row.state for row in rows(handle)] == ["patched"] * 2
            assert all("native" in row.detail for row in rows(handle))
        after = model(ids).logits
    close(got, plain)
    assert not torch.equal(got, plain) or family == "qwen3_moe"
    assert torch.equal(after, plain)


@only_5
@pytest.mark.parametrize("family", FAMILIES)
def test_inside_internvl(family):
    model, batch = native_model(family), inputs(((2,), (1,)))
    with torch.no_grad():
        plain = model(**batch).logits
        with patched(model, strict=True, **MOE):
            got = model(**batch).logits
        generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
        with patched(model, **MOE):
            assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), generated)
    close(got, plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(family, checkpointing):
    model, ids = language_model(family), tokens()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()

    def step():
        model.zero_grad()
        out = model(ids, labels=ids, output_router_logits=True)
        out.loss.backward()
        return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, expected = step()
    with patched(model, **MOE):
        got, slopes = step()
    close(got.loss, plain.loss)
    close(got.aux_loss, plain.aux_loss)
    assert len(got.router_logits) == len(plain.router_logits) == 2
    for a, b in zip(got.router_logits, plain.router_logits):
        close(a, b)
    assert slopes.keys() == expected.keys()
    for name in expected:
        close(slopes[name], expected[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family):
    model, ids = language_model(family, torch.bfloat16), tokens()
    truth = copy.deepcopy(model).float()
    with torch.no_grad():
        plain, exact = model(ids).logits, truth(ids).logits
        with patched(model, **MOE):
            got = model(ids).logits
    assert got.dtype == torch.bfloat16
    # The middle token's error: a rounding can send a token to another expert.
    error, usual = ((logits.float() - exact).norm(dim=-1).median() for logits in (got, plain))
    assert error <= 1.5 * usual


@pytest.mark.skipif(V5, reason="4.57 keeps a list of experts")
def test_list_of_experts_changed_later():
    """An expert layer that is no longer plain when the model runs is left to transformers."""
    model, ids = language_model("qwen3_moe"), tokens()
    handle = patch(model, **MOE)

    class Half(nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x)

    experts = model.model.layers[0].mlp.experts
    experts[0].down_proj.__class__ = Half
    with torch.no_grad():
        got = model(ids).logits
        handle.undo()
        close(got, model(ids).logits)
    refused = [row.detail for row in rows(patch(model, **MOE)) if row.state == "refused"]
    assert len(refused) == 1 and "Half" in refused[0]


@only_5
@pytest.mark.parametrize("family", FAMILIES)
def test_only_this_model(family, served):
    """A config that two models share stays as it is; copies and pickles are what the framework promises."""
    model, ids = language_model(family), tokens()
    other = type(model)(model.config).eval()
    state, config, implementation = list(model.state_dict()), str(model.config), model.config._experts_implementation
    handle = patch(model, **MOE)
    experts = model.model.layers[0].mlp.experts
    assert experts.config is model.config and str(model.config) == config
    assert model.config._experts_implementation == implementation
    assert list(model.state_dict()) == state
    twin, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    part = copy.deepcopy(experts)
    assert part.config is not model.config and not hasattr(part, "model")
    handle.undo()
    assert "_ivl" not in vars(model) and "_ivl" not in vars(experts)
    with torch.no_grad():
        plain, theirs = model(ids).logits, other(ids).logits
        assert torch.equal(unpickled(ids).logits, plain) and served() == 0
        close(twin(ids).logits, plain)
        assert served() == 2
        patch(model, **MOE)
        assert torch.equal(other(ids).logits, theirs) and served() == 0


@only_5
def test_implementation_by_name(served):
    import ivl_kernels.integrations.experts  # noqa: F401

    model, ids = language_model("qwen3_moe"), tokens()
    with torch.no_grad():
        plain = model(ids).logits
        patch(model, **MOE).undo()  # registers the name
        try:
            model.set_experts_implementation("ivl")
        except ValueError:  # the first releases know only their own names
            model.config._experts_implementation = "ivl"
        close(model(ids).logits, plain)
        assert served() == 2
        with torch.autocast("cpu", torch.float16):  # not ours where weights are of another 16-bit type
            model.bfloat16()(ids)
        assert served() == 0


def choose_same(model):
    model.set_experts_implementation(model.config._experts_implementation)


def choose_eager(model):
    model.set_experts_implementation("eager")


def choose_below(model):
    model.model.set_experts_implementation("eager")


@only_5
@pytest.mark.parametrize("choose", [choose_same, choose_eager, choose_below])
def test_later_choice_counts(choose, served):
    """Whoever chooses an implementation after the patch gets it, the one that was there before too."""
    model, ids = language_model("qwen3_moe"), tokens()
    before = model.config._experts_implementation
    handle = patch(model, **MOE)
    assert all(f"in place of experts '{before}'" in row.detail for row in rows(handle))
    with pytest.warns(PatchWarning, match="the choice counts"):
        choose(model)
    with torch.no_grad():
        got = model(ids).logits
        assert served() == 0 and {row.state for row in rows(handle)} == {"undone"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle.undo()
        assert torch.equal(model(ids).logits, got)
        again = patch(model, **MOE)  # and asking for ours again gives ours
        model(ids)
    assert served() == 2 and {row.state for row in rows(again)} == {"patched"}


@only_5
def test_choice_by_hand(served):
    model, ids = language_model("qwen3_moe"), tokens()
    model.config._experts_implementation = "eager"
    handle = patch(model, **MOE)
    model.config._experts_implementation = "batched_mm"
    with torch.no_grad():
        got = model(ids).logits
        assert served() == 0
        assert all("upstream's own code: the config has come to ask for experts 'batched_mm'" in row.detail
                   for row in rows(handle))  # fmt: skip
        handle.undo()
        assert model.config._experts_implementation == "batched_mm" and torch.equal(model(ids).logits, got)


@only_5
def test_switch_of_generate(served):
    """transformers' own switch while it decodes on a GPU, from one of its implementations to another, is no choice."""
    model, ids = language_model("qwen3_moe"), tokens()
    before = model.config._experts_implementation
    handle = patch(model, **MOE)
    scope = {"__name__": "transformers.generation.utils", "model": model}
    exec("model.set_experts_implementation('batched_mm')", scope)
    with torch.no_grad():
        model(ids)
    assert served() == 2 and {row.state for row in rows(handle)} == {"patched"}
    assert model.config._experts_implementation == before


@only_5
def test_compiles():
    model, ids = language_model("qwen3_moe"), tokens()
    with torch.no_grad(), patched(model, **MOE):
        expected = model(ids).logits
        compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
        hidden = torch.randn(1, 5, 48)
        close(compiled(hidden), model.model.layers[0].mlp(hidden))
    assert expected.shape == (2, 13, 300)


def test_forced_backend():
    model, ids = language_model("qwen3_moe"), tokens()
    with torch.no_grad(), patched(model, backend="reference", **MOE):
        got = model(ids).logits
    with torch.no_grad():
        close(got, model(ids).logits)


@only_5
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_experts(family):
    """Low-rank updates of the stacked weights reach the op, and their gradients come back."""
    from peft import LoraConfig, get_peft_model

    ids = tokens()

    def adapted():
        model = language_model(family)
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
        )
        return randomize_lora(model)

    def step(model):
        model(ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = step(adapted())
    before = adapted()
    handle = patch(before, **MOE)  # LoRA first, then the patch
    assert [row.state for row in rows(handle)] == ["patched"] * 2
    got = step(before)
    assert got.keys() == expected.keys() and any("lora" in name for name in got)
    for name in got:
        close(got[name], expected[name])


def randomize_lora(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@only_5
def test_refusals():
    model = language_model("gpt_oss")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(PatchError, match="down_proj is torch.float8_e4m3fn: quantised"):
        patch(model, strict=True, **MOE)
    states = [(row.state, row.detail) for row in rows(patch(model, **MOE))]
    assert states[0][0] == "patched" and "quantised" in states[1][1]

    class Mxfp4GptOssExperts(nn.Module):
        pass

    model.model.layers[0].mlp.experts = Mxfp4GptOssExperts()
    assert any("Mxfp4GptOssExperts: quantised experts" in row.detail for row in rows(patch(model, **MOE)))

    model = language_model("qwen3_moe", hidden_act="gelu")
    with pytest.raises(PatchError, match="activation is .*, not SiLU"):
        patch(model, strict=True, **MOE)


@only_5
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_experts(family):
    """The module has the state dict of transformers' experts and their result."""
    model = language_model(family)
    theirs = model.model.layers[0].mlp.experts
    ours = FusedExperts(
        theirs.num_experts, 48, theirs.down_proj.shape[2 - (family == "gpt_oss")], gpt_oss=family == "gpt_oss"
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    hidden, ids, weights = torch.randn(7, 48), torch.rand(7, theirs.num_experts).topk(2).indices, torch.rand(7, 2)
    close(ours(hidden, ids, weights), theirs(hidden, ids, weights))
    assert ours(hidden.view(1, 7, 48), ids, weights).shape == (1, 7, 48)
