"""The projector module: names, sharing, state dict."""

import copy

import pytest
import torch
from torch import nn

from ivl_kernels.nn import PixelShuffleProjector


def mlp(names, vision=4, hidden=6):
    """The Sequentials of the remote code."""
    if names == "mlp1":
        return nn.Sequential(
            nn.LayerNorm(4 * vision), nn.Linear(4 * vision, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
    return nn.Sequential(
        nn.LayerNorm(16 * vision), nn.Linear(16 * vision, 2 * hidden), nn.GELU(), nn.Dropout(0.1),
        nn.Linear(2 * hidden, 2 * hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * hidden, hidden),
    )  # fmt: skip


def native(vision=4, hidden=6, **extra):
    from transformers import InternVLConfig
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    config = InternVLConfig(
        vision_config={"hidden_size": vision}, text_config={"model_type": "qwen2", "hidden_size": hidden}, **extra
    )
    return InternVLMultiModalProjector(config)


def shuffled(x, merge):
    t, n, c = x.shape
    side = int(n**0.5)
    x = x.view(t, side // merge, merge, side // merge, merge, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(t, (side // merge) ** 2, merge * merge * c)


def broken(second=None, third=None, first=None):
    return nn.Sequential(
        first or nn.LayerNorm(16), second or nn.Linear(16, 6), third or nn.GELU(), nn.Linear(6, 6)
    )  # fmt: skip


MODULES = {"transformers": native, "mlp1": lambda: mlp("mlp1"), "mlp2": lambda: mlp("mlp2")}


@pytest.mark.parametrize("names", MODULES)
def test_shares_the_parameters(names):
    module = MODULES[names]().eval()
    ours = PixelShuffleProjector.from_module(module, skip=1)
    pointers = {n: p.data_ptr() for n, p in module.named_parameters()}
    assert {n: p.data_ptr() for n, p in ours.named_parameters()} == pointers
    x = torch.randn(2, 65, 4)
    torch.testing.assert_close(ours(x), module(shuffled(x[:, 1:], ours.merge)))
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    torch.testing.assert_close(ours(x), module(shuffled(x[:, 1:], ours.merge)))


@pytest.mark.parametrize("names", MODULES)
def test_state_dict(names):
    module = MODULES[names]().eval()
    ours = PixelShuffleProjector(4, 6, names=names).eval()
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in module.named_parameters()]
    ours.load_state_dict(module.state_dict())
    x = torch.randn(1, 64, 4)
    torch.testing.assert_close(ours(x), module(shuffled(x, ours.merge)))
    other = copy.deepcopy(ours).to(torch.bfloat16)
    torch.testing.assert_close(other(x.bfloat16()).float(), ours(x), rtol=0.05, atol=0.05)


def test_gradients_reach_the_shared_parameters():
    module = mlp("mlp1")
    ours = PixelShuffleProjector.from_module(module)
    x = torch.randn(2, 64, 4)
    expected = torch.autograd.grad(module(shuffled(x, 2)).square().sum(), [*module.parameters()])
    ours(x).square().sum().backward()
    for parameter, grad in zip(module.parameters(), expected):
        torch.testing.assert_close(parameter.grad, grad)


def test_tiles_into_place():
    ours = PixelShuffleProjector(4, 6)
    x, out = torch.randn(3, 16, 4), torch.zeros(10, 6)
    with torch.no_grad():
        ours(x, tile_indices=torch.tensor([2]), out=out, out_rows=torch.tensor([5]))
    torch.testing.assert_close(out[5:9], ours(x)[2])
    assert not out[:5].any() and not out[9:].any()


def test_dropout():
    ours = PixelShuffleProjector.from_module(mlp("mlp2"))
    with pytest.raises(RuntimeError, match="dropout: got 0.1 in train mode"):
        ours(torch.randn(1, 16, 4))
    assert ours.eval()(torch.randn(1, 16, 4)).shape == (1, 1, 6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 6)), "module: got layers 0, 1, expected those of"),
        (lambda: native(projector_hidden_act="gelu_pytorch_tanh"), "act is .*, not the exact GELU"),
        (lambda: broken(third=nn.ReLU()), "2 is ReLU.*, not the exact GELU"),
        (lambda: broken(second=nn.Linear(16, 6, bias=False)), "1 has no bias"),
        (lambda: broken(first=nn.RMSNorm(16)), "0 is a .*RMSNorm, not a plain LayerNorm"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        PixelShuffleProjector.from_module(make())


def test_unknown_names():
    with pytest.raises(ValueError, match="names: got 'mlp3'"):
        PixelShuffleProjector(4, 6, names="mlp3")
