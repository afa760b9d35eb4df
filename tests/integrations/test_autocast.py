"""Under torch.autocast the ops compute in its dtype, as the linear layers they replace do."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ivl_kernels import patched
from ivl_kernels.ops import pixel_shuffle_mlp, v2pe_rope
from ivl_kernels.testing import assert_accurate
from tests.models import chat_inputs, chat_model, inputs, native_model
from tests.ops.test_moe_experts import make as make_experts
from tests.ops.test_pixel_shuffle_mlp import flat
from tests.ops.test_pixel_shuffle_mlp import make as make_projector
from tests.simulator.gpu import backends, simulated_gpu

BF16 = torch.bfloat16


def autocast():
    return torch.autocast("cpu", BF16)


def features(model, batch):
    if hasattr(model, "extract_feature"):
        return model.extract_feature(batch["pixel_values"])
    out = model.model.get_image_features(batch["pixel_values"])
    return getattr(out, "pooler_output", out)


def build(name):
    if name in ("repo", "hub"):
        model = chat_model(name)
        return model, chat_inputs(model, ((2, 1), ()), flags=True)
    return native_model(name), inputs(((2, 1), ()))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt_oss", "repo", "hub"])
def test_patched_model(name):
    model, batch = build(name)
    with torch.no_grad():
        truth = features(model, batch).double()
        with autocast():
            plain, logits = features(model, batch), model(**batch).logits
            with patched(model) as handle:
                got, ours = features(model, batch), model(**batch).logits
                assert "projector" in {row.feature for row in handle.report().patched}
    assert_accurate(got, truth, plain)
    assert ours.dtype == logits.dtype and ours.isfinite().all()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_training_step(name):
    """Gradients have the dtypes of the parameters, also when the backward runs inside autocast."""
    model, batch = build(name)
    model.train()
    with patched(model), autocast():
        model(**batch, labels=batch["input_ids"]).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), key


def compare(run, leaves, cast, rounded=lambda gradient: gradient):
    """`run` under autocast against `run` on operands that were cast by hand, and the gradients inside autocast.

    rounded: a cast by hand rounds the gradients of what it cast.
    """
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    expected = run([t.to(BF16) if cast else t for t in leaves])
    grads = torch.autograd.grad(expected.float().square().sum(), leaves)
    with autocast():
        got = run(leaves)
        grads_inside = torch.autograd.grad(got.float().square().sum(), leaves)
    assert got.dtype == expected.dtype == (BF16 if cast else torch.float32)
    assert torch.equal(got, expected)
    for a, b in zip(grads_inside, grads):
        assert a.dtype == torch.float32 and torch.equal(rounded(a), b)


BACKENDS = backends("cpu", "triton", "reference")


@BACKENDS
@pytest.mark.parametrize("into", [False, True])
def test_projector(backend, into):
    args = make_projector(2, (4, 4), 8, (16, 16), skip=0)

    def run(tensors):
        out = {}
        if into:  # a float32 buffer keeps everything in float32
            out = dict(out=torch.zeros(12, 16), out_rows=torch.tensor([8, 1]))
        return pixel_shuffle_mlp(*tensors[:3], tensors[3:5], tensors[5:], **out, backend=backend)

    compare(run, flat(args), cast=not into)


@BACKENDS
@pytest.mark.parametrize("tokens", [2, 40])
def test_experts(backend, tokens):
    """With few tokens, a cast would read the experts that nobody asked for."""
    case = make_experts(tokens, 24, 16, 5, 2, gpt_oss=True)

    def run(tensors):
        case.hidden, case.weights, case.gate_up, case.down, case.gate_up_bias, case.down_bias = tensors
        case.weights = case.weights.to(BF16)  # its dtype is free
        return case.run(backend)

    compare(
        run, case.tensors, cast=tokens == 40, rounded=(lambda g: g.to(BF16).float()) if tokens == 40 else lambda g: g
    )


class Copies(TorchDispatchMode):
    """How many tensors are made by casts, clones and the like, by their number of elements."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.clone, torch.ops.aten.copy_):
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("gpt_oss", [False, True])
def test_no_stack_of_experts_is_cast_on_a_gpu(gpt_oss):
    """Nor kept for the backward: what it keeps of the matrices are the parameters themselves."""
    case = make_experts(40, 24, 16, 5, 2, gpt_oss=gpt_oss).leaves()
    stacks = {case.gate_up.numel(), case.down.numel()}
    kept = []
    with simulated_gpu(preferred=True), Copies() as copies, autocast():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            out = case.run()
        out.float().square().sum().backward()
    assert out.dtype == BF16 and case.gate_up.grad.dtype == torch.float32 and case.gate_up.grad.any()
    assert copies.sizes and not stacks & set(copies.sizes)
    saved = [t for t in kept if t.numel() in stacks]
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (case.gate_up, case.down))


@BACKENDS
def test_rotary_keeps_its_dtype(backend):
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    frequencies = torch.rand(4)
    compare(lambda t: torch.cat(v2pe_rope(*t, torch.arange(5.0), frequencies, backend=backend), 1), [q, k], cast=False)
