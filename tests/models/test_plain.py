"""When the layers of a projector may be read: by what they compute, under any names."""

import re

import pytest
import torch
from torch import nn

from ivl_kernels.models.plain import LinearStack, Mlp, linear_stack, mlp, rms_norm
from tests.models import chat_model, native_model


class Named(nn.Module):
    """A projector with names, an activation class and an order of its own."""

    def __init__(self, activation=None):
        super().__init__()
        self.last, self.drop = nn.Linear(6, 4), nn.Dropout(0.5)
        self.first, self.scale = nn.Linear(8, 6), nn.LayerNorm(8)
        self.between = activation or Erf()

    def forward(self, tokens):
        return self.last(self.drop(self.between(self.first(self.scale(tokens)))))


class Erf(nn.Module):
    def forward(self, x):
        return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


class Branched(Named):
    def forward(self, tokens):
        return super().forward(tokens) + 1


class Early(Named):
    def forward(self, tokens):
        return self.last(self.first(self.between(self.scale(tokens))))


def wrap(layer):
    layer.register_forward_hook(lambda module, args, out: out * 2)


def test_served():
    named = Named().eval()
    assert linear_stack(named) == LinearStack(named.scale, (named.first, named.last))
    sequence = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Dropout(0.1), nn.Linear(6, 4)).eval()
    assert linear_stack(sequence) == LinearStack(sequence[0], (sequence[1], sequence[4]))
    projector = native_model().model.multi_modal_projector
    assert linear_stack(projector) == LinearStack(projector.layer_norm, (projector.linear_1, projector.linear_2))
    mlp2 = chat_model("hub", flash=(0.3, 0.1)).mlp2
    assert linear_stack(mlp2) == LinearStack(mlp2[0], (mlp2[1], mlp2[4], mlp2[7]))
    x = torch.randn(3, 8)
    norm, linears = linear_stack(named)
    torch.testing.assert_close(linears[1](nn.functional.gelu(linears[0](norm(x)))), named(x))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: m.train(), "drop is a dropout that is live"),
        (lambda m: wrap(m), "the projector has hooks"),
        (lambda m: wrap(m.between), "between has hooks"),
        (lambda m: wrap(m.drop), "drop has hooks"),
        (lambda m: wrap(m.first), "first has hooks"),
        (lambda m: m.scale.double(), "float32 and float64"),
        (lambda m: m.last.to("meta"), "last.weight is on the meta device"),
        (lambda m: setattr(m, "forward", lambda x: x), "the projector.forward was replaced"),
        (lambda m: setattr(m.first, "forward", lambda x: x), "first.forward was replaced"),
        (lambda m: setattr(m, "between", nn.GELU("tanh")), "not the exact GELU"),
        (lambda m: setattr(m, "between", nn.SiLU()), "not the exact GELU"),
        (lambda m: setattr(m, "between", nn.PReLU()), "not the exact GELU"),
        (lambda m: setattr(m, "scale", nn.RMSNorm(8)), "scale is a torch.nn.modules.normalization.RMSNorm"),
        (lambda m: setattr(m, "scale", nn.LayerNorm(8, bias=False)), "scale has no weight or bias"),
        (lambda m: setattr(m, "last", nn.Linear(6, 4, bias=False)), "last has no bias"),
        (lambda m: setattr(m, "last", nn.Linear(7, 4)), "widths do not fit"),
        (lambda m: setattr(m, "last", nn.Bilinear(6, 6, 4)), "last is a torch.nn.modules.linear.Bilinear"),
        (lambda m: m.register_parameter("shift", nn.Parameter(torch.zeros(4))), "more than call its layers"),
    ],
)
def test_refused_with_a_reason(change, reason):
    named = Named().eval()
    change(named)
    assert reason in linear_stack(named)


def test_refused_for_what_forward_does():
    assert "more than call its layers in turn" in linear_stack(Branched().eval())
    assert "first is a" in linear_stack(Early().eval()) or "between is a" in linear_stack(Early().eval())
    assert "end in a linear layer" in linear_stack(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4), nn.GELU()))


