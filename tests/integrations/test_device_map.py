"""Models spread over devices or offloaded by accelerate, before and after patching."""

import copy
import functools
import pickle

import pytest
import torch

from ivl_kernels import ops, patch
from ivl_kernels.integrations import Editor
from ivl_kernels.models.upstream import forward_name
from tests.models import chat_inputs, chat_model, inputs, native_model

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import (  # noqa: E402
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)

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


def vision_tower(model):
    return "vision_model" if hasattr(model, "mlp1") else "model.vision_tower"


def each_module(model, folder=None):
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def dispatched(model, folder=None):
    """What `from_pretrained(device_map=...)` does over several devices; here the CPU is each of them."""
    accelerate.dispatch_model(model, _map(model, "cpu"), force_hooks=True)


def _map(model, elsewhere):
    tower = vision_tower(model)
    names = [name for name, module in model.named_children() if [*module.parameters()]]
    if "model" in names:
        names.remove("model")
        names += [f"model.{name}" for name, _ in model.model.named_children()]
    return {name: "cpu" if name == tower else elsewhere for name in names}


def partly_on_disk(model, folder):
    accelerate.dispatch_model(model, _map(model, "disk"), offload_dir=folder)


def cpu_offload(model, folder=None):
    accelerate.cpu_offload(model, execution_device="cpu")


def disk_offload(model, folder):
    accelerate.disk_offload(model, folder, execution_device="cpu")


@pytest.fixture
def calls(monkeypatch):
    """The ops of ours that a forward called, in order."""
    seen = []
    for name in ("pixel_shuffle_mlp", "place_rows"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _f=original, _n=name, **k: seen.append(_n) or _f(*a, **k))
    return seen


def state(model):
    """What a module's instance holds besides parameters; functions of accelerate by their name."""

    def plain(value):
        if isinstance(value, functools.partial):
            return value.func.__qualname__
        return (value.__func__, id(value.__self__)) if hasattr(value, "__func__") else id(value)

    names = ("forward", "_old_forward", "_ivl", "get_image_features", "extract_feature", "generate")
    return {
        path: {name: plain(module.__dict__[name]) for name in names if name in module.__dict__}
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("spread", [each_module, dispatched])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt_oss", "repo", "hub"])
def test_spread_over_devices(name, spread, order, calls, tmp_path):
    """Nothing is offloaded: served, inside accelerate's hooks; undone to what accelerate alone would have left."""
    model, batch = make(name)
    expected = logits(model, batch)
    if order == "before":
        handle = patch(model)
        spread(model)
    else:
        spread(model)
        before = state(model)
        handle = patch(model)
    rows = [row for row in handle.report().rows if row.feature in DENSE]
    assert {row.state for row in rows} == {"patched"} and "upstream" not in str(rows)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert calls == ["pixel_shuffle_mlp", "place_rows"]
    assert {row.state for row in handle.undo().rows} == {"undone"}
    assert torch.equal(logits(model, batch), expected) and len(calls) == 2
    if order == "before":
        other, _ = make(name)
        spread(other)
        ids = {id(m): path for path, m in model.named_modules()} | {id(m): path for path, m in other.named_modules()}
        for path, held in state(other).items():
            assert state(model)[path].keys() == held.keys(), path
            assert [ids.get(v[1], v) if isinstance(v, tuple) else v for v in state(model)[path].values()] == [
                ids.get(v[1], v) if isinstance(v, tuple) else v for v in held.values()
            ]
    else:
        assert state(model) == before


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload, partly_on_disk])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt_oss", "hub"])
def test_offloaded(name, offload, order, tmp_path, calls):
    model, batch = make(name)
    expected = logits(model, batch)
    if order == "before":
        handle = patch(model)
        offload(model, str(tmp_path))
    else:
        offload(model, str(tmp_path))
        handle = patch(model)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert calls == ["place_rows"] * 2
    (projector,) = [row for row in handle.report().rows if row.feature == "projector"]
    assert "on the meta device (offloaded)" in projector.detail
    dense = [row.detail for row in handle.report().patched if row.feature in DENSE]
    assert all(" on cpu)" in detail or "(offloaded)" in detail for detail in dense), dense
    assert {row.state for row in handle.undo().rows} == {"undone"}
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("name", ["qwen3", "hub"])
def test_what_the_hooks_move_is_what_we_get(name, calls):
    """Another dtype stands for another device here: `.to` moves there alike, and the ops take no mixture."""

    def elsewhere(model):
        text = model.language_model.model if hasattr(model, "mlp1") else model.model.language_model
        projector = model.mlp1 if hasattr(model, "mlp1") else model.model.multi_modal_projector
        head = model.get_output_embeddings() or model.language_model.get_output_embeddings()
        each_module(model)
        for part in (projector, text.layers[1], text.norm, head):
            part.double()
            for module in part.modules():
                module._hf_hook.execution_device = torch.float64

    model, batch = make(name)
    elsewhere(model)
    expected = logits(model, batch)
    for order in ("before", "after"):
        model, batch = make(name)
        if order == "before":
            patch(model)
        elsewhere(model)
        if order == "after":
            patch(model)
        calls.clear()
        got = logits(model, batch)
        assert got.dtype == torch.float64 and calls[0] == "pixel_shuffle_mlp"
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_output_goes_back_where_the_input_was():
    model, batch = make("qwen3")
    patch(model)
    each_module(model)
    projector = model.model.multi_modal_projector
    logits(model, batch)
    assert projector._hf_hook.input_device == torch.device("cpu")


