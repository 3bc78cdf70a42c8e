"""What Triton's interpreter gets wrong about bfloat16 and e4m3, put right.

It keeps bfloat16 as 16-bit integers, on which sums and products are nonsense, and truncates where a GPU rounds; a NaN
in e4m3 becomes 480. Here they go through float32, and torch rounds and converts.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
_binary, _fp_to_fp = InterpreterBuilder.binary_op, InterpreterBuilder.create_fp_to_fp


def _wide(handle):
    """A handle whose numbers numpy can calculate with."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(data):
    numbers = torch.from_numpy(np.array(data, dtype=np.float32))
    return TensorHandle(numbers.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)


def _is_bf16(*handles):
    return any(handle.dtype.scalar == tl.bfloat16 for handle in handles)


def cast_impl(self, src, dst_type):
    if dst_type.scalar == tl.bfloat16:
        return src if _is_bf16(src) else _narrow(src.data)
    return _cast(self, _wide(src), dst_type)


def binary_op(self, lhs, rhs, op):
    if not _is_bf16(lhs, rhs):
        return _binary(self, lhs, rhs, op)
    result = op(_wide(lhs).data, _wide(rhs).data)
    return TensorHandle(result, tl.int1) if result.dtype == bool else _narrow(result)


def create_dot(self, a, b, d, *options):
    return _dot(self, _wide(a), _wide(b), d, *options)


def create_fp_to_fp(self, src, dst_type, rounding_mode):
    if src.dtype.scalar != tl.float8e4nv:
        return _fp_to_fp(self, src, dst_type, rounding_mode)
    numbers = torch.from_numpy(np.array(src.data)).view(torch.float8_e4m3fn).float().numpy()
    return self.cast_impl(TensorHandle(numbers, tl.float32), dst_type)


def corrected(monkeypatch):
    """The corrections, for as long as the fixture lives."""
    for function in (cast_impl, binary_op, create_dot, create_fp_to_fp):
        assert hasattr(InterpreterBuilder, function.__name__)
        monkeypatch.setattr(InterpreterBuilder, function.__name__, function)
