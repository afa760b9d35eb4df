"""A whole patched model on the GPU path: device code chosen as on a GPU, run by the simulator on CPU tensors."""

import pytest
import torch
from gpu import simulated_gpu
from models import inputs, native_model, randomize

import ivl_kernels
from ivl_kernels.nn import FlashVision

GREEDY = dict(max_new_tokens=2, do_sample=False)
pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags")


def kernels(log):
    return {report.kernel for report in log}


@torch.no_grad()
def generate(model, batch):
    return model.generate(**batch, **GREEDY)


def check(model, batch, expect=None):
    """The reference's tokens from the simulated GPU; returns the names of the kernels that ran."""
    if expect is None:
        with ivl_kernels.patched(model, backend="reference"):
            expect = generate(model, batch)
    with simulated_gpu(preferred=True) as log, ivl_kernels.patched(model):
        got = generate(model, batch)
    assert torch.equal(got, expect)
    assert all(report.shared_races == 0 for report in log)
    return kernels(log)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_native(family):
    model = native_model(family)
    batch = inputs([[1]])
    ran = check(model, batch, generate(model, batch))
    assert any("place_rows" in name for name in ran)
    if family == "qwen3_moe":
        assert any("moe" in name for name in ran)


def test_native_flash():
    model = native_model("qwen3")
    randomize(flash := FlashVision(32, 48, 0.3, 0.1), seed=3)
    flash.attach(model)
    model.generation_config.eos_token_id = None
    ran = check(model, inputs([[2]]))
    assert "pool_kernel" in ran and any("pack" in name for name in ran)