@pytest.mark.parametrize("name", ["qwen3", "hub"])
def test_hooks_removed_between(name):
    """Patched below the hooks; the hooks go; then ours: as if neither had been there, up to what accelerate leaves."""
    model, batch = make(name)
    expected = logits(model, batch)
    each_module(model)
    handle = patch(model)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert {row.state for row in patch(model).report().patched} == {"already patched"}
    projector = model.mlp1 if hasattr(model, "mlp1") else model.model.multi_modal_projector
    assert not pickle.loads(pickle.dumps(projector))._ivl.seats  # loads unpatched
    twin = copy.deepcopy(model)
    assert {row.state for row in handle.undo().rows} == {"undone"}
    assert torch.equal(logits(model, batch), expected)
    other, _ = make(name)
    each_module(other)
    remove_hook_from_module(other, recurse=True)
    assert [held.keys() for held in state(model).values()] == [held.keys() for held in state(other).values()]
    torch.testing.assert_close(logits(twin, batch), expected, rtol=1e-4, atol=1e-4)


def test_hooks_added_removed_undone():
    model, batch = make("qwen3")
    expected = logits(model, batch)
    handle = patch(model)
    each_module(model)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    handle.undo()
    assert torch.equal(logits(model, batch), expected)
    for module in model.modules():
        assert "_ivl" not in module.__dict__
        assert "forward" not in module.__dict__ or module.forward.__func__ is type(module).forward


def test_ours_below_and_above_a_hook():
    """Wrapped before the hook and again after it, undone in both orders."""
    for first in (0, 1):
        layer, x = torch.nn.Linear(3, 3), torch.ones(2, 3)
        plain = layer(x)
        editors = [Editor(("a", "a")), Editor(("b", "b"))]
        editors[0].method(layer, forward_name(layer), lambda inner, self, x: inner(self, x) + 1)
        add_hook_to_module(layer, AlignDevicesHook("cpu"))
        editors[1].method(layer, forward_name(layer), lambda inner, self, x: inner(self, x) * 10)
        assert torch.equal(layer(x), (plain + 1) * 10)
        assert not editors[first].roll_back()
        assert torch.equal(layer(x), plain + 1 if first else plain * 10)
        assert not editors[1 - first].roll_back()
        assert torch.equal(layer(x), plain) and "_ivl" not in layer.__dict__
        assert layer._old_forward.__func__ is torch.nn.Linear.forward


@pytest.mark.parametrize("order", ["before", "after"])
def test_another_kind_of_hook_is_respected(order):
    """A hook that does more than move tensors sees and changes what the layer gives: the layer is called."""

    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    def hooked(model):
        add_hook_to_module(model.model.multi_modal_projector.linear_1, Doubling())

    model, batch = make("qwen3")
    hooked(model)
    expected = logits(model, batch)
    model, batch = make("qwen3")
    if order == "before":
        handle = patch(model)
        hooked(model)
    else:
        hooked(model)
        handle = patch(model)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert "linear_1 has a Doubling" in str(handle.report())


def test_generation_on_a_dispatched_model():
    model, batch = make("qwen3")
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
    dispatched(model)
    patch(model, strict=True, projector=True, packing=True, rope=True)
    assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), tokens)
