"""Experts in few bits in whole models: MXFP4 checkpoints loaded as they are stored, models converted in place."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ivl_kernels
from ivl_kernels import load_quantised, quantise_experts
from ivl_kernels.nn import QuantisedExperts
from ivl_kernels.ops.moe_experts import formats
from ivl_kernels.testing import tiny

SIZES = dict(hidden_size=64, intermediate_size=96, num_local_experts=6, num_experts_per_tok=2)


def gpt_oss(dtype=torch.float32):
    model = transformers.GptOssForCausalLM(tiny.text_config("gpt_oss", **SIZES))
    return tiny.randomize(model).to(dtype).eval()


def stacked(model):
    return [m for m in model.modules() if type(m).__name__ == "GptOssExperts"]


def as_released(model, folder, prefix=""):
    """A checkpoint as GPT-OSS is released: blocks and scales in place of the experts' matrices. Returns its tensors.

    The model gets the weights that the blocks stand for.
    """
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in list(state):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weight = state.pop(name)
            blocks, scales = formats.quantise(weight.mT, "mxfp4")
            state[f"{name}_blocks"], state[f"{name}_scales"] = blocks, scales
            model.get_parameter(name).data.copy_(formats.dequantise(blocks, scales).mT)
    state = {name: value.contiguous() for name, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return state


def tokens(model, **inputs):
    return model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)


IDS = dict(input_ids=torch.arange(3, 20).view(1, -1), attention_mask=torch.ones(1, 17, dtype=torch.long))


def test_gpt_oss_checkpoint_round_trip(tmp_path):
    """Loaded, generating, saved and loaded again: the tokens of the expanded model, and the bytes of the checkpoint."""
    model = gpt_oss()
    state = as_released(model, tmp_path / "released")
    expected = tokens(model, **IDS)
    loaded = load_quantised(tmp_path / "released", dtype=torch.float32)
    assert not stacked(loaded) and sum(isinstance(m, QuantisedExperts) for m in loaded.modules()) == 2
    assert torch.equal(tokens(loaded, **IDS), expected)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**IDS).logits, model(**IDS).logits, rtol=1e-4, atol=1e-4)
    assert loaded.state_dict().keys() == state.keys()
    loaded.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == state.keys()
    for name, value in state.items():
        assert saved[name].dtype == value.dtype and torch.equal(saved[name], value), name
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    again = load_quantised(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(tokens(again, **IDS), expected)


def test_transformers_expands_the_same(tmp_path):
    """What upstream's own loader makes of the checkpoint computes the same, on four times the memory."""
    as_released(gpt_oss(), tmp_path)
    plain = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=transformers.Mxfp4Config(dequantize=True)
    ).float()  # 4.57 expands to bfloat16, which is exact, whatever was asked for
    assert torch.equal(tokens(load_quantised(tmp_path, dtype=torch.float32), **IDS), tokens(plain, **IDS))


def test_internvl_with_gpt_oss(tmp_path):
    model = tiny.native_model("gpt_oss", text=tiny.text_config("gpt_oss", **SIZES))
    model.save_pretrained(tmp_path)  # with the names that checkpoints have
    state = load_file(tmp_path / "model.safetensors")
    for name in [n for n in state if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = formats.quantise(state.pop(name).mT, "mxfp4")
        state |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for experts in stacked(model):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name)
            weight.data.copy_(formats.dequantise(*formats.quantise(weight.mT, "mxfp4")).mT)
    loaded = load_quantised(tmp_path, dtype=torch.float32)
    inputs = tiny.inputs()
    assert torch.equal(tokens(loaded, **inputs), tokens(model, **inputs))
    with ivl_kernels.patched(loaded) as handle:
        assert "mxfp4" in str(handle.report())
        assert torch.equal(tokens(loaded, **inputs), tokens(model, **inputs))


