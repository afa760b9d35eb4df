"""Whoever looks at a module under Flash sees tensors of the right value; every mix of dtypes that plain torch takes."""

import copy

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import ivl_kernels
from ivl_kernels.testing import assert_accurate
from ivl_kernels.testing.shipped import ShippedRouter
from tests.integrations.test_flash_native import GREEDY, by_hand, flash_model
from tests.models import chat_inputs, chat_model, inputs

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*past_key_values")
FLASH = (0.3, 0.1)


def chat(**changes):
    model = chat_model("hub", flash=FLASH, **changes)
    return model, chat_inputs(model, ((3,),))


def native():
    return flash_model(), inputs(((3,),))


def embeds_seen(model, batch):
    """Embeddings that the language model gets first in a generation."""
    seen = []
    decoder = model.language_model if hasattr(model, "vision_model") else model.model.language_model
    handle = decoder.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"].clone()), with_kwargs=True
    )
    model.generate(**batch, max_new_tokens=1, do_sample=False)
    handle.remove()
    return seen[0]


def norms_of(model, which):
    router, mlp2 = (model.flash, model.flash.mlp2) if hasattr(model, "flash") else (model, model.mlp2)
    mlp1 = model.mlp1 if hasattr(model, "mlp1") else model.model.multi_modal_projector
    holders = {
        "mlp2": [mlp2],
        "mlp1": [mlp1],
        "router": [router.pooling_before_gating, router.gating],
        "all": [mlp1, mlp2, router.pooling_before_gating, router.gating],
    }
    return [m for holder in holders[which] for m in holder.modules() if isinstance(m, torch.nn.LayerNorm)]


