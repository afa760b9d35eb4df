"""Experts of Qwen3-MoE and GPT-OSS models, alone and inside InternVL, patched and plain."""

import copy
import inspect
import pickle
import re
import textwrap
import warnings

import pytest
import torch
import torch.nn.utils.prune
import transformers
from torch import nn

from ivl_kernels.integrations import PatchError, experts, patch, patched
from ivl_kernels.integrations._patch import PatchWarning
from ivl_kernels.nn import FusedExperts
from tests.models import inputs, native_model, randomize, text_config

FAMILIES = ("qwen3_moe", "gpt_oss")
V5 = int(transformers.__version__.split(".")[0]) >= 5
only_5 = pytest.mark.skipif(not V5, reason="stacked experts with an interface are of transformers 5")
only_lists = pytest.mark.skipif(V5, reason="4.57 keeps a list of experts")
ELSE = ("projector", "packing", "flash", "rope", "linear", "attention", "norms", "mlp", "cache")
MOE = {name: False for name in ELSE} | {"moe": True}


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
            assert all("cpu (" in row.detail for row in rows(handle))
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


@only_lists
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


class Int8Tensor(torch.Tensor):
    """Stands for the tensor subclasses of torchao."""


class QLinear(nn.Module):
    """Stands for the layers of AWQ and GPTQ, which have no `weight`."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach().clone())

    def forward(self, x):
        return torch.nn.functional.linear(x, self.qweight)


def lora(model):
    from peft import LoraConfig, inject_adapter_in_model

    names = ["gate_proj", "down_proj"]
    randomize_lora(inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), model))


def int8(model):
    for expert in model.model.layers[0].mlp.experts:
        weight = expert.up_proj.weight
        expert.up_proj.weight = nn.Parameter(weight.detach().as_subclass(Int8Tensor), requires_grad=False)


def pruned(model):
    torch.nn.utils.prune.l1_unstructured(model.model.layers[0].mlp.experts[1].gate_proj, "weight", amount=0.5)


def quantised(model):
    model.model.layers[0].mlp.experts[2].down_proj = QLinear(model.model.layers[0].mlp.experts[2].down_proj)


def dynamic(model):
    torch.ao.quantization.quantize_dynamic(model.model.layers[0], {nn.Linear}, inplace=True)


def wider(model):
    expert = model.model.layers[0].mlp.experts[3]
    expert.gate_proj = nn.Linear(48, 24)


def other_activation(model):
    model.model.layers[0].mlp.experts[5].act_fn = nn.GELU()


@only_lists
@pytest.mark.parametrize("change", [lora, int8, pruned, quantised, dynamic, wider, other_activation])
def test_list_changed_later(change, served):
    """Upstream's code runs, the report says so, and a patch after the change says why not."""
    model, ids = language_model("qwen3_moe"), tokens()
    handle = patch(model, **MOE)
    change(model)
    with torch.no_grad():
        got = model(ids).logits
        assert served() == (0 if change is lora else 1)
        assert "upstream's own code: " in rows(handle)[0].detail
        why = rows(handle)[0].detail.removeprefix("upstream's own code: ")
        assert why in [row.detail for row in rows(patch(model, **MOE))]
        handle.undo()
        assert change is not lora or torch.equal(model(ids).logits, got)
        close(got, model(ids).logits)
    row = rows(patch(model, **MOE))[-1 if change is not lora else 0]
    assert row.state == "refused" and row.detail


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_changed_later(family, served):
    """Pruned, parametrized (served: the op takes what the attribute is), or of another tensor class (upstream's)."""
    if not V5 and family == "qwen3_moe":
        pytest.skip("4.57 keeps a list of experts")
    model, ids = language_model(family), tokens()
    handle = patch(model, **MOE)
    stacks = [layer.mlp.experts for layer in model.model.layers]
    with torch.no_grad():
        torch.nn.utils.prune.l1_unstructured(stacks[0], "down_proj", amount=0.5)
        nn.utils.parametrize.register_parametrization(stacks[1], "gate_up_proj", Double())
        got = model(ids).logits
        assert served() == 2 and all("cpu (" in row.detail for row in rows(handle))
        handle.undo()
        close(got, model(ids).logits)
        handle = patch(model, **MOE)
        close(model(ids).logits, got)
        assert served() == 2
        torch.nn.utils.prune.remove(stacks[0], "down_proj")
        if family == "gpt_oss" and not V5:
            stacks[0].down_proj.__class__ = Int8Tensor
        else:
            data = stacks[0].down_proj.detach().as_subclass(Int8Tensor)
            stacks[0].down_proj = nn.Parameter(data, requires_grad=False)
        model(ids)
        assert served() == 1
        assert rows(handle)[0].detail.startswith("upstream's own code: down_proj is a Int8Tensor: sharded or quantised")
        assert "cpu (" in rows(handle)[1].detail
        handle.undo()
    refused, fine = rows(patch(model, **MOE))[::-1]
    assert refused.state == "refused" and "Int8Tensor" in refused.detail and fine.state == "patched"


