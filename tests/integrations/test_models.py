"""Whole models after patching: native InternVL of every family, and the remote-code stand-ins."""

import copy
import gc
import inspect
import io
import weakref

import pytest
import torch
from torch import nn

from ivl_kernels import ops, patch, patched
from ivl_kernels.integrations import PatchError
from tests.models import FAMILIES, chat_inputs, chat_model, inputs, native_model

TILES = ((2, 1), (), (1,))
GREEDY = dict(max_new_tokens=32, do_sample=False)
NATIVE = [f"native {family}" for family in FAMILIES]
CHAT = ["repo qwen2", "hub qwen3", "hub qwen3_moe"]
ALL = NATIVE + CHAT
BOTH = ["native qwen3", "hub qwen3"]


def make(name, **changes):
    kind, family = name.split()
    if kind == "native":
        return native_model(family, **changes)
    return chat_model(kind, family, **changes)


def batch_for(model, tiles=TILES, **options):
    if hasattr(model, "mlp1"):
        return chat_inputs(model, tiles, flags=True, **options)
    return inputs(tiles, **options)


def generate(model, batch, **options):
    batch = {k: v for k, v in batch.items() if k != "image_flags"}
    return model.generate(**batch, **{**GREEDY, **options})


def vision(model):
    """(object, name) of the method that turns pixels into visual rows, and a function to its tensor."""
    if hasattr(model, "mlp1"):
        return model, "extract_feature", lambda out: out
    return model.model, "get_image_features", lambda out: getattr(out, "pooler_output", out)


def projector(model):
    return model.mlp1 if hasattr(model, "mlp1") else model.model.multi_modal_projector


@pytest.fixture(params=ALL)
def model(request):
    return make(request.param)


@pytest.mark.parametrize("name", ALL)
def test_forward_and_generate(name):
    model = make(name)
    batch = batch_for(model)
    with torch.no_grad():
        plain = model(**batch, labels=batch["input_ids"], output_hidden_states=True)
    tokens = generate(model, batch)
    with patched(model, strict=True, projector=True, packing=True) as handle:
        assert {row.state for row in handle.report().rows if row.feature in ("projector", "packing")} == {"patched"}
        with torch.no_grad():
            ours = model(**batch, labels=batch["input_ids"], output_hidden_states=True)
        assert type(ours) is type(plain) and list(ours.keys()) == list(plain.keys())
        for got, expected in zip(ours.hidden_states, plain.hidden_states):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.logits, plain.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.loss, plain.loss)
        assert torch.equal(generate(model, batch), tokens)
        assert generate(model, batch).shape[1] in (32, batch["input_ids"].shape[1] + 32)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain.logits)


@pytest.mark.parametrize("name", BOTH)
def test_our_ops_serve(name, monkeypatch):
    """What runs is ours: the op is called, the shuffled tensor is never made."""
    model = make(name)
    calls = []
    for op in ("pixel_shuffle_mlp", "place_rows"):
        original = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *a, _f=original, _n=op, **k: calls.append(_n) or _f(*a, **k))
    owner = model if hasattr(model, "mlp1") else model.model
    shuffles = []
    original = type(owner).pixel_shuffle
    monkeypatch.setattr(type(owner), "pixel_shuffle", lambda *a, **k: shuffles.append(1) or original(*a, **k))
    patch(model)
    shuffles.clear()  # what it computes was asked
    model(**batch_for(model))
    generate(model, batch_for(model), max_new_tokens=2)
    assert calls == ["pixel_shuffle_mlp", "place_rows"] * 2 and not shuffles


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [False, True])
def test_gradients(name, training):
    model = make(name).train(training)
    batch = batch_for(model)

    def gradients():
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain = gradients()
    patch(model)
    ours = gradients()
    assert {n for n, g in ours.items() if g is None} == {n for n, g in plain.items() if g is None}
    for n, gradient in ours.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, plain[n], rtol=1e-3, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", ["native qwen3", "repo qwen2"])
