"""`TileRouter` beside the shipped modules: names, sharing, training."""

import pytest
import torch

from ivl_kernels.flash import router_problem
from ivl_kernels.nn import TileRouter
from ivl_kernels.testing.shipped import ShippedRouter


def pair(width=32, heads=4):
    shipped, router = ShippedRouter(width, heads), TileRouter(width, heads)
    router.load_state_dict(shipped.state_dict())
    return shipped.eval(), router.eval()


def test_names_are_the_checkpoints():
    shipped, router = pair()
    assert list(router.state_dict()) == list(shipped.state_dict())
    names = set(router.state_dict())
    assert {
        "pooling_before_gating.query_token",
        "pooling_before_gating.attn4.in_proj_weight",
        "pooling_before_gating.attn1.out_proj.bias",
        "pooling_before_gating.norm3.weight",
        "gating.block1.0.weight",
        "gating.block4.3.bias",
        "gating.block2.5.weight",
        "gating.gate.0.bias",
        "gating.gate.1.weight",
    } <= names
    assert len(names) == 1 + 4 * 6 + 4 * 6 + 4


@pytest.mark.parametrize("folded", [True, False])
def test_result(folded):
    shipped, router = pair()
    router.folded = folded
    z = torch.randn(3, 17, 32)
    with torch.no_grad():
        torch.testing.assert_close(router(z, skip=1), shipped(z))
        p, logits = router(z, skip=1, return_logits=True)
    torch.testing.assert_close(logits.softmax(-1), p)


def test_from_modules_shares_everything():
    shipped, _ = pair()
    router = TileRouter.from_modules(shipped.pooling_before_gating, shipped.gating)
    assert not router.training
    assert [p.data_ptr() for p in router.parameters()] == [p.data_ptr() for p in shipped.parameters()]
    z = torch.randn(3, 17, 32)
    with torch.no_grad():
        shipped.gating.gate[1].weight.mul_(2)
        torch.testing.assert_close(router(z, skip=1), shipped(z))


def test_dropout_only_in_train_mode():
    _, router = pair()
    z = torch.randn(3, 17, 32)
    assert torch.equal(router(z), router(z))
    router.train()
    assert not torch.equal(router(z), router(z))


def test_training_reaches_every_used_parameter():
    """Router training: everything frozen but the router, a loss on the logits."""
    _, router = pair()
    router.train()
    _, logits = router(torch.randn(4, 17, 32), return_logits=True)
    assert logits.dtype == torch.float32
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0])).backward()
    for name, parameter in router.named_parameters():
        unused = any(part in name for part in ("attn3", "attn4", "norm3", "norm4"))
        assert (parameter.grad is None) == unused, name
        assert unused or parameter.grad.abs().max() > 0, name


def test_learns():
    _, router = pair()
    z, labels = torch.randn(8, 9, 32), torch.arange(8) % 2
    optimizer = torch.optim.Adam(router.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(router(z, return_logits=True)[1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_dtype_and_compile():
    _, router = pair()
    router.to(torch.bfloat16)
    z = torch.randn(3, 17, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        p = router(z, skip=1)
        assert p.dtype == torch.bfloat16
        assert torch.equal(torch.compile(router, fullgraph=True, backend="aot_eager")(z, skip=1), p)


def set_(path, name, value):
    return lambda router: setattr(router.get_submodule(path), name, value)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda router: None, ""),
        (lambda router: router.train(), ""),
        (set_("gating.block2.5", "eps", 1e-6), "differ in eps"),
        (set_("pooling_before_gating.norm2", "eps", 1e-6), "differ in eps"),
        (set_("gating.block3.4", "p", 0.3), "dropouts differ"),
        (set_("gating.block3.1", "approximate", "tanh"), "block3.1 is GELU"),
        (set_("pooling_before_gating.attn2", "num_heads", 2), "other options"),
        (set_("pooling_before_gating.attn2", "batch_first", False), "other options"),
        (set_("pooling_before_gating.attn1", "add_zero_attn", True), "other options"),
        (
            lambda router: router.train() and set_("pooling_before_gating.attn1", "dropout", 0.1)(router),
            "other options",
        ),
        (lambda router: router.get_submodule("gating.gate.1").double(), "float32 and float64"),
        (lambda router: router.get_submodule("gating.gate.1").register_forward_hook(print), "gate.1 has hooks"),
        (lambda router: router.get_submodule("gating").register_forward_hook(print), "gating has hooks"),
    ],
)
def test_when_the_router_must_be_called(change, reason):
    _, router = pair()
    change(router)
    why = router_problem(router)
    assert reason in why and bool(why) == bool(reason)


def test_a_dropout_of_the_attention_that_is_off():
    _, router = pair()
    router.pooling_before_gating.attn1.dropout = 0.1
    assert router_problem(router) == ""
