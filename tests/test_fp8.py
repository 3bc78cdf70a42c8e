"""FP8 caches: what rounding to e4m3 may cost, by the format, and what becomes of zeros and of numbers that are none."""

import pytest
import torch

from multimatrix.ops.fp8 import LARGEST, dequantize, quantize

SHAPES = [(2, 3, 7, 32), (3, 7, 32), (7, 7)]
# Of a normal number the last bit of three is rounded: 2^-4 of it. Below 2^-6 the steps are 2^-9.
RELATIVE, STEP, SLACK = 2.0**-4, 2.0**-9, 1e-6


def scale_of_each(scale, data):
    """The scale of every element."""
    return (scale if scale.shape == (1,) else scale.unsqueeze(-1)).expand(data.shape)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape, per, dtype, size):
    if dtype == torch.float16 and size == 1e-20:
        pytest.skip("float16 has no such numbers")
    # From 1 down to 2^-20 of the largest: normal and subnormal numbers.
    x = (torch.randn(shape).sign() * torch.exp2(-20 * torch.rand(shape)) * size).to(dtype)
    data, scale = quantize(x, per)
    assert (data.dtype, data.shape) == (torch.float8_e4m3fn, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (1,) if per == "tensor" else shape[:-1])
    largest = x.double().abs().amax(-1) if per == "token" else x.double().abs().amax().view(1)
    torch.testing.assert_close(scale.double() * LARGEST, largest, rtol=1e-6, atol=0)
    error = (dequantize(data, scale).double() - x.double()).abs()
    bound = torch.maximum(RELATIVE * x.double().abs(), STEP / 2 * scale_of_each(scale, data).double())
    assert (error <= bound * (1 + SLACK)).all()
    assert (error > bound / 2).any()  # the bound is not idle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantizes_into(dtype):
    data, scale = quantize(torch.randn(2, 5, 16))
    assert dequantize(data, scale, dtype).dtype == dtype
    assert torch.equal(dequantize(data, scale, dtype), dequantize(data, scale).to(dtype))


def test_numbers_of_the_format_stay_as_they_are():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    data, scale = quantize(numbers[None])
    assert scale.item() == 1.0
    assert torch.equal(dequantize(data, scale)[0], numbers)


def test_zeros_have_the_scale_one():
    x = torch.randn(2, 4, 16)
    x[0, 1] = 0.0
    data, scale = quantize(x)
    assert scale[0, 1] == 1.0
    assert not dequantize(data, scale)[0, 1].any()
    data, scale = quantize(torch.zeros(2, 4, 16), "tensor")
    assert scale.item() == 1.0
    assert not dequantize(data, scale).any()


def test_a_token_does_not_depend_on_the_others():
    x = torch.randn(2, 4, 16)
    data, scale = quantize(x)
    x[:, 1] *= 1e4
    x[:, 2] = float("nan")
    other_data, other_scale = quantize(x)
    for token in (0, 3):
        assert torch.equal(data[:, token].float(), other_data[:, token].float())
        assert torch.equal(scale[:, token], other_scale[:, token])


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_nan_stays_nan(per):
    x = torch.randn(2, 4, 16)
    x[1, 2, 3] = float("nan")
    back = dequantize(*quantize(x, per))
    assert torch.equal(back.isnan(), x.isnan())


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_infinity_is_not_hidden(per):
    x = torch.randn(2, 4, 16)
    x[1, 2, 3] = float("inf")
    assert dequantize(*quantize(x, per))[1, 2].isnan().all()