def transposed(parameter):
    return nn.Parameter(parameter.detach().mT.contiguous().mT)


@pytest.mark.parametrize("family", FAMILIES)
def test_transposed_weights_are_upstreams(family, served):
    """They would be copied at every call: of all experts."""
    model, ids = language_model(family), tokens()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    handle = patch(model, **MOE)
    if isinstance(first, nn.ModuleList):
        first, second = first[1].down_proj, second[0].gate_proj
    name = "weight" if isinstance(first, nn.Linear) else "down_proj"
    with torch.no_grad():
        plain = model(ids).logits
        assert served() == 2
        setattr(first, name, transposed(getattr(first, name)))
        close(model(ids).logits, plain)
        assert served() == 1 and "is not contiguous" in rows(handle)[0].detail and "cpu (" in rows(handle)[1].detail
        setattr(second, name, transposed(getattr(second, name)))
        close(model(ids).logits, plain)
    handle.undo()
    with pytest.warns(PatchWarning, match="nothing was patched"):
        refused = rows(patch(model, **MOE))
    assert all(row.state == "refused" and "is not contiguous" in row.detail for row in refused)


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def watchers(model):
    """Modules of the first layer that somebody may look at, by name."""
    block = model.model.layers[0].mlp
    found = {"block": block, "experts": block.experts, "router": getattr(block, "gate", getattr(block, "router", None))}
    if isinstance(block.experts, nn.ModuleList):
        del found["experts"]
        found |= {
            f"{i}.{name}": part for i, expert in enumerate(block.experts) for name, part in expert.named_modules()
        }
    elif hasattr(block.experts, "act_fn"):
        found["act"] = block.experts.act_fn
    return found


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks(family, everywhere, served):
    """Whoever looks at a module sees what upstream would have shown, or upstream runs."""
    model, ids = language_model(family), tokens()
    if V5:
        model.set_experts_implementation("eager")
    names = {module: name for name, module in watchers(model).items()}
    seen = []

    def look(module, args, output):
        if module in names:
            output = output if isinstance(output, torch.Tensor) else output[0]
            seen.append((names[module], [a.clone() for a in args if isinstance(a, torch.Tensor)], output.clone()))

    def run():
        seen.clear()
        hooks = [nn.modules.module.register_module_forward_hook(look)] if everywhere else []
        hooks += [] if everywhere else [module.register_forward_hook(look) for module in names]
        logits = model(ids).logits
        report = rows(handle)[0].detail if handle else ""
        for hook in hooks:
            hook.remove()
        return logits, list(seen), report

    handle = None
    with torch.no_grad():
        plain, expected, _ = run()
        handle = patch(model, **MOE)
        got, looked, report = run()
        count, inner = served(), {"act", "0.", "0.act_fn"} & set(names.values())
        assert count == (0 if inner and everywhere else 1 if inner else 2)
        assert ("upstream" in report) == bool(inner) and (not inner or "hooks" in report)
        model(ids)
        assert served() == 2
    close(got, plain)
    assert [name for name, _, _ in looked] == [name for name, _, _ in expected]
    for (_, given, output), (_, their_given, their_output) in zip(looked, expected):
        close(output, their_output)
        assert len(given) == len(their_given)
        for a, b in zip(given, their_given):
            assert torch.equal(a, b) if a.dtype == torch.int64 else close(a, b) is None


def spread(model):
    """What accelerate does to a model that is spread over several devices, all of them this one."""
    from accelerate.hooks import attach_execution_device_hook

    attach_execution_device_hook(model, "cpu")


def offloaded(model):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu")


def on_disk(model):
    from accelerate import disk_offload

    disk_offload(model, model.folder, execution_device="cpu")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("change", [spread, offloaded, on_disk])
