"""Beside others who change models: Liger-Kernel, quantisation, compilation, copies, DataParallel."""

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ivl_kernels import patch
from ivl_kernels.integrations import PatchError
from ivl_kernels.integrations._patch import PatchWarning
from ivl_kernels.testing import tiny
from tests.models import chat_inputs, chat_model, inputs, native_model

TILES = ((2, 1), ())
DENSE = ("projector", "packing", "rope")


def make(name):
    if name in ("repo", "hub"):
        model = chat_model(name)
        return model, chat_inputs(model, TILES, flags=True)
    return native_model(name), inputs(TILES)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def rows(handle, *features):
    return {(row.feature, row.state) for row in handle.report().rows if row.feature in features}


# Liger-Kernel replaces names of transformers' modules and forwards of classes, whatever instance it is given.


@pytest.fixture
def liger(monkeypatch):
    """Liger-Kernel's patching as it is, with its Triton kernels in plain torch; undone at the end."""
    monkey = pytest.importorskip("liger_kernel.transformers.monkey_patch", exc_type=ImportError)
    from transformers.models.gpt_oss import modeling_gpt_oss
    from transformers.models.internvl import modeling_internvl
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    rotary = modeling_qwen3.apply_rotary_pos_emb

    def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        return rotary(q, k, cos, sin)

    def rms_norm(self, x):
        liger.norms += 1
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )

    def layer_norm(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.variance_epsilon)

    def swiglu(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def experts(self, hidden_states, top_k_index, top_k_weights):
        liger.experts += 1
        out = torch.zeros_like(hidden_states)
        for token, (ids, weights) in enumerate(zip(top_k_index, top_k_weights)):
            for i, weight in zip(ids, weights):
                gate, up = (self.gate_up_proj[i] @ hidden_states[token]).chunk(2)
                out[token] += weight * (self.down_proj[i] @ (F.silu(gate) * up))
        return out

    class liger:
        apply = staticmethod(functools.partial(monkey.apply_liger_kernel_to_internvl, fused_linear_cross_entropy=False))
        norms = experts = 0

    rms_norm.__module__, rms_norm.__qualname__ = "liger_kernel.transformers.rms_norm", "LigerRMSNorm.forward"
    experts.__module__, experts.__qualname__ = "liger_kernel.transformers.swiglu", "LigerExperts.forward"
    monkeypatch.setattr(monkey, "liger_rotary_pos_emb", liger_rotary_pos_emb)
    monkeypatch.setattr(monkey.LigerRMSNorm, "forward", rms_norm)
    monkeypatch.setattr(monkey.LigerLayerNorm, "forward", layer_norm)
    monkeypatch.setattr(monkey.LigerSwiGLUMLP, "forward", swiglu)
    if hasattr(monkey, "LigerExperts"):
        monkeypatch.setattr(monkey.LigerExperts, "forward", experts)
    modules = (modeling_gpt_oss, modeling_internvl, modeling_qwen2, modeling_qwen3, modeling_qwen3_moe)
    before = [dict(vars(module)) for module in modules]
    forward = modeling_internvl.InternVLForConditionalGeneration.forward
    yield liger
    for module, names in zip(modules, before):
        vars(module).update(names)
    modeling_internvl.InternVLForConditionalGeneration.forward = forward


LIGER = ["qwen2", "qwen3", "qwen3_moe"]


@pytest.mark.parametrize("order", ["liger first", "ours first"])
@pytest.mark.parametrize("name", LIGER)
def test_liger_on_another_instance(name, order, liger):
    """Ours serves the one, Liger the other; each undone or left without a trace in the other."""
    theirs, batch = make(name)
    ours, _ = make(name)
    twin = copy.deepcopy(ours)
    expected = logits(ours, batch)
    if order == "liger first":
        liger.apply(model=theirs)
        handle = patch(ours)
    else:
        handle = patch(ours)
        liger.apply(model=theirs)
    features = (*DENSE, "moe") if name == "qwen3_moe" else DENSE
    assert rows(handle, *features) == {(feature, "patched") for feature in features}
    close(logits(ours, batch), expected)
    assert not liger.norms and not liger.experts
    close(logits(theirs, batch), expected)
    assert liger.norms
    handle.undo()
    assert torch.equal(logits(ours, batch), logits(twin, batch))
    assert not any("_ivl" in module.__dict__ for module in ours.modules())


@pytest.mark.parametrize("name", LIGER)
def test_liger_then_a_new_instance(name, liger):
    """Models made later are made of Liger's classes: called where they cannot be read, and the report names them."""
    theirs, batch = make(name)
    expected = logits(theirs, batch)
    liger.apply(model=theirs)
    model, _ = make(name)
    plain = logits(model, batch)
    close(plain, expected)
    handle = patch(model)
    liger.norms = liger.experts = 0
    close(logits(model, batch), expected)
    assert liger.norms
    assert rows(handle, *DENSE) == {(feature, "patched") for feature in DENSE}
    if name == "qwen3_moe" and type(model.model.language_model.layers[0].mlp.experts).__name__ == "LigerExperts":
        found = [row for row in handle.report().rows if row.feature == "moe"]
        assert {row.state for row in found} in ({"refused"}, {"patched"}) and len(found) >= 2, handle.report()
        if found[0].state == "refused":
            assert all("LigerExperts" in row.detail for row in found) and liger.experts
            with pytest.raises(PatchError, match="LigerExperts"):
                patch(make(name)[0], moe=True, strict=True)
    handle.undo()
    assert torch.equal(logits(model, batch), plain)


@pytest.mark.parametrize("order", ["liger first", "ours first"])
@pytest.mark.parametrize("name", LIGER)
def test_liger_on_the_same_instance(name, order, liger):
    """Whoever wrapped last is on top; what Liger changed in a layer is run, not read past, and the report says so."""
    model, batch = make(name)
    expected = logits(model, batch)
    if order == "liger first":
        liger.apply(model=model)
        handle = patch(model)
    else:
        handle = patch(model)
        liger.apply(model=model)
    liger.norms = liger.experts = 0
    close(logits(model, batch), expected)
    text = str(handle.report())
    assert rows(handle, *DENSE) == {(feature, "patched") for feature in DENSE}
    if name != "qwen2":
        assert liger.norms >= 2 * 2 and "Qwen3" in text and "LigerRMSNorm" in text
    if name == "qwen3_moe" and liger.experts:
        served = [row for row in handle.report().rows if row.feature == "moe" and row.what == "experts"]
        assert len(served) == 2 and all("LigerExperts.forward" in row.detail for row in served), text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PatchWarning)
        handle.undo()
    close(logits(model, batch), expected)


