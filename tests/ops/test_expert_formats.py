"""MXFP4 and block FP8 in plain torch: every byte, against transformers' expansion and by brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivl_kernels.ops.moe_experts import formats

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def bits(tensor):
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_and_scale_is_that_of_transformers(dtype):
    """Every pair of values under every scale byte, 0 and 255 among them, bit for bit."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype).mT
    got = formats.dequantise(blocks, scales, dtype)
    assert got.shape == (1, 256, 512) and torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(bits(got.nan_to_num(3.0)), bits(expected.nan_to_num(3.0)))


def test_scales_and_order_of_values():
    """The first value is in the low half; scale bytes are exponents with bias 127, 0 and 255 included."""
    values = torch.full((1, 16), 0x72, dtype=torch.uint8)
    row = formats.dequantise(values.expand(4, 1, 16), torch.tensor([[127], [0], [254], [255]], dtype=torch.uint8))
    assert row[0].tolist() == [1.0, 6.0] * 16
    assert row[1].tolist() == [2.0**-127, 6 * 2.0**-127] * 16
    assert row[2].tolist() == [2.0**127, float("inf")] * 16 and row[3].tolist() == [float("inf")] * 32
    wide = formats.dequantise(values.unsqueeze(0), torch.tensor([[254]], dtype=torch.uint8), torch.float64)
    assert wide[0].tolist() == [2.0**127, 6 * 2.0**127] * 16


@given(seed=st.integers(0, 99), rows=st.integers(0, 5), blocks=st.integers(1, 4), spread=st.sampled_from([0, 3, 40]))
def test_mxfp4_is_the_nearest(seed, rows, blocks, spread):
    """Of all scales and all values, none is nearer to a block in the sum of squares."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, blocks * 32, generator=g)
    shifts = torch.randint(-spread, spread + 1, (rows, blocks), generator=g)
    weight = torch.ldexp(weight, shifts.repeat_interleave(32, 1))
    values, scales = formats.quantise(weight, "mxfp4")
    assert values.shape == (rows, blocks, 16) and scales.shape == (rows, blocks)
    error = (formats.dequantise(values, scales, torch.float64) - weight.double()).unflatten(-1, (-1, 32))
    error = error.square().sum(-1)
    for byte in range(127 - 50, 127 + 50):
        grid = E2M1.double() * 2.0 ** (byte - 127)
        other = (weight.double().unsqueeze(-1) - grid).abs().amin(-1).unflatten(-1, (-1, 32)).square().sum(-1)
        assert bool((error <= other * (1 + 1e-12)).all())


@pytest.mark.parametrize("to", formats.FORMATS)
def test_what_was_quantised_comes_back(to):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 150, 160, generator=g) * torch.logspace(-20, 20, 150).unsqueeze(1)
    weight[0, 0, :32] = 0
    weight[0, 1, 3, 32:64] = 1e-45
    once = formats.dequantise(*formats.quantise(weight, to))
    again = formats.dequantise(*formats.quantise(once, to))
    assert torch.equal(once, again) or to == "fp8" and bool(((once - again).abs() <= 1e-6 * once.abs()).all())
    assert bool((once[0, 0, :32] == 0).all())


def test_ties_go_to_the_even_value():
    row = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -2.5, -5.0] + [0.0] * 21])
    values, scales = formats.quantise(row, "mxfp4")
    assert scales.tolist() == [[127]]
    assert formats.dequantise(values, scales)[0, :11].tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -0.0, -2, -4]


@given(seed=st.integers(0, 99), rows=st.integers(1, 300), blocks=st.integers(1, 9))
def test_fp8_blocks(seed, rows, blocks):
    """Within half a step of E4M3, relative to the block's largest; a block's scale belongs to it alone."""
    weight = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    values, scales = formats.quantise(weight, "fp8")
    assert values.dtype == torch.float8_e4m3fn and values.shape == weight.shape
    assert scales.shape == (-(-rows // 128), -(-32 * blocks // 128)) and scales.dtype == torch.float32
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            assert scales[i, j] == weight[at].abs().amax() / 448
            expected = values[at].float() * scales[i, j]
            assert torch.equal(formats.dequantise(values, scales)[at], expected)
            limit = (weight[at].abs() / 16).clamp(min=float(scales[i, j]) * 2**-10) * 1.001
            assert bool(((expected - weight[at]).abs() <= limit).all())


@pytest.mark.parametrize(
    "weight, to, message",
    [
        (torch.zeros(4, 33), "mxfp4", "multiple of 32"),
        (torch.zeros(32), "fp8", "multiple of 32"),
        (torch.full((1, 32), float("nan")), "mxfp4", "not finite"),
        (torch.full((1, 32), float("inf")), "fp8", "not finite"),
        (torch.full((1, 32), 3e38), "mxfp4", "less than 2\\^125"),
        (torch.zeros(1, 32), "int4", "to: got 'int4'"),
    ],
)
def test_what_cannot_be_quantised(weight, to, message):
    with pytest.raises(ValueError, match=message):
        formats.quantise(weight, to)