def test_frozen_parts(name):
    """Gradients of the projector alone, with everything else frozen, as in the first stage of training."""
    model = make(name)
    model.requires_grad_(False)
    projector(model).requires_grad_(True)
    batch = batch_for(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    plain = [p.grad for p in projector(model).parameters()]
    model.zero_grad(set_to_none=True)
    patch(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for p, expected in zip(projector(model).parameters(), plain):
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing(model):
    batch = batch_for(model)
    patch(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    plain = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.train()
    language = model.language_model if hasattr(model, "mlp1") else model
    language.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, plain[n], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_state_dict_and_save_pretrained(name, tmp_path):
    model = make(name)
    batch = batch_for(model)
    keys, config = list(model.state_dict()), model.config.to_dict()
    tokens = generate(model, batch, max_new_tokens=4)
    patch(model)
    assert list(model.state_dict()) == keys and model.config.to_dict() == config
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.save_pretrained(tmp_path)
    kind = type(model)
    if kind.__name__ == "InternVLChatModel":
        from ivl_kernels import enable_remote_code

        enable_remote_code(kind)
    loaded = kind.from_pretrained(tmp_path)
    if kind.__name__ == "InternVLChatModel":
        loaded.img_context_token_id = model.img_context_token_id
    assert list(loaded.state_dict()) == keys
    assert torch.equal(generate(loaded, batch, max_new_tokens=4, eos_token_id=None), tokens)
    patch(loaded, strict=True, projector=True)
    assert torch.equal(generate(loaded, batch, max_new_tokens=4, eos_token_id=None), tokens)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype(name, dtype):
    reference = make(name).to(dtype)
    model = make(name)
    handle = patch(model)
    model.to(dtype)
    assert str(dtype).removeprefix("torch.") in str(handle.report())
    batch = batch_for(model, ((2, 1),), dtype=dtype)
    with torch.no_grad():
        got, expected = model(**batch).logits, reference(**batch).logits
    assert got.dtype == dtype
    assert (got - expected).abs().max() <= 40 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("name", BOTH)
def test_deepcopy(name):
    model = make(name)
    batch = batch_for(model)
    handle = patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in projector(twin).parameters():
            p.zero_()
        object_, method, tensor = vision(twin)
        assert not tensor(getattr(object_, method)(batch["pixel_values"])).any()
        object_, method, tensor = vision(model)
        assert tensor(getattr(object_, method)(batch["pixel_values"])).any()
    handle.undo()
    assert not [m for m in model.modules() if "_ivl" in vars(m)]
    assert {row.state for row in patch(twin).report().rows if row.feature == "projector"} == {"already patched"}


@pytest.mark.parametrize("name", BOTH)
def test_two_models_one_patched(name, monkeypatch):
    one, two = make(name), make(name)
    classes = {c: dict(vars(c)) for c in {type(m) for m in one.modules()}}
    patch(one)
    assert {c: dict(vars(c)) for c in classes} == classes
    batch = batch_for(one)
    tokens = generate(one, batch, max_new_tokens=4)
    monkeypatch.setattr(ops, "place_rows", None)
    monkeypatch.setattr(ops, "pixel_shuffle_mlp", None)
    assert torch.equal(generate(two, batch, max_new_tokens=4), tokens)
    with pytest.raises(TypeError):
        generate(one, batch, max_new_tokens=4)


def test_keeps_no_model_alive(model):
    patch(model)
    model = make("native qwen2")
    patch(model)
    generate(model, batch_for(model), max_new_tokens=2)
    alive = weakref.ref(model.model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", BOTH)
def test_pickle(name):
    model = make(name)
    patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    batch = batch_for(model)
    assert torch.equal(generate(loaded, batch, max_new_tokens=4), generate(model, batch, max_new_tokens=4))


@pytest.mark.parametrize("name", BOTH)
def test_compiled_vision(name):
    model = make(name)
    object_, method, tensor = vision(model)
    pixels = batch_for(model)["pixel_values"]
    expected = tensor(getattr(object_, method)(pixels))
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(object_, method), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tensor(compiled(pixels)), expected, rtol=1e-4, atol=1e-4)
    tensor(compiled(pixels)).sum().backward()
    assert all(p.grad is not None for p in projector(model).parameters())


def test_compiled_model():
    model, batch = make("native qwen3"), inputs(((1,),))
    expected = model(**batch).logits
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["native qwen3", "repo qwen2", "hub qwen3"])
@pytest.mark.parametrize("more", [True, False])
def test_wrong_placeholder_count(name, more):
    model = make(name)
    batch = batch_for(model)
    pixels = batch["pixel_values"]
    batch["pixel_values"] = torch.cat([pixels, pixels[:1]]) if more else pixels[:-1]
    patch(model)
    with pytest.raises(ValueError, match=r"rows: got \d+ visual rows for 64 placeholder tokens \(id 290\)"):
        generate(model, batch)
    if name.startswith("native"):
        with pytest.raises(ValueError, match="visual rows for 64 placeholder"):
            model(**batch)


@pytest.mark.parametrize("name", ["repo qwen2", "hub qwen3"])
@pytest.mark.parametrize("more", [True, False])
def test_wrong_count_in_chat_forward(name, more, capsys):
    """Upstream's own answers: the repository's code drops surplus tiles and the loss, the hub's keeps the text."""
    model = make(name)
    batch = batch_for(model)
    for key in ("pixel_values", "image_flags"):
        batch[key] = torch.cat([batch[key], batch[key][:1]]) if more else batch[key][:-1]
    fails = name.startswith("repo") and not more
    outcomes = []
    for handle in (None, patch(make(name))):
        m = model if handle is None else handle.model
        if fails:
            with pytest.raises(RuntimeError):
                m(**batch)
        else:
            outcomes.append(m(**batch, labels=batch["input_ids"]))
        assert "warning" in capsys.readouterr().out
    if not fails:
        torch.testing.assert_close(outcomes[0].logits, outcomes[1].logits, rtol=1e-4, atol=1e-4)
        assert (outcomes[0].loss == 0) == (outcomes[1].loss == 0) == name.startswith("repo")


@pytest.mark.parametrize("name", ["repo qwen2", "hub qwen3"])
def test_chat_details(name):
    """Flags, missing token id, precomputed features, settings changed after patching, calls that raise."""
    plain, model = make(name), make(name)
    patch(model)
    batch = batch_for(model)
    batch["image_flags"][1] = 0
    ids = batch["input_ids"].clone()
    ids[0, (ids[0] == 290).nonzero()[:16, 0]] = 7
    batch["input_ids"] = ids
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, **close)
    batch["image_flags"] = batch["image_flags"].squeeze(1)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, **close)

    batch = {k: v for k, v in batch_for(model).items() if k != "image_flags"}
    features = model.extract_feature(batch["pixel_values"])
    expected = plain.generate(**batch, **GREEDY)
    for shape in (features.shape, (-1, features.shape[-1])):
        got = model.generate(**{**batch, "pixel_values": True}, visual_features=features.reshape(shape), **GREEDY)
        assert torch.equal(got, expected)
    out = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences, expected) and len(out.logits) == 32
    text = dict(input_ids=batch["input_ids"][1:2], attention_mask=batch["attention_mask"][1:2])
    assert torch.equal(model.generate(**text, **GREEDY), plain.generate(**text, **GREEDY))

    for setting, value in (("ps_version", "v1"), ("select_layer", -2)):
        before = getattr(model, setting)
        setattr(model, setting, value), setattr(plain, setting, value)
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = plain.extract_feature(batch["pixel_values"])
        torch.testing.assert_close(model.extract_feature(batch["pixel_values"]), expected, **close)
        setattr(model, setting, before), setattr(plain, setting, before)
    bigger = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(model.extract_feature(bigger), plain.extract_feature(bigger), **close)

    with pytest.raises(Exception):  # noqa: B017  an odd grid
        model.extract_feature(torch.randn(1, 3, 72, 72))
    with pytest.raises(Exception):  # noqa: B017
        model(**batch_for(model), return_dict=False)
    with pytest.raises(AttributeError):
        model(**{**batch_for(model), "image_flags": None})
    with pytest.raises(TypeError):
        model.generate(**batch, use_cache=True)
    with pytest.raises(Exception):  # noqa: B017  tiles but no placeholder
        model.generate(pixel_values=batch["pixel_values"], **text)
    model.img_context_token_id = None
    with pytest.raises(AssertionError):
        model.generate(**text)
    with pytest.raises(AssertionError):
        model.generate(**batch)
    with pytest.raises(AttributeError):
        model(**batch_for(model))


