"""The projector and the placement of visual rows where something else has a say: hooks, dtypes, memory, tracing."""

import copy
import types

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune

from ivl_kernels import ops, patch, patched
from ivl_kernels.integrations._deferred import DeferredEmbeddings, place
from ivl_kernels.testing import assert_accurate
from tests.integrations.test_models import BOTH, batch_for, generate, make, projector

REMOTE = ["repo qwen2", "hub qwen3"]
NAMES = ["native qwen3", *REMOTE]


def linears(model):
    return [layer for layer in projector(model).modules() if isinstance(layer, nn.Linear)]


def norm(model):
    return next(layer for layer in projector(model).modules() if isinstance(layer, nn.LayerNorm))


def parent_and_name(model, layer):
    return next((m, n) for m in model.modules() for n, child in m.named_children() if child is layer)


def row(handle, feature="projector"):
    return next(r for r in handle.report().rows if r.feature == feature)


# Who looks at a module.


def keep(seen, name):
    def take(*values):
        for value in values:
            assert not type(value).__name__.startswith("Deferred")
            if isinstance(value, torch.Tensor):
                seen.append((name, value, value.detach().clone()))
            elif isinstance(value, (tuple, list)):
                take(*value)

    return take


def both_hooks(model, take):
    """A hook before the projector that scales what goes in, and one behind it that scales what comes out."""
    before = projector(model).register_forward_pre_hook(lambda m, args: take(args) or (args[0] * 1.5 + 0.5,))
    return [before, projector(model).register_forward_hook(lambda m, args, out: take(args, out) or out * 2.0)]


def children_hooks(model, take):
    return [m.register_forward_hook(lambda m, args, out: take(args, out)) for m in projector(model).children()]


def activation_hook(model, take):
    return [[*projector(model).children()][2].register_forward_hook(lambda m, args, out: take(args, out))]


def backward_hook(model, take):
    return [projector(model).register_full_backward_hook(lambda m, grads, outs: take(grads, outs))]


def backward_pre_hook(model, take):
    return [projector(model).register_full_backward_pre_hook(lambda m, grads: take(grads))]


def global_hook(model, take):
    return [nn.modules.module.register_module_forward_hook(lambda m, args, out: take(args, out))]


def global_pre_hook(model, take):
    return [nn.modules.module.register_module_forward_pre_hook(lambda m, args: take(args))]


def global_backward_hook(model, take):
    return [nn.modules.module.register_module_full_backward_hook(lambda m, grads, outs: take(grads, outs))]


def embedding_hook(model, take):
    return [model.get_input_embeddings().register_forward_hook(lambda m, args, out: take(args, out))]


WATCHERS = [
    both_hooks, children_hooks, activation_hook, backward_hook, backward_pre_hook, global_hook, global_pre_hook,
    global_backward_hook, embedding_hook,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("watch", WATCHERS)
def test_whoever_looks_sees_the_right_tensors(name, watch):
    """Everything seen is what the plain model shows, stays as it was seen, and the outputs and gradients are right."""
    model = make(name)
    batch = batch_for(model)
    backward = "backward" in watch.__name__

    def run():
        seen = []
        handles = watch(model, keep(seen, watch.__name__))
        try:
            model.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(backward):
                logits = model(**batch).logits
                if backward:
                    logits.square().mean().backward()
        finally:
            [handle.remove() for handle in handles]
        for what, tensor, then in seen:
            assert torch.equal(tensor, then), f"{what}: overwritten after it was seen"
        return logits.detach(), [then for _, _, then in seen], {n: p.grad for n, p in model.named_parameters()}

    with torch.no_grad():
        unwatched = model(**batch).logits
    expected, shown, gradients = run()
    assert shown
    handle = patch(model, strict=True, projector=True, packing=True)
    got, seen, ours = run()
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, expected, **close)
    assert [s.shape for s in seen] == [s.shape for s in shown]
    for one, other in zip(seen, shown):
        torch.testing.assert_close(one, other, **close)
    assert {n for n, g in ours.items() if g is None} == {n for n, g in gradients.items() if g is None}
    assert "cpu (" in row(handle).detail
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, unwatched, **close)