# Quantised layers. Whatever they are, ours asks at the call what a layer is, and a report never raises.


class QLinear(nn.Module):
    """Like a layer of AWQ or GPTQ: packed integers and scales, and no attribute `weight`."""

    def __init__(self, linear):
        super().__init__()
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype), self.bias)


class Params4bit(nn.Parameter):
    """Like bitsandbytes': a parameter of packed bytes that is no matrix."""


class Linear4bit(nn.Linear):
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        quantised = QLinear(linear)
        self.scales = quantised.scales
        packed = (quantised.qweight + 128).to(torch.uint8).reshape(-1, 1)
        self.weight = Params4bit(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        weight = (self.weight.data.view(self.out_features, -1).to(x.dtype) - 128) * self.scales.to(x.dtype)
        return F.linear(x, weight, self.bias)


class QEmbedding(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.register_buffer("table", (embedding.weight.detach() * 16).round().to(torch.int8))

    def forward(self, ids):
        return self.table[ids].float() / 16


def replaced(kind, of=nn.Linear):
    def quantise(model):
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is of and not (isinstance(module, nn.MultiheadAttention)):
                    setattr(module, name, kind(child))
        return model

    return quantise


def dynamically(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
        return quantize(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def with_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def in_half(model):
    """Weights only of the language model, the way large models are loaded."""
    text = model.language_model if hasattr(model, "mlp1") else model.model.language_model
    replaced(QLinear)(text)
    return model


QUANTISATIONS = {
    "no weight": (replaced(QLinear), "QLinear"),
    "language alone": (in_half, ""),
    "packed bytes": (replaced(Linear4bit), "Linear4bit"),
    "embedding": (replaced(QEmbedding, nn.Embedding), ""),
    "dynamic": (dynamically, "torch.ao.nn.quantized.dynamic"),
    "torchao": (with_torchao, "Int8Tensor|AffineQuantizedTensor"),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("how", QUANTISATIONS)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt_oss", "hub"])
def test_quantised(name, how, order):
    quantise, reason = QUANTISATIONS[how]
    model, batch = make(name)
    expected = logits(quantise(model), batch)
    model, _ = make(name)
    if order == "before":
        handle = patch(model)
        quantise(model)
    else:
        quantise(model)
        handle = patch(model)
    close(logits(model, batch), expected)
    report = handle.report()
    assert ("packing", "patched") in rows(handle, "packing") and ("rope", "patched") in rows(handle, "rope"), report
    (projector,) = [row for row in report.rows if row.feature == "projector"]
    if reason:
        assert any(word in projector.detail for word in reason.split("|")), projector
        assert projector.state == "refused" or projector.detail.startswith("upstream's own code"), projector
    assert not any("Error" in row.detail for row in report.rows), report
    second = patch(model)
    assert "already patched" in str(second.report()) and not any("Error" in row.detail for row in second.report().rows)
    close(logits(model, batch), expected)
    handle.undo()
    assert torch.equal(logits(model, batch), expected)


def test_pruned_after_patching():
    """Pruning keeps the weight under another name and a hook that makes it."""
    from torch.nn.utils import prune

    def pruned(model):
        for module in model.modules():
            if type(module) is nn.Linear:
                prune.l1_unstructured(module, "weight", amount=0.3)
        return model

    model, batch = make("qwen3")
    expected = logits(pruned(model), batch)
    for order in ("before", "after"):
        model, _ = make("qwen3")
        if order == "before":
            handle = patch(model)
        pruned(model)
        if order == "after":
            handle = patch(model)
        close(logits(model, batch), expected)
        assert "has hooks" in str(handle.report()) and patch(model).report()


# Copies and compilation.


@pytest.mark.parametrize("name", ["qwen3", "hub"])
def test_copies_of_a_patched_model(name):
    model, batch = make(name)
    loaded = pickle.loads(pickle.dumps(patch(model).model))
    expected = logits(make(name)[0], batch)
    assert torch.equal(logits(loaded, batch), expected)  # loads unpatched
    assert rows(patch(loaded), *DENSE) == {(feature, "patched") for feature in DENSE}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_input_embeddings().weight.zero_() if name == "qwen3" else twin.mlp1[3].weight.zero_()
    close(logits(model, batch), expected)
    assert not torch.allclose(logits(twin, batch), expected)
    file = io.BytesIO()
    torch.save(make(name)[0].state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    close(logits(twin, batch), expected)


def test_patched_after_compiling():
    """The compiled module is recognised, and its graph is made anew."""
    torch._dynamo.reset()
    model = native_model(text=tiny.text_config("qwen3", num_hidden_layers=1)).model.language_model
    compiled, embeds = torch.compile(model, backend="eager"), torch.randn(1, 5, 48)

    def run():
        with torch.no_grad():
            return compiled(inputs_embeds=embeds, use_cache=False).last_hidden_state

    expected = run()
    handle = patch(compiled)
    assert rows(handle, "rope") == {("rope", "patched")}
    got = run()
    close(got, expected)
    assert not torch.equal(got, expected)  # the op rounds in other places than the norm
    handle.undo()
    assert torch.equal(run(), expected)


# DataParallel's replicas are shallow copies: methods bound to the original would run on its parameters.


def replicate(model):
    """What `nn.DataParallel` runs: copies of every module's `__dict__`, with parameters of another device."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas.get(child)
            setattr(replica, name, replicas.get(child)) if child is not None else None
        for name, parameter in module._parameters.items():
            replica._parameters[name] = None
            if parameter is not None:
                del replica._parameters[name]
                setattr(replica, name, parameter.detach().clone())
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return replicas[model]


@pytest.mark.parametrize("name", ["qwen3", "hub"])
def test_data_parallel_is_refused(name):
    """Where it would be wrong; undone, it works as before."""
    model, batch = make(name)
    replicate(model)
    if name == "hub":  # transformers' own asks its parameters for their dtype, and a replica has none
        expected = logits(replicate(model), batch)
    handle = patch(model)
    logits(model, batch)
    for patched in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match="nn.DataParallel on a patched model"):
            replicate(patched)
    replicate(pickle.loads(pickle.dumps(patch(make(name)[0]).model)))
    handle.undo()
    replica = replicate(model)
    if name == "hub":
        assert torch.equal(logits(replica, batch), expected)