@pytest.mark.parametrize("which", ["mlp2", "mlp1", "router", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["chat", "native"])
def test_norms_kept_in_float32(kind, dtype, which):
    def build(dtype, norms):
        model, batch = chat() if kind == "chat" else native()
        model.to(dtype)
        for norm in norms_of(model, which):
            norm.to(norms)
        return model, {**batch, "pixel_values": batch["pixel_values"].to(dtype)}

    def plain(model, batch):
        if kind == "chat":
            return embeds_seen(model, batch)
        with torch.no_grad():
            return by_hand(model, batch, compress=decided)[1]

    decided = torch.tensor([True, False, True])
    model, batch = build(dtype, torch.float32)
    wide = build(dtype, dtype)[0]
    for parameter, same in zip(wide.parameters(), model.parameters()):
        parameter.data = same.data.double()
    wide_batch = {**batch, "pixel_values": batch["pixel_values"].double()}
    # As shipped, so that rounding does not decide otherwise.
    with ivl_kernels.patched(model, flash_folded=False, projector=False, rope=False, attention=False) as handle:
        got = embeds_seen(model, batch)
        decided = torch.tensor(handle.last_routing().images[0].compressed)
        scores = handle.last_routing().images[0].scores
        detail = next(row.detail for row in handle.report().rows if row.feature == "flash")
        assert "by its own modules: its parameters are" in detail and "float32" in detail
    if kind == "native":
        router = ShippedRouter(32).eval().to(dtype)
        state = {k: v for k, v in model.flash.state_dict().items() if not k.startswith("mlp2")}
        router.load_state_dict(state, assign=True)
        vit = model.model.vision_tower(pixel_values=batch["pixel_values"]).last_hidden_state
        assert router(vit)[:, 0].tolist() == scores
    expected = plain(model, batch)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    with torch.no_grad():
        if kind == "chat":
            small, full, _ = wide.extract_feature_flash(wide_batch["pixel_values"], torch.ones(3, dtype=torch.int64))
            ids = batch["input_ids"][0]
            truth = wide.get_input_embeddings()(ids)
            truth, kept, _, _ = wide.compress_visual_tokens_in_sentence(
                truth, ids, batch["attention_mask"][0], 290, decided
            )
            truth[kept == 290] = torch.cat([small[t] if decided[t] else full[t] for t in range(3)])
            truth = truth[None]
        else:
            truth = by_hand(wide, wide_batch, compress=decided)[1]
    assert_accurate(got, truth, expected)


WATCHED = {
    "chat": ["mlp1", "mlp1.2", "mlp2", "mlp2.0", "mlp2.3", "mlp2.7", "pooling_before_gating", "gating"]
    + ["gating.block2.1", "pooling_before_gating.attn2", "language_model.model.embed_tokens"],
    "native": ["model.multi_modal_projector", "model.multi_modal_projector.act", "flash.mlp2", "flash.mlp2.4"]
    + ["flash.pooling_before_gating", "flash.gating", "flash.gating.gate.0", "flash.pooling_before_gating.norm1"]
    + ["model.language_model.embed_tokens"],
}
CASES = [(kind, path) for kind, paths in WATCHED.items() for path in paths]


@pytest.mark.parametrize("kind, path", CASES)
def test_a_hook_keeps_what_it_sees(kind, path):
    """It is not overwritten, and a change the hook makes counts."""
    model, batch = chat() if kind == "chat" else native()
    handle_of = ivl_kernels.patch(model)
    expected = model.generate(**batch, **GREEDY)
    kept = []

    def keep(module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        kept.append((out, out.clone()))

    handle = model.get_submodule(path).register_forward_hook(keep)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)
    assert kept and all(torch.equal(out, before) for out, before in kept)
    assert all(type(out) is torch.Tensor for out, _ in kept)
    handle.remove()
    if path.startswith("pooling") or "gat" in path:
        return  # what changes there decides otherwise

    def change(module, args, out):
        return out * 0.5

    model.get_submodule(path).register_forward_hook(change)
    got, decided = embeds_seen(model, batch), torch.tensor(handle_of.last_routing().images[0].compressed)
    if kind == "native":
        with torch.no_grad():
            expected = by_hand(model, batch, compress=decided)[1]
    else:
        handle_of.undo()
        expected = embeds_seen(model, batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["chat", "native"])
@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_global_hooks_see_values_that_stay(kind, register):
    model, batch = chat() if kind == "chat" else native()
    with torch.no_grad():
        wanted = model.mlp2 if kind == "chat" else model.flash.mlp2
        ivl_kernels.patch(model, rope=False, packing=False, projector=False)
        expected = embeds_seen(model, batch)
        kept = []

        def keep(module, args, out=None):
            for value in (*args, out):
                if isinstance(value, torch.Tensor):
                    kept.append((module, value, value.clone()))

        handle = register(keep)
        try:
            got = embeds_seen(model, batch)
        finally:
            handle.remove()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert {type(value) for _, value, _ in kept} <= {torch.Tensor, torch.nn.Parameter}
    changed = {type(module).__name__ for module, value, before in kept if not torch.equal(value, before)}
    assert not changed & {"Embedding", "Linear", "LayerNorm", "GELU", "Sequential", "MultiheadAttention"}
    assert any(module is wanted for module, _, _ in kept)


def test_an_embedding_that_keeps_its_output():
    """The same tensor at every call: visual rows must not be written into it."""

    class Keeping(torch.nn.Embedding):
        def forward(self, ids):
            key = tuple(ids.flatten().tolist())
            if key not in self.kept:
                self.kept[key] = super().forward(ids)
            return self.kept[key]

    for model, batch in (chat(), native()):
        ivl_kernels.patch(model)
        expected = model.generate(**batch, **GREEDY)
        old = model.get_input_embeddings()
        keeping = Keeping(*old.weight.shape)
        keeping.weight, keeping.kept = old.weight, {}
        (model.language_model if hasattr(model, "vision_model") else model).set_input_embeddings(keeping)
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
        for key, out in keeping.kept.items():
            assert torch.equal(out.flatten(0, 1), old.weight[list(key)])


def test_a_hook_that_makes_its_output_require_gradients():
    """As `enable_input_require_grads` does: without gradients the visual rows do not go into the hook's tensor."""
    for model, batch in (chat(), native()):
        ivl_kernels.patch(model)
        expected, kept = model.generate(**batch, **GREEDY), []

        def require(module, args, out, kept=kept):
            kept.append((out.requires_grad_(True), out.detach().clone()))

        model.get_input_embeddings().register_forward_hook(require)
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
        assert kept and all(torch.equal(out.detach(), before) for out, before in kept)


def test_an_embedding_that_renormalises():
    """`max_norm` changes the table itself: the layer is called."""
    for model, batch in (chat(), native()):
        model.get_input_embeddings().max_norm = 0.5
        plain = copy.deepcopy(model)
        ivl_kernels.patch(model)
        got = embeds_seen(model, batch)
        with torch.no_grad():
            expected = plain.get_input_embeddings()(batch["input_ids"])
        table, wanted = model.get_input_embeddings().weight, plain.get_input_embeddings().weight
        assert torch.equal(table, wanted) and torch.equal(got[0, 0], expected[0, 0])