@pytest.mark.parametrize("name", BOTH)
def test_hooks_that_are_there_before_patching(name):
    model = make(name)
    handles = both_hooks(model, lambda *values: None)
    handle = patch(model, strict=True, projector=True)
    assert row(handle).detail == "upstream's own code: the projector has hooks"
    [h.remove() for h in handles]
    assert row(handle).detail == "cpu (float32 on cpu)"


# Layers of another kind.


def set_dtype(*parts):
    def change(model, dtype):
        for part in parts:
            part(model).to(dtype)

    return change


def head(model):
    return model.lm_head if hasattr(model, "lm_head") else model.language_model


MIXES = {
    "norm": set_dtype(norm),
    "linears": set_dtype(lambda m: linears(m)[0], lambda m: linears(m)[1]),
    "last linear": set_dtype(lambda m: linears(m)[-1]),
    "projector": set_dtype(projector),
    "embedding": set_dtype(lambda m: m.get_input_embeddings()),
    "language model": set_dtype(lambda m: m.language_model if hasattr(m, "mlp1") else m.model.language_model, head),
    "everything": set_dtype(lambda m: m),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base, other", [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_precision(name, base, other, mix, autocast):
    """Every mix that upstream accepts is accepted, with its answers; what it refuses is left to its code."""
    base, other = getattr(torch, base), getattr(torch, other)
    plain, model = make(name, dtype=base), make(name, dtype=base)
    batch = batch_for(model, ((2, 1),), dtype=base)

    def run(m, batch, cast=autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return m(**batch).logits

    handle = patch(model, strict=True, projector=True, packing=True)
    for m in (plain, model):
        MIXES[mix](m, other)
    mixed = "upstream's own code: its parameters are" in row(handle).detail
    assert mixed == (mix in ("norm", "linears", "last linear"))
    try:
        expected = run(plain, batch)
    except Exception as error:
        if not autocast:  # the op casts all parts, upstream's layers only some
            with pytest.raises(type(error)):
                run(model, batch)
        return
    got = run(model, batch)
    assert got.dtype == expected.dtype
    truth = run(copy.deepcopy(plain).double(), {**batch, "pixel_values": batch["pixel_values"].double()}, False)
    assert_accurate(got, truth, expected)


@pytest.mark.parametrize("name", BOTH)
def test_a_mix_that_is_there_before_patching_is_refused(name):
    model = make(name, dtype=torch.bfloat16)
    norm(model).float()
    handle = patch(model)
    assert row(handle).state == "refused" and row(handle).detail == "its parameters are bfloat16 and float32"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("when", ["before", "after"])
def test_prepared_for_kbit_training(name, when):
    """What peft does to a quantised model: everything else to float32, and a hook on the embeddings."""
    peft = pytest.importorskip("peft")

    def prepare(model):
        model.is_loaded_in_8bit = True
        model.get_input_embeddings().to(torch.bfloat16)
        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        norm(model).float()
        model.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_(True))

    plain, model = make(name, dtype=torch.bfloat16), make(name, dtype=torch.bfloat16)
    prepare(plain)
    if when == "before":
        prepare(model)
    patch(model)
    if when == "after":
        prepare(model)
    batch = batch_for(model, ((2, 1),))
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)


class Linear8bitLt(nn.Linear):
    """Like bitsandbytes': a linear layer whose weight is int8, with scales beside it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        scale = linear.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias, self.scale = linear.bias, scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class QLinear(nn.Module):
    """Like AWQ's and GPTQ's: integers and scales in buffers, and no weight."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int32))
        self.register_buffer("scales", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype), self.bias)


def each_linear(change):
    """Replaces or changes the linear layers below a module."""

    def apply(module):
        for layer in [m for m in module.modules() if isinstance(m, nn.Linear)]:
            new = change(layer)
            if isinstance(new, nn.Module) and new is not layer:
                holder, name = parent_and_name(module, layer)
                setattr(holder, name, new)

    return apply