def test_hub_in_flash_mode_is_left_to_upstream():
    plain, model = (chat_model("hub", flash=(0.3, 0.1)) for _ in range(2))
    patch(model, **({"router": False} if "router" in _features() else {}))
    batch = chat_inputs(model, ((2,),))
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**batch, **options), plain.generate(**batch, **options))


def _features():
    from ivl_kernels.integrations import _patch

    return _patch.features()


def test_native_details():
    plain, model = native_model(), native_model()
    patch(model)
    batch = inputs(TILES)
    close = dict(rtol=1e-4, atol=1e-4)
    pixels = batch["pixel_values"]
    ours, theirs = model.model.get_image_features(pixels), plain.model.get_image_features(pixels)
    assert type(ours) is type(theirs)
    if not isinstance(ours, torch.Tensor):
        assert list(ours.keys()) == list(theirs.keys())
        torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state)
        expected = plain(**batch)
        if "mm_encoder_outputs" in inspect.signature(type(model.model).forward).parameters:  # newer versions
            text = {k: v for k, v in batch.items() if k != "pixel_values"}
            out = model(**text, mm_encoder_outputs={"image": ours})
            torch.testing.assert_close(out.logits, expected.logits, **close)
            torch.testing.assert_close(out.image_hidden_states, expected.image_hidden_states, **close)
        as_tuple, expected_tuple = (m.model(**batch, return_dict=False) for m in (model, plain))
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(expected_tuple)
        for layer in (-2, [-1, -2]):
            try:
                expected = plain.model.get_image_features(pixels, vision_feature_layer=layer).pooler_output
            except TypeError:
                continue
            got = model.model.get_image_features(pixels, vision_feature_layer=layer).pooler_output
            torch.testing.assert_close(got, expected, **close)
        for m in (model, plain):
            with pytest.raises(ValueError):
                m.model.get_image_features(pixels, vision_feature_select_strategy="wrong")
    embeds = plain.get_input_embeddings()(batch["input_ids"])
    arguments = dict(inputs_embeds=embeds, attention_mask=batch["attention_mask"], pixel_values=pixels)
    torch.testing.assert_close(model(**arguments).logits, plain(**arguments).logits, **close)
    for m in (model, plain):
        with pytest.raises(ValueError):
            m(**arguments, input_ids=batch["input_ids"])
    assert torch.equal(embeds, plain.get_input_embeddings()(batch["input_ids"]))


