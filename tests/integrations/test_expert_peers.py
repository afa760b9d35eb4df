"""Experts implementations that a user chose and that keep the calls they are expected to be faster at."""

import contextlib
import inspect

import pytest
import torch
import transformers

from ivl_kernels import _gpu
from ivl_kernels.integrations import _expert_peers, experts, patch, patched
from tests.models import randomize, text_config

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="experts implementations are of transformers 5"
)
ELSE = ("projector", "packing", "flash", "rope", "linear", "attention", "norms", "mlp", "cache")
MOE = {name: False for name in ELSE} | {"moe": True}
LONG = _expert_peers.ROWS * 8 // 2  # tokens of 64 rows an expert, of the tiny models' 8 experts and 2 choices


def language_model(family, dtype=torch.bfloat16):
    kind = transformers.Qwen3MoeForCausalLM if family == "qwen3_moe" else transformers.GptOssForCausalLM
    return randomize(kind(text_config(family))).to(dtype).eval()


def tokens(length):
    return torch.randint(1, 290, (1, length), generator=torch.Generator().manual_seed(0))


def details(handle):
    return [row.detail for row in handle.report().rows if row.feature == "moe" and row.what == "experts"]


@pytest.fixture
def ours(monkeypatch):
    """Slots of the calls that the op served."""
    calls, op = [], experts.moe_experts
    for family in ("qwen3_moe", "gpt_oss"):
        patch(language_model(family), **MOE)  # classes are judged once, by the op too
    monkeypatch.setattr(
        experts, "moe_experts", lambda *args, **kwargs: (calls.append(args[1].numel()), op(*args, **kwargs))[1]
    )
    return calls


@pytest.fixture
def peer(monkeypatch):
    """(model, name) -> slots of the calls to a stand-in for this implementation, which the model's config now names."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls = []

    def forward(self, *args):
        calls.append(args[1].numel())
        return inspect.unwrap(type(self).forward)(self, *args)

    def choose(model, name):
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, name, forward)
        model.config._experts_implementation = name
        return calls

    monkeypatch.setattr(_expert_peers, "missing", lambda name: "")
    with _gpu.stand_in("compiler", preferred=True, capability=90):
        yield choose


@pytest.mark.parametrize("name", _expert_peers.PEERS)
def test_a_faster_choice_keeps_its_calls(name, ours, peer):
    """On the chips, in the dtype and from the number of tokens on where it is expected to be faster."""
    model = language_model("qwen3_moe")
    theirs = peer(model, name)
    layers = len(model.model.layers)
    short, long = tokens(LONG), tokens(LONG + 1)
    with torch.no_grad():
        plain = model(long).logits
        theirs.clear()
        handle = patch(model, backend="cpu", **MOE)
        gradients = "" if name == "sonicmoe" else " without gradients"
        assert all(f"calls{gradients} are left to experts '{name}'" in detail for detail in details(handle))
        model(short)
        assert ours == [2 * LONG] * layers and not theirs
        assert torch.equal(model(long).logits, plain)
        assert len(ours) == layers and theirs == [2 * (LONG + 1)] * layers
        with torch.autocast("cpu", torch.bfloat16):
            model(long)
        assert len(ours) == 2 * layers
    ours.clear()
    theirs.clear()
    model(long).logits.sum().backward()
    assert (len(ours), len(theirs)) == ((0, layers) if name == "sonicmoe" else (layers, 0))
    handle.undo()
    with torch.no_grad():
        assert torch.equal(model(long).logits, plain)
    assert model.config._experts_implementation == name and "_ivl" not in vars(model.model.layers[0].mlp.experts)


@pytest.mark.parametrize(
    "change, reason",
    [
        ("rule", ""),
        ("chip", "it is faster on Hopper and Blackwell, not on compute capability 8.0"),
        ("device", "it serves NVIDIA GPUs, not cpu"),
        ("dtype", "it is faster in bfloat16, not in float32"),
        ("package", "sonic-moe requires the `kernels` package"),
        ("activation", "it computes another activation than GPT-OSS's"),
        ("grouped_mm", ""),
    ],
)
def test_a_choice_that_is_no_faster_is_replaced(change, reason, ours, peer, monkeypatch):
    model = language_model("gpt_oss" if change == "activation" else "qwen3_moe")
    theirs = peer(model, "grouped_mm" if change == "grouped_mm" else "sonicmoe")
    chosen = model.config._experts_implementation
    if change == "dtype":
        model.float()
    if change == "package":
        monkeypatch.setattr(_expert_peers, "missing", lambda name: reason)
    options = MOE | {"moe": "ours"} if change == "rule" else MOE
    with contextlib.ExitStack() as stack:
        if change in ("chip", "device"):
            stack.enter_context(_gpu.stand_in("compiler", preferred=change == "chip"))
        handle = patch(model, backend="cpu", **options)
        with torch.no_grad():
            model(tokens(LONG + 1))
        said = details(handle)
    assert len(ours) == len(model.model.layers) and not theirs
    assert all(f"in place of experts '{chosen}'{': ' if reason else ''}{reason}" in detail for detail in said)


def test_what_a_choice_lacks_is_said():
    if not torch.cuda.is_available():
        assert _expert_peers.missing("sonicmoe") and _expert_peers.missing("deepgemm")
    with pytest.raises(TypeError, match="moe='theirs', expected True, False, None or 'ours'"):
        patch(language_model("qwen3_moe"), moe="theirs")


def test_the_rule_compiles(peer):
    model = language_model("qwen3_moe")
    theirs = peer(model, "sonicmoe")
    layer = model.model.layers[0].mlp.experts
    with torch.no_grad(), patched(model, backend="cpu", **MOE):
        compiled = torch.compile(layer, backend="aot_eager")
        for length in (LONG, LONG + 1):
            hidden, ids = torch.randn(length, 48).bfloat16(), torch.randint(0, 8, (length, 2))
            given = hidden, ids, torch.rand(length, 2).bfloat16()
            torch.testing.assert_close(compiled(*given), layer(*given))
    assert theirs == [2 * (LONG + 1)] * 2
