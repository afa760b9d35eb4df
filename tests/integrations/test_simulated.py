"""A whole patched model on the GPU path: device code chosen as on a GPU, run by the simulator on CPU tensors."""

import pytest
import torch
import transformers

import ivl_kernels
from ivl_kernels.nn import FlashVision
from tests.models import chat_inputs, chat_model, inputs, native_model, randomize
from tests.simulator.gpu import simulated_gpu

pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags")


def native_flash():
    model = native_model("qwen3")
    randomize(flash := FlashVision(32, 48, 0.3, 0.1), seed=3)
    flash.attach(model)
    model.generation_config.eos_token_id = None
    return model


def chat(kind, tiles=((2, 1), ()), **options):
    model = chat_model(kind, **options)
    return model, chat_inputs(model, tiles)


# Model and inputs; features beside the default; what must have run; whether upstream gives the same tokens.
MODELS = {
    "native": (
        lambda: (native_model(), inputs([[1]])),
        {},
        {"place_rows", "v2pe_rope_kernel", "norm_kernel", "mlp_active_kernel", "pixel_shuffle_mlp_linear_kernel"},
        True,
    ),
    "native without norm": (
        lambda: (native_model("qwen2"), inputs([[1]])), {}, {"place_rows", "v2pe_rope_kernel"}, True,
    ),
    "native, Qwen3-MoE": (lambda: (native_model("qwen3_moe"), inputs([[1]])), {}, {"moe_experts_gate_up_kernel"}, True),
    "native, GPT-OSS": (lambda: (native_model("gpt_oss"), inputs([[1]])), {}, {"moe_experts_gate_up_kernel"}, True),
    "native, V2PE": (lambda: (native_model("qwen3"), inputs([[1]])), {"v2pe": 1 / 16}, {"v2pe_rope_kernel"}, False),
    "native Flash": (
        lambda: (native_flash(), inputs([[2]])), {}, {"tile_router_scores_kernel", "pack_write", "embed_text"}, False,
    ),
    "remote code, repository": (lambda: chat("repo"), {}, {"place_rows", "pixel_shuffle_mlp_linear_kernel"}, True),
    "remote code, checkpoint": (
        lambda: chat("hub"), {}, {"place_rows", "v2pe_rope_kernel", "pixel_shuffle_mlp_linear_kernel"}, True,
    ),
    "remote code, V2PE": (lambda: chat("hub"), {"v2pe": "1/4"}, {"v2pe_rope_kernel"}, False),
    "remote code, Qwen3-MoE": (lambda: chat("hub", family="qwen3_moe"), {}, {"moe_experts_gate_up_kernel"}, True),
    "remote code, Flash": (
        lambda: chat("hub", ((2,),), flash=(0.3, 0.1)),
        {},
        {"tile_router_scores_kernel", "pack_write", "v2pe_rope_kernel"},
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens(name):
    """Those of the reference backend and, where the features do not change results, of the model as it was."""
    if "Qwen3-MoE" in name and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("lists of experts are served on the CPU only")
    build, features, kernels, same = MODELS[name]
    model, batch = build()

    def generate():
        return model.generate(**batch, max_new_tokens=2, do_sample=False)

    plain = generate() if same else None
    with ivl_kernels.patched(model, backend="reference", **features):
        expected = generate()
    assert plain is None or torch.equal(plain, expected)
    with simulated_gpu(preferred=True) as log, ivl_kernels.patched(model, **features) as handle:
        got = generate()
        served = {row.feature: row.detail for row in handle.report().patched if row.detail}
    assert torch.equal(got, expected)
    assert all(report.shared_races == 0 for report in log)
    assert kernels <= {report.kernel for report in log}
    for feature, detail in served.items():
        upstreams = feature in ("v2pe", "attention", "cache", "linear")
        assert upstreams or detail.startswith(("triton", "cuda", "flash")), (feature, detail)
