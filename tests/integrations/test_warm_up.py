"""Compiling before serving: afterwards serving compiles nothing. On a GPU whose driver returns at once."""

import contextlib
import itertools
import random
from unittest import mock

import pytest
import torch
import transformers
from triton import knobs

import ivl_kernels
from ivl_kernels._triton import compilations
from ivl_kernels.flash.inputs import project_into, route
from ivl_kernels.flash.parts import vision_parts
from ivl_kernels.models.families import families_in, text_stacks
from ivl_kernels.models.layers import run_layers
from tests.models import chat_model, native_model, text_config
from tests.simulator.idle import Idle, idle_gpu

pytestmark = pytest.mark.filterwarnings("ignore::ivl_kernels._dispatch.FallbackWarning")
BF16 = torch.bfloat16
LENGTHS, BATCHES, TILES = (5, 16, 33, 130), (1, 3, 20), (1, 2)
_numbers = itertools.count(-2, -1)


@contextlib.contextmanager
def new_gpu():
    """One for which no test has compiled anything."""
    number = next(_numbers)
    with mock.patch.object(Idle, "get_current_device", lambda self: number), idle_gpu() as idle:
        yield idle


def need_stacked_experts(name):
    if name == "qwen3_moe" and transformers.__version__.startswith("4."):
        pytest.skip("4.57 keeps a list of experts, which no GPU kernel serves")


def build(name):
    return chat_model("hub", flash=(0.5, 0.5), dtype=BF16) if name == "flash" else native_model(name, dtype=BF16)


def serve(model):
    """The language model at these lengths and batches, and the vision side."""
    for _, text in text_stacks(model):
        for length in LENGTHS:
            text(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=True)
        for batch in BATCHES:
            out = text(input_ids=torch.zeros(batch, 5, dtype=torch.int64), use_cache=True)
            name = "cache" if "cache" in out else "past_key_values"
            text(input_ids=torch.zeros(batch, 1, dtype=torch.int64), use_cache=True, **{name: out[name]})
    for _, family in families_in(model):
        for count in TILES:
            pixels = torch.zeros(count, 3, 64, 64, dtype=BF16)
            getattr(family.core, family.features_name)(pixels)
            if family.flash_holder is not None:
                parts = vision_parts(family)
                vit = parts.tokens_of(pixels)
                route(vit, parts)
                rows = torch.zeros(count * parts.tokens, 48, dtype=BF16)
                for compressed in range(count + 1):
                    chosen = torch.arange(count) < compressed
                    project_into(rows, vit, chosen, parts, compressed=compressed)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "flash"])
def test_serving_compiles_nothing_new(name):
    need_stacked_experts(name)
    model = build(name)
    ivl_kernels.patch(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with new_gpu() as idle:
        done = ivl_kernels.warm_up(model, LENGTHS, batches=(*BATCHES, 5), tiles=TILES)
        again = ivl_kernels.warm_up(model, LENGTHS, batches=BATCHES, tiles=TILES)
        before = idle.launches
        with compilations() as found:
            serve(model)
        assert idle.launches > before + 20
    assert done.variants and not again.variants and not found
    expected = {"norm_kernel", "v2pe_rope_kernel", "pixel_shuffle_mlp_linear_kernel"}
    if name == "flash":
        expected |= {"tile_router_gate_kernel", "mlp_active_kernel"}
    else:
        expected |= {"moe_experts_gate_up_kernel", "moe_experts_few_down_kernel"}
    assert expected <= {variant.kernel for variant in done.variants}
    assert all(v.seconds > 0 and v.config["num_warps"] >= 1 for v in done.variants)
    assert str(done).splitlines()[0].startswith(f"{len(done.variants)} variants of ") and "BLOCK=" in str(done)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_fractional_positions():
    """With Flash, also of compressed tiles; on other models and without v2pe none."""
    counts = []
    for name, options in (("qwen3", {}), ("qwen3", {"v2pe": 0.25}), ("flash", {"v2pe": 0.25})):
        model = build(name)
        ivl_kernels.patch(model, **options)
        with new_gpu():
            done = ivl_kernels.warm_up(model, [5], batches=[], tiles=[])
        counts.append(sum(variant.kernel == "v2pe_position_ids_kernel" for variant in done.variants))
    assert counts == [0, 1, 2]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_default_sizes_stand_for_all(family):
    """Lengths up to 16,384 and batches up to 256, at 128 experts of which 8 serve a token."""
    need_stacked_experts(family)
    kind = transformers.Qwen3ForCausalLM if family == "qwen3" else transformers.Qwen3MoeForCausalLM
    experts = dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=16) if family == "qwen3_moe" else {}
    sizes = dict(hidden_size=32, head_dim=128, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    model = kind(text_config(family, **sizes, **experts)).bfloat16()
    ivl_kernels.patch(model)
    numbers = random.Random(0)
    lengths = [int(2 ** numbers.uniform(0, 14)) for _ in range(30)] + [1008, 4096, 16384]
    with new_gpu():
        ivl_kernels.warm_up(model)
        ((_, text),) = text_stacks(model)
        with compilations() as found:
            for length in lengths:
                run_layers(text, 1, length)
            for batch in range(1, 257, 5):
                run_layers(text, batch, 1)
    assert not found


def test_only_a_layer_of_each_kind_runs():
    sizes = dict(num_hidden_layers=6, layer_types=["full_attention"] * 6)
    model = native_model("gpt_oss", text=text_config("gpt_oss", **sizes))
    ((_, text),) = text_stacks(model)
    calls = [mock.patch.object(layer.mlp, "forward", wraps=layer.mlp.forward) for layer in text.layers]
    spies = [call.start() for call in calls]
    run_layers(text, 1, 7)
    for call in calls:
        call.stop()
    assert [spy.call_count for spy in spies] == [1, 0, 0, 0, 0, 0]


def test_on_a_cpu_there_is_nothing_to_compile():
    model = native_model("qwen3")
    ivl_kernels.patch(model)
    done = ivl_kernels.warm_up(model)
    assert not done.variants and str(done).startswith("nothing to compile: the model is on cpu")


def test_wrong_input():
    model = native_model("qwen3")
    with pytest.raises(ValueError, match="model: nothing in this InternVLForConditionalGeneration is patched"):
        ivl_kernels.warm_up(model)
    ivl_kernels.patch(model)
    for name in ("tokens", "batches", "tiles"):
        with pytest.raises(ValueError, match=f"{name}: got 0, expected numbers from 1 on"):
            ivl_kernels.warm_up(model, **{name: [4, 0]})
        with pytest.raises(TypeError, match=f"{name}: got 2.5, expected whole numbers"):
            ivl_kernels.warm_up(model, **{name: [4, 2.5]})
        assert ivl_kernels.warm_up(model, **{name: 4}).why


def test_who_listened_to_compilations_still_does():
    heard = []
    model = native_model("qwen3", dtype=BF16)
    ivl_kernels.patch(model)
    with new_gpu(), mock.patch.object(knobs.compilation, "listener", lambda **each: heard.append(each["src"].name)):
        listener = knobs.compilation.listener
        done = ivl_kernels.warm_up(model, [5], batches=[], tiles=[])
        assert knobs.compilation.listener is listener
    assert len(heard) == len(done.variants) > 0