@pytest.mark.parametrize("name", BOTH)
def test_patch_twice_and_undo_in_any_order(name):
    model = make(name)
    batch = batch_for(model)
    tokens = generate(model, batch, max_new_tokens=4)
    before = [dict(vars(m)) for m in model.modules()]
    first = patch(model, projector=True, packing=False)
    second = patch(model)
    states = {r.feature: r.state for r in second.report().rows}
    assert states["projector"] == "already patched" and states["packing"] == "patched"
    first.undo()
    assert torch.equal(generate(model, batch, max_new_tokens=4), tokens)
    second.undo()
    assert [dict(vars(m)) for m in model.modules()] == before


@pytest.mark.parametrize("name", BOTH)
def test_hooks_on_the_projector_still_run(name):
    model = make(name)
    seen = []
    projector(model).register_forward_hook(lambda m, a, out: seen.append(out.shape))
    patch(model, strict=True, projector=True)
    model(**batch_for(model))
    assert seen == [(4, 16, 48)]
    inner = next(m for m in projector(model).modules() if isinstance(m, nn.Linear))
    inner.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    handle = patch(model)
    model(**batch_for(model))
    assert seen[1:] == [(4, 16, 48)] * 2
    assert "has hooks" in str(handle.report())


@pytest.mark.parametrize("name", ["native qwen3", "repo qwen2"])
def test_lora_on_the_projector_is_refused(name):
    peft = pytest.importorskip("peft")
    targets = r".*(multi_modal_projector\.linear_\d|mlp1\.[13])"
    model = peft.get_peft_model(make(name), peft.LoraConfig(r=2, target_modules=targets))
    handle = patch(model)
    refused = [r for r in handle.report().rows if r.state == "refused"]
    assert [r.feature for r in refused] == ["projector"] and "peft" in refused[0].detail
    with pytest.raises(PatchError, match="peft"):
        patch(make_lora(name, peft, targets), strict=True)
    batch = batch_for(model.base_model.model)
    model.train()
    loss = model.base_model.model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert any(p.grad is not None for n, p in model.named_parameters() if "lora" in n)


