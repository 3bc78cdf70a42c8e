"""FP8 caches: e4m3 numbers with scales, x = scale * data.

Bytes: data is `torch.float8_e4m3fn` in the shape of the tensor, one byte an element; scales are float32 beside it, one
for every token of every key head, [..., S] for data [..., S, D], or one for the whole tensor, [1]. With one scale a
token, a token of D elements costs D + 4 bytes a head. The largest e4m3 number is 448, and it has three bits after the
point: the relative error of an element is at most 1/16 down to 2^-6 of the scale and grows below it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantize(x: Tensor, per: Literal["token", "tensor"] = "token") -> tuple[Tensor, Tensor]:
    """x [..., S, D] -> data [..., S, D] and scales [..., S] ("token") or [1] ("tensor"); zeros get the scale 1."""
    largest = x.abs().amax(-1, keepdim=True) if per == "token" else x.abs().amax().reshape(1)
    scale = largest.float() / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    data = (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return data, scale.squeeze(-1) if per == "token" else scale


def dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `quantize`, up to its rounding."""
    return (data.float() * (scale[..., None] if scale.dim() == data.dim() - 1 else scale)).to(dtype)
