"""The corrections to Triton's interpreter are right: small kernels in bfloat16 and e4m3 against torch."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl


@triton.jit
def _arithmetic(a, b, total, product, less, copy, half, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(total + at, x + y)
    tl.store(product + at, x * y)
    tl.store(less + at, x < y)
    tl.store(copy + at, x.to(tl.float32))
    tl.store(half + at, x.to(tl.float16))


@triton.jit
def _cast(source, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(source + at).to(out.dtype.element_ty))


@triton.jit
def _product(a, b, out, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    at = rows * N + columns
    tl.store(out + at, tl.dot(tl.load(a + at), tl.trans(tl.load(b + at))))


def test_bfloat16_arithmetic():
    a, b = torch.randn(2, 256).bfloat16()
    total, product = torch.empty_like(a), torch.empty_like(a)
    less, copy, half = torch.empty(256, dtype=torch.bool), torch.empty(256), torch.empty(256, dtype=torch.float16)
    _arithmetic[(1,)](a, b, total, product, less, copy, half, N=256)
    for actual, expected in ((total, a + b), (product, a * b), (less, a < b), (copy, a.float()), (half, a.half())):
        assert torch.equal(actual, expected)


def test_bfloat16_rounds_to_nearest_even():
    ties = 1 + torch.arange(256) / 256  # every second one lies between two bfloat16 numbers
    numbers = torch.cat((ties, -ties[:128], torch.randn(126), torch.tensor([float("inf"), 0.0])))
    out = torch.empty(numbers.shape, dtype=torch.bfloat16)
    _cast[(1,)](numbers, out, N=512)
    assert torch.equal(out, numbers.bfloat16())


def test_bfloat16_product():
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    _product[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_e4m3_number(dtype):
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    out = torch.empty(256, dtype=dtype)
    _cast[(1,)](data, out, N=256)
    torch.testing.assert_close(out, data.to(dtype), rtol=0, atol=0, equal_nan=True)