def halved(layer):
    class Half(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    nn.utils.parametrize.register_parametrization(layer, "weight", Half())


def quantize_dynamic(module):
    torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8, inplace=True)


def torchao_weights(module):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)


def fixed(layer):
    torch.manual_seed(0)
    return nn.utils.spectral_norm(layer).eval()


def old_weight_norm(layer):
    return nn.utils.weight_norm(layer)


def new_spectral_norm(layer):
    torch.manual_seed(0)
    return nn.utils.parametrizations.spectral_norm(layer)


def own_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2


def subclassed(layer):
    layer.__class__ = type("Doubled", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x) * 2})


CHANGES = {
    "bitsandbytes": (each_linear(Linear8bitLt), "Linear8bitLt, not a plain Linear"),
    "awq": (each_linear(QLinear), "QLinear, not a plain Linear"),
    "dynamic": (quantize_dynamic, "quantized.dynamic.modules.linear.Linear, not a plain Linear"),
    "torchao": (torchao_weights, "Tensor"),
    "pruning": (each_linear(pruned), "has hooks"),
    "parametrization": (each_linear(halved), "ParametrizedLinear, not a plain Linear"),
    "weight_norm": (each_linear(nn.utils.parametrizations.weight_norm), "ParametrizedLinear, not a plain Linear"),
    "old weight_norm": (each_linear(old_weight_norm), "has hooks"),
    "spectral_norm": (each_linear(new_spectral_norm), "ParametrizedLinear, not a plain Linear"),
    "old spectral_norm": (each_linear(fixed), "has hooks"),
    "own forward": (each_linear(own_forward), "forward was replaced by"),
    "subclass": (each_linear(subclassed), "Doubled, not a plain Linear"),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_layers_of_another_kind(name, when, kind):
    """What was done to the projector's layers counts, whenever it was done, and the report names it."""
    change, reason = CHANGES[kind]
    plain, model = make(name), make(name)
    change(projector(plain))
    if when == "before":
        change(projector(model))
    handle = patch(model)
    if when == "after":
        change(projector(model))
    batch = batch_for(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)
    for found in (row(handle), row(patch(model))):
        assert reason in found.detail
        assert found.state == "refused" or found.detail.startswith("upstream's own code: ")


@pytest.mark.parametrize("name", ["native qwen2", "native qwen3", "native qwen3_moe", "native gpt_oss", *REMOTE])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [each_linear(Linear8bitLt), each_linear(QLinear), quantize_dynamic])
def test_report_and_answers_of_a_quantised_model(name, when, change):
    """Every feature: neither the report nor a second patch raises, and the answers are those of the plain model."""
    plain, model = make(name), make(name)
    change(plain)
    if when == "before":
        change(model)
    handle = patch(model)
    if when == "after":
        change(model)
    for report in (handle.report(), patch(model).report()):
        assert str(report)
        assert "int8" not in " ".join(r.detail for r in report.rows if r.feature in ("rope", "packing"))
    batch = batch_for(model)
    with torch.no_grad():
        got, expected = model(**batch).logits, plain(**batch).logits
    # Dynamic quantisation rounds what goes into a layer: a last bit becomes a step, in a few of many numbers.
    if change is quantize_dynamic:
        assert (got - expected).norm() <= 0.03 * expected.norm()
    else:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("when", ["before", "after"])
def test_report_of_a_model_without_memory(name, when):
    model = make(name)
    handle = patch(model.to("meta") if when == "before" else model)
    model.to("meta")
    assert "on the meta device" in row(handle).detail
    assert str(handle.report()) and str(patch(model).report())