def make_lora(name, peft, targets):
    return peft.get_peft_model(make(name), peft.LoraConfig(r=2, target_modules=targets))


@pytest.mark.parametrize("name", ["native qwen3", "repo qwen2"])
def test_lora_added_after_patching(name):
    """The patched projector notices at the call that its layers are no longer plain, and lets upstream's code run."""
    peft = pytest.importorskip("peft")
    targets = r".*(multi_modal_projector\.linear_\d|mlp1\.[13])"
    plain, model = make(name), make(name)
    handle = patch(model)
    batch = batch_for(model)
    for m in (plain, model):
        torch.manual_seed(1)
        peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)
    assert "upstream's own code: " in str(handle.report()) and "peft" in str(handle.report())


def test_refusals():
    model = native_model()
    model.model.multi_modal_projector.act = nn.GELU("tanh")
    with pytest.raises(PatchError, match="not the exact GELU"):
        patch(model, strict=True)
    model = chat_model("repo")
    model.mlp1.append(nn.ReLU())
    with pytest.raises(PatchError, match=r"4 is ReLU\(\), not the exact GELU"):
        patch(model, strict=True)
    model = chat_model("repo")
    del model.mlp1
    with pytest.raises(PatchError, match="unknown structure: .* no attribute 'mlp1'"):
        patch(model, strict=True)
    model = native_model()
    model.model.forward = lambda *a, **k: None
    with pytest.raises(PatchError, match="forward of this instance was replaced before"):
        patch(model, strict=True)


def test_rotary_function_that_is_a_module(monkeypatch):
    """As with Hugging Face kernels: the module's function is an nn.Module that calls it."""
    from transformers.models.qwen3 import modeling_qwen3

    class Func(nn.Module):
        def forward(self, *args, **kwargs):
            return original(*args, **kwargs)

    original = modeling_qwen3.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", Func())
    model = native_model("qwen3")
    expected = model(**inputs(TILES)).logits
    handle = patch(model)
    assert {r.state for r in handle.report().rows if r.feature in ("projector", "packing")} == {"patched"}
    torch.testing.assert_close(model(**inputs(TILES)).logits, expected, rtol=1e-4, atol=1e-4)


def test_model_inside_a_wrapper_and_part_of_a_model():
    model = native_model()
    wrapper = nn.Sequential(nn.Identity(), model)
    handle = patch(wrapper)
    assert {r.module for r in handle.report().patched} >= {"1.model"}
    handle.undo()
    handle = patch(model.model)
    assert {r.state for r in handle.report().rows if r.feature == "projector"} == {"patched"}
    expected = native_model()(**inputs()).logits
    torch.testing.assert_close(model(**inputs()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BOTH)
def test_inference_mode_and_frozen_embeddings(name):
    model = make(name)
    batch = batch_for(model)
    with torch.no_grad():
        expected = model(**batch).logits
    patch(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    model.get_input_embeddings().requires_grad_(False)
    out = model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4)
    out.loss.backward()