@pytest.mark.parametrize("family", FAMILIES)
def test_dispatched(family, change, before, served, tmp_path):
    """Inside accelerate's hooks ours runs on the weights that they bring; lists are upstream's while offloaded."""
    model, ids = language_model(family), tokens()
    model.folder = tmp_path
    with torch.no_grad():
        plain = model(ids).logits
        if before:
            change(model)
        handle = patch(model, **MOE)
        if not before:
            change(model)
        got = model(ids).logits
        theirs = not V5 and family == "qwen3_moe" and change is not spread
        details = [row.detail for row in rows(handle)]
        assert served() == (0 if theirs else 2)
        words = "offloaded" if theirs else "^cpu " if change is spread else "loaded for the call"
        assert all(re.search(words, detail) for detail in details), details
        close(got, plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # accelerate's wrapper may sit on top
            handle.undo()
        assert torch.equal(model(ids).logits, plain) and served() == 0


CASES = [  # experts, everything else, autocast
    (torch.float32, torch.float32, None),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.float16, torch.bfloat16),
    (torch.float64, torch.float64, torch.bfloat16),
    (torch.float64, torch.float64, None),
    (torch.float16, torch.float16, None),
    (torch.float32, torch.bfloat16, None),
]


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("inner, outer, autocast", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision(family, inner, outer, autocast, router):
    """Whatever mix upstream takes is taken, as near to the truth; whatever upstream refuses raises its error."""
    layer = language_model(family).model.layers[0].mlp.to(outer)
    layer.experts.to(inner)
    if V5:
        layer.experts.config._experts_implementation = "eager"
    if router:
        getattr(layer, "gate", getattr(layer, "router", None)).float()
    x = torch.randn(1, 9, 48).to(outer)

    def run(patched_layer):
        with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            try:
                out = patched_layer(x)
            except RuntimeError as error:
                return str(error)
        return out if isinstance(out, torch.Tensor) else out[0]

    plain = run(layer)
    truth = run_exact(layer, x)
    patch(layer, **MOE)
    got = run(layer)
    assert type(got) is type(plain), (got, plain)
    if isinstance(plain, torch.Tensor):
        assert got.dtype == plain.dtype
        error, usual = ((out.double() - truth).abs().mean() for out in (got, plain))
        assert error <= 2 * usual + 1e-7, (error, usual)


def run_exact(layer, x):
    with torch.no_grad():
        out = copy.deepcopy(layer).double()(x.double())
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", ["", "experts", "gate_up", "router"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_set_of_gradients(family, frozen, checkpointing, autocast):
    """A parameter that upstream leaves without a gradient is left without one: an expert that nobody chose, too."""
    model, ids = language_model(family), tokens(1, 3)
    model.train()
    words = {"": (), "experts": ("experts",), "gate_up": ("gate_proj", "gate_up"), "router": (".gate.", "router")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(word in name for word in words[frozen]))
    if checkpointing:
        model.gradient_checkpointing_enable()

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(ids, labels=ids).loss.backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    expected = step()
    with patched(model, **MOE):
        got = step()
    lists = isinstance(model.model.layers[0].mlp.experts, nn.ModuleList)
    assert not lists or frozen == "experts" or any(g is None for name, g in expected.items() if "down_proj" in name)
    assert {name for name in got if got[name] is None} == {name for name in expected if expected[name] is None}
    for name in got if not autocast else ():
        if got[name] is not None:
            close(got[name], expected[name])


def variant(kind, change):
    """A class of experts as another release might have it: its source, changed."""
    inside = inspect.unwrap(kind.forward)
    source = textwrap.dedent(inspect.getsource(inside))
    names = dict(inside.__globals__)
    exec(compile(change(source), "<variant>", "exec"), names)
    return type(kind.__name__, (kind,), {"forward": names["forward"], "__module__": kind.__module__})


DRIFT = {  # how the next release may look: what changes, and whether ours serves it
    "other names": (lambda text: re.sub(r"\b(router_indices|top_k_index)\b", "chosen", text), True),
    "one more argument": (lambda text: re.sub(r",?\s*\) -> torch", ", scale=1.0) -> torch", text), True),
    "one more argument that must be given": (
        lambda text: re.sub(r"def forward\(\s*self,", "def forward(self, more,", text), False,
    ),
    "other activation": (lambda text: re.sub(r"self.act_fn\(|torch.sigmoid\(", "torch.tanh(", text), False),
    "routing weights applied twice": (
        lambda text: re.sub(r"(\* (top_k_weights|routing_weights)\[[^\]]*\])", r"\1 \1", text), False,
    ),
    "returns a tuple": (lambda text: re.sub(r"return (\w+)\s*$", r"return (\1, None)", text), False),
    "asks for something new": (lambda text: text.replace("torch.no_grad()", "self.new and torch.no_grad()"), False),
}  # fmt: skip


@pytest.mark.parametrize("drift", list(DRIFT))
@pytest.mark.parametrize("family", FAMILIES)
def test_another_release(family, drift, served):
    """Right, or refused with a reason."""
    if not V5 and family == "qwen3_moe":
        pytest.skip("4.57 keeps a list of experts")
    change, serves = DRIFT[drift]
    model = language_model(family)
    stack = model.model.layers[0].mlp.experts
    kind = type(stack)
    other = variant(kind, change)
    if drift == "other activation" and hasattr(kind, "_apply_gate") and family == "gpt_oss":
        other = type(kind.__name__, (kind,), {"_apply_gate": lambda self, x: kind._apply_gate(self, x).tanh()})
    stack.__class__ = other
    if V5:
        stack.config._experts_implementation = "eager"
    row = rows(patch(model, **MOE))[0 if serves else -1]
    assert row.state == ("patched" if serves else "refused")
    if not serves:
        assert row.module == "model.layers.0.mlp.experts" and "unknown structure" in row.detail
        return
    hidden, ids, weights = torch.randn(5, 48), torch.rand(5, 4).topk(2).indices, torch.rand(5, 4)
    if V5:
        weights = weights[:, :2]
    served()
    with torch.no_grad():
        got = stack(hidden, ids, weights)
        assert served() == 1
        close(got, other.forward(stack, hidden, ids, weights))


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_calling_convention(top_k, served):
    """Routing weights of the chosen experts or of all: as the installed version gives them, also where k is E."""
    model = language_model("gpt_oss", num_experts_per_tok=top_k)
    ids = tokens()
    with torch.no_grad():
        plain = model(ids).logits
        patch(model, **MOE)
        close(model(ids).logits, plain)
    assert served() == 2


def test_no_tokens():
    for family in FAMILIES:
        block = language_model(family).model.layers[0].mlp
        hidden = torch.zeros(1, 0, 48, requires_grad=True)
        patch(block, **MOE)
        out = block(hidden)
        assert (out if isinstance(out, torch.Tensor) else out[0]).shape == (1, 0, 48)


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


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 6, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(6, 8, bias=False), nn.SiLU()


class Block(nn.Module):
    """A router and a list of experts, as 4.57 has them."""

    top_k, norm_topk_prob = 2, True

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4, bias=False), nn.ModuleList(Expert() for _ in range(4))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda e: e.up_proj.register_forward_hook(print), "experts.2.up_proj has hooks"),
        (lambda e: e.up_proj.register_forward_pre_hook(print), "experts.2.up_proj has hooks"),
        (lambda e: e.up_proj.register_full_backward_hook(print), "experts.2.up_proj has hooks"),
        (lambda e: e.up_proj.register_full_backward_pre_hook(print), "experts.2.up_proj has hooks"),
        (lambda e: e.act_fn.register_full_backward_hook(print), "experts.2.act_fn has hooks"),
        (lambda e: e.register_full_backward_hook(print), "experts.2 has hooks"),
        (lambda e: setattr(e.down_proj, "forward", print), "experts.2.down_proj.forward was replaced"),
        (lambda e: setattr(e, "act_fn", nn.GELU()), "experts.2 is not like the first"),
        (lambda e: setattr(e, "up_proj", nn.Linear(8, 6)), "experts.2.up_proj has a bias"),
        (lambda e: e.up_proj.double(), "experts.2.up_proj is torch.float64"),
    ],
)
def test_a_list_of_experts_is_read_only_where_nobody_looks(change, reason):
    block = Block()
    lists, why = experts._matrices(block)
    assert why == "" and all(w is e.up_proj.weight for w, e in zip(lists[1], block.experts, strict=True))
    change(block.experts[2])
    assert reason in experts._matrices(block)[1]


@torch.no_grad()
def test_routing_weights_of_a_list_are_rounded_as_upstream(monkeypatch):
    block, seen = Block().bfloat16(), []
    op = experts.moe_experts_list
    monkeypatch.setattr(experts, "moe_experts_list", lambda *a, **k: seen.append(a[2]) or op(*a, **k))
    x = torch.randn(2, 3, 8).bfloat16()
    out, logits = experts._block_forward((Block, Expert, nn.SiLU), "")(None, block, x)
    assert out.shape == x.shape and torch.equal(logits, block.gate(x.flatten(0, 1)))
    weights = logits.softmax(1, dtype=torch.float32).topk(2).values
    assert torch.equal(seen[0], (weights / weights.sum(1, keepdim=True)).bfloat16())