def test_global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert "global module hooks" in linear_stack(Named().eval())
    finally:
        handle.remove()


def test_inside_torch_compile():
    for projector in (native_model().model.multi_modal_projector, chat_model("hub").mlp1):

        def forward(x, projector=projector):
            found = linear_stack(projector)
            return x if isinstance(found, str) else x + found.linears[0].weight.sum()

        torch._dynamo.reset()
        x = torch.randn(3)
        compiled = torch.compile(forward, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), x + linear_stack(projector).linears[0].weight.sum())
        torch._dynamo.reset()


def test_an_rms_norm_is_judged_by_what_it_computes():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    assert rms_norm(Qwen3RMSNorm) == ("variance_epsilon", "")
    assert "computes something else" in rms_norm(GptOssRMSNorm)[1]  # the same in float32
    assert rms_norm(GptOssRMSNorm, "after_weight") == ("variance_epsilon", "")
    assert "computes something else" in rms_norm(Qwen3RMSNorm, "after_weight")[1]
    assert rms_norm(nn.LayerNorm)[1]


def test_parameters_on_several_devices(monkeypatch):
    named = Named().eval()
    elsewhere, device = named.last.weight, torch.Tensor.device
    where = property(lambda p: torch.device("cuda:1") if p is elsewhere else device.__get__(p))
    monkeypatch.setattr(nn.Parameter, "device", where, raising=False)
    assert linear_stack(named) == "its parameters are on several devices"


class Gated(nn.Module):
    def __init__(self, activation=None):
        super().__init__()
        self.d, self.b, self.a = nn.Linear(6, 4, bias=False), nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)
        self.act = activation or nn.SiLU()

    def forward(self, x):
        return self.d(self.b(x) * self.act(self.a(x)))


class Residual(Gated):
    def forward(self, x):
        return self.d(self.b(x) * self.act(self.a(x)) * x)


class Twice(Gated):
    def forward(self, x):
        return self.d(self.b(x) * self.act(self.b(x)))


def test_mlps():
    model = native_model("qwen3").model
    vision = model.vision_tower.encoder.layer[0].mlp
    assert mlp(vision) == Mlp(None, vision.fc1, vision.fc2)
    text = model.language_model.layers[0].mlp
    assert mlp(text) == Mlp(text.gate_proj, text.up_proj, text.down_proj)
    remote = chat_model("hub").vision_model.encoder.layers[0].mlp
    assert mlp(remote) == Mlp(None, remote.fc1, remote.fc2)
    gated = Gated()
    assert mlp(gated) == Mlp(gated.a, gated.b, gated.d)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: Gated(nn.GELU()), "act is GELU.*not the SiLU"),
        (lambda: Residual(), "neither linear"),
        (lambda: Twice(), "neither linear"),
        (lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU("tanh"), nn.Linear(6, 4)), "not the exact GELU"),
        (lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU()), "neither linear"),
        (lambda: nn.Sequential(nn.GELU(), nn.Linear(8, 6), nn.Linear(6, 4)), "0 is a"),
    ],
)
def test_no_mlps(make, reason):
    assert re.search(reason, mlp(make()))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: wrap(m), "the MLP has hooks"),
        (lambda m: wrap(m.act), "act has hooks"),
        (lambda m: wrap(m.b), "b has hooks"),
        (lambda m: m.a.double(), "several dtypes"),
        (lambda m: setattr(m, "d", nn.Linear(6, 4)), "have biases"),
        (lambda m: setattr(m, "b", nn.Linear(7, 6, bias=False)), "widths do not fit"),
        (lambda m: setattr(m.d, "forward", lambda x: x), "d.forward was replaced"),
    ],
)
def test_mlps_that_must_be_called(change, reason):
    gated = Gated()
    change(gated)
    assert reason in mlp(gated)


def test_a_bias_that_is_broadcast():
    pair = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))
    assert mlp(pair) == Mlp(None, pair[0], pair[2])
    pair[0].bias = nn.Parameter(torch.ones(1))
    assert "a bias does not have" in mlp(pair)