@pytest.mark.parametrize("name", BOTH)
def test_another_projector_after_patching(name):
    """Modules that are gone, and one that took their place."""
    model, other = make(name), make(name, seed=1)
    handle = patch(model, strict=True, projector=True)
    holder, path = parent_and_name(model, projector(model))
    setattr(holder, path, projector(other))
    batch = batch_for(model)
    with patched(model, projector=False), torch.no_grad():
        expected = model(**batch).logits
    handle2 = patch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert "the projector is another one since" in row(handle).detail
    assert row(handle2).state == "already patched"
    delattr(holder, path)
    assert "not known as the module is now" in row(handle).detail


# Memory that somebody holds.


class Keeps(nn.Embedding):
    """Gives the same tensor again for the same ids."""

    def forward(self, ids):
        if not hasattr(self, "kept"):
            out = super().forward(ids)
            self.kept = [(out, out.clone())]
        return self.kept[0][0]


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


def keeps(embedding):
    embedding.__class__ = Keeps


def keeps_by_instance(embedding):
    forward, embedding.kept = embedding.forward, []

    def kept(ids):
        if not embedding.kept:
            out = forward(ids)
            embedding.kept.append((out, out.clone()))
        return embedding.kept[0][0]

    embedding.forward = kept


def scaled(embedding):
    embedding.__class__ = Scaled


def keeps_by_hook(embedding):
    embedding.kept = []
    embedding.register_forward_hook(lambda module, args, out: module.kept.append((out, out.clone())))


def keeps_by_global_hook(embedding):
    embedding.kept = []

    def hook(module, args, out):
        if module is embedding:
            embedding.kept.append((out, out.clone()))

    return nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [keeps, keeps_by_instance, scaled, keeps_by_hook, keeps_by_global_hook])
@pytest.mark.parametrize("entry", ["forward", "generate"])
@pytest.mark.parametrize("inference", [False, True])
def test_rows_are_not_written_into_what_somebody_holds(name, change, entry, inference):
    plain, model = make(name), make(name)
    first, second = batch_for(model), batch_for(model)
    second["pixel_values"] = second["pixel_values"].flip(0)
    patch(model, strict=True, packing=True)
    outcomes = []
    for m in (plain, model):
        handle = change(m.get_input_embeddings())
        try:
            with torch.inference_mode() if inference else torch.no_grad():
                for batch in (first, second):
                    if entry == "generate":
                        # One token: a cached embedding knows only the prompt.
                        outcomes.append(generate(m, batch, max_new_tokens=1, output_logits=True,
                                                 return_dict_in_generate=True).logits[0])  # fmt: skip
                    else:
                        outcomes.append(m(**batch).logits)
        finally:
            if handle is not None:
                handle.remove()
    for one, other in zip(outcomes[:2], outcomes[2:]):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    for out, then in getattr(model.get_input_embeddings(), "kept", ()):
        assert torch.equal(out, then)


@pytest.mark.parametrize("name", NAMES)
def test_in_place_where_upstream_writes_in_place(name, monkeypatch):
    model = make(name)
    written = []
    original = ops.place_rows
    monkeypatch.setattr(ops, "place_rows", lambda *a, **k: written.append(k["inplace"]) or original(*a, **k))
    patch(model, strict=True, packing=True)
    with torch.no_grad():
        generate(model, batch_for(model), max_new_tokens=1)
    with torch.inference_mode():
        generate(model, batch_for(model), max_new_tokens=1)
    scatters = hasattr(model, "get_placeholder_mask") or hasattr(model, "model")
    assert written == [not scatters] * 2
    model(**batch_for(model))
    assert written == [not scatters] * 2 + [False]


def test_given_embeddings_are_not_written():
    """A body that embeds by itself and is given embeddings as well."""
    model = make("native qwen3")
    batch = batch_for(model)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    before = embeds.clone()
    patch(model, strict=True, packing=True)
    with torch.no_grad():
        model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], pixel_values=batch["pixel_values"])
    assert torch.equal(embeds, before)


# What is recorded.


class Positional(nn.Module):
    def __init__(self, model, flags):
        super().__init__()
        self.model, self.flags = model, flags
        model.config.return_dict = True

    def forward(self, input_ids, attention_mask, pixel_values):
        extra = {} if self.flags is None else {"image_flags": self.flags}
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False, **extra
        ).logits