BROKEN = {
    "blocks missing": (lambda s: s.pop("L.gate_up_proj_blocks"), "gate_up_proj_blocks: got no such tensor"),
    "scales missing": (lambda s: s.pop("L.down_proj_scales"), "down_proj_scales: got no such tensor"),
    "too few blocks": (
        lambda s: s.update({"L.down_proj_blocks": s["L.down_proj_blocks"][:, :, :-1].contiguous()}),
        r"down_proj_blocks in model.safetensors: got U8 \[6, 64, 2, 16\], expected U8 \[6, 64, 3, 16\]",
    ),
    "another dtype": (
        lambda s: s.update({"L.gate_up_proj_blocks": s["L.gate_up_proj_blocks"].to(torch.int8)}),
        "gate_up_proj_blocks in model.safetensors: got I8",
    ),
    "shape of scales": (
        lambda s: s.update({"L.gate_up_proj_scales": s["L.gate_up_proj_scales"].flatten(1)}),
        r"gate_up_proj_scales in model.safetensors: got U8 \[6, 384\], expected U8 \[6, 192, 2\]",
    ),
    "experts missing": (
        lambda s: s.update({"L.down_proj_blocks": s["L.down_proj_blocks"][1:].contiguous()}),
        r"got U8 \[5, 64, 3, 16\], expected U8 \[6, 64, 3, 16\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused(case, tmp_path, monkeypatch):
    change, message = BROKEN[case]
    state = as_released(gpt_oss(), tmp_path)
    layer = "model.layers.1.mlp.experts"
    short = {name.replace(layer, "L"): value for name, value in state.items()}
    change(short)
    save_file({n.replace("L.", f"{layer}."): v for n, v in short.items()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(transformers.GptOssForCausalLM, "from_pretrained", None)  # nothing is loaded
    with pytest.raises(ValueError, match=message):
        load_quantised(tmp_path)


def test_scales_that_are_nan_are_refused(tmp_path):
    state = as_released(gpt_oss(), tmp_path)
    state["model.layers.0.mlp.experts.down_proj_scales"][2, 3, 1] = 255
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layers.0.mlp.experts.down_proj: got 1 scales that are NaN"):
        load_quantised(tmp_path)


def test_what_is_no_quantised_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder"):
        load_quantised(tmp_path / "none")
    gpt_oss().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization_config: got quant_method 'None'"):
        load_quantised(tmp_path)


def qwen3_moe(dtype=torch.float32):
    config = tiny.text_config("qwen3_moe", hidden_size=64, moe_intermediate_size=160)
    return tiny.randomize(transformers.Qwen3MoeForCausalLM(config)).to(dtype).eval()


@pytest.mark.parametrize("make, to", [(gpt_oss, "mxfp4"), (qwen3_moe, "mxfp4"), (qwen3_moe, "fp8")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_in_place(make, to, dtype, tmp_path):
    """The converted model is the expanded one; the report has each layer's error; saved and loaded it is itself."""
    model, expanded = make(dtype), make(dtype)
    name = "GptOssExperts" if make is gpt_oss else "Qwen3MoeExperts"
    found = {path: m for path, m in expanded.named_modules() if type(m).__name__ == name}
    if not found:
        pytest.skip("this version of transformers has lists of experts")
    wanted = {}
    for path, experts in found.items():
        for matrix in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, matrix)
            rows = weight.mT if make is gpt_oss else weight
            back = formats.dequantise(*formats.quantise(rows, to))
            exact = rows.detach().double()
            wanted[path, matrix] = float((back - exact).norm() / exact.norm())
            weight.data.copy_(back.mT if make is gpt_oss else back)
    report = quantise_experts(model, to)
    assert [c.path for c in report.converted] == list(found) and not report.left
    for converted in report.converted:
        for matrix, error in converted.errors.items():
            assert error == pytest.approx(wanted[converted.path, matrix], rel=1e-5)
        bits = 8.5 if to == "mxfp4" else 16
        assert converted.bytes_after <= converted.bytes_before * bits / 8 / dtype.itemsize / 2 * 1.01
    assert f"experts in {to}: 2 layers converted" in str(report)
    with torch.no_grad():
        close = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.05, atol=0.1)
        torch.testing.assert_close(model(**IDS).logits, expanded(**IDS).logits, **close)
    if dtype == torch.float32:
        assert torch.equal(tokens(model, **IDS), tokens(expanded, **IDS))
    model.save_pretrained(tmp_path)
    again = load_quantised(tmp_path)
    ours = model.state_dict()
    assert again.dtype == dtype and again.state_dict().keys() == ours.keys()
    kept = again._keep_in_fp32_modules or ()  # transformers 5.0 minds it for bfloat16 as well
    for name, value in again.state_dict().items():
        wide = value.dtype == torch.float32 and any(part in name for part in kept)
        assert (value.dtype == ours[name].dtype or wide) and torch.equal(value.float(), ours[name].float()), name


def test_conversion_leaves_what_it_cannot_take():
    model = transformers.GptOssForCausalLM(tiny.text_config("gpt_oss", hidden_size=48))
    report = quantise_experts(model)
    assert not report.converted and all("no multiple of 32" in why for _, why in report.left)
    report = quantise_experts(gpt_oss(), "fp8")
    assert not report.converted and all("one scale" in why for _, why in report.left)
    patched = gpt_oss()
    with ivl_kernels.patched(patched):
        report = quantise_experts(patched)
        assert not report.converted and len(report.left) == 2
    with pytest.raises(ValueError, match="to: got 'int4'"):
        quantise_experts(model, "int4")


def test_casts_keep_what_is_stored():
    experts = QuantisedExperts(2, 64, 32, quantisation="fp8", bias=True)
    experts.to(torch.bfloat16)
    kinds = {name: p.dtype for name, p in experts.named_parameters()}
    assert kinds["gate_up_proj_values"] == torch.float8_e4m3fn and kinds["down_proj_scale_inv"] == torch.float32
    assert kinds["down_proj_bias"] == torch.bfloat16
    assert experts.to("meta").down_proj_values.dtype == torch.float8_e4m3fn


def test_what_surrounds_the_experts_trains():
    """Gradients reach everything but the stored weights, and are those of the expanded model."""
    model, expanded = gpt_oss(), gpt_oss()
    for experts in stacked(expanded):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name)
            weight.data.copy_(formats.dequantise(*formats.quantise(weight.mT, "mxfp4")).mT)
    quantise_experts(model)
    for m in (model, expanded):
        m(**IDS, labels=IDS["input_ids"]).loss.backward()
    others = dict(expanded.named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith(("_blocks", "_scales")):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-3, atol=1e-5)