@pytest.mark.parametrize("name", [*NAMES, "native qwen2"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_trace(name, gradients, tmp_path):
    """`torch.jit.trace` records upstream's code: right on other inputs, and it can be saved."""
    model = make(name)
    batch = batch_for(model, ((2, 1),))
    args = [batch[key] for key in ("input_ids", "attention_mask", "pixel_values")]
    module = Positional(model, batch.get("image_flags"))
    try:
        torch.jit.trace(module, tuple(args), check_trace=False)
    except Exception as error:  # 5.5: IndexError
        pytest.skip(f"transformers {transformers.__version__}: the plain model cannot be traced: {error}")
    patch(model, strict=True, projector=True, packing=True)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(module, tuple(args), check_trace=False)
        args[0], args[2] = torch.where(args[0] < 280, (args[0] * 7) % 280, args[0]), args[2].flip(0)
        torch.testing.assert_close(traced(*args), module(*args), rtol=1e-4, atol=1e-4)
    torch.jit.save(traced, tmp_path / "traced.pt")
    text = str(traced.inlined_graph)
    assert "ivl::" not in text


@torch.no_grad()
@pytest.mark.parametrize("of_class", [False, True])
@pytest.mark.parametrize("part", ["pixel_shuffle", "get_placeholder_mask"])
def test_a_part_that_is_replaced_after_patching_counts(part, of_class, monkeypatch):
    def changed(model):
        core = model.model
        stock = getattr(type(core), part)

        def other(self, *args, **kwargs):
            return stock(self, *args, **kwargs).flip(1)

        if of_class:
            monkeypatch.setattr(type(core), part, other)
        else:
            core.__dict__[part] = types.MethodType(other, core)

    model = make("native qwen3")
    patch(model)
    batch = batch_for(model)
    before = model(**batch).logits
    changed(model)
    got = model(**batch).logits
    other = make("native qwen3")
    if not of_class:
        changed(other)
    assert torch.equal(got, other(**batch).logits) or (got - other(**batch).logits).abs().max() < 2e-5
    assert not torch.equal(got, before)


# What stands in between.


def deferred(ours=True):
    """(embeddings of five tokens, what stands for them, the mask of three placeholders among them)"""
    value = torch.randn(5, 4)
    return value, DeferredEmbeddings(value, ours, 290, "reference"), torch.tensor([False, True, True, False, True])


def test_a_copy_of_the_embeddings_is_a_copy():
    value, embeds, mask = deferred()
    before, copied = value.clone(), embeds.clone()
    copied[mask] = torch.ones(3, 4)
    assert torch.equal(value, before) and torch.equal(copied.tensor()[mask], torch.ones(3, 4))
    embeds[mask] = torch.ones(3, 4)
    assert torch.equal(value[mask], torch.ones(3, 4))  # nobody else holds it: in place


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rows_that_are_not_as_many_do_what_they_did(count):
    value, embeds, mask = deferred()
    rows = torch.randn(count, 4)
    if count in (1, 3):
        assert torch.equal(embeds[mask] * 0.0 + rows, value[mask] * 0.0 + rows)
    else:
        for each in (value, embeds):
            with pytest.raises(RuntimeError, match="must match the size"):
                each[mask] * 0.0 + rows


def test_memory_of_inference_mode_is_not_written_outside_it():
    ids, rows = torch.tensor([[5, 290]]), torch.ones(1, 4)
    with torch.inference_mode():
        embeds = torch.randn(1, 2, 4)
        assert place(embeds, ids, rows, 290, "", ours=True) is embeds
    before = embeds.clone()
    out = place(embeds, ids, rows * 2, 290, "", ours=True)
    assert torch.equal(embeds, before) and torch.equal(out[0, 1], rows[0] * 2)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_eps_of_the_norm(name):
    model = make(name)
    norm(model).eps = 0.4
    batch = batch_for(model)
    expected = model(**batch).logits
    patch(model, strict=True, projector=True)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
