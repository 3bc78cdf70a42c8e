"""Attention that others offer for the step that `decode.py` measures.

A peer takes q [B, m, 1, D], keys [B, 1, S, D] and values [B, 1, S, V] and returns [B, m, 1, V]. "Grouped" gives it m
query heads over one key head, "folded" one head with m query rows. What it refuses, it raises.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from multimatrix.ops.attend import eager, sdpa

Run = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Peer:
    """run(q, keys, values, scale). slow: it compiles for every shape, so it comes after all others."""

    name: str
    run: Run
    slow: bool = False


def peers(device: torch.device) -> list[Peer]:
    """All that can be called here, the slow ones last."""
    found = [
        Peer("SDPA flash, grouped", functools.partial(torch_sdpa, SDPBackend.FLASH_ATTENTION, False)),
        Peer("SDPA flash, folded", functools.partial(torch_sdpa, SDPBackend.FLASH_ATTENTION, True)),
        Peer("SDPA cuDNN, grouped", functools.partial(torch_sdpa, SDPBackend.CUDNN_ATTENTION, False)),
        Peer("SDPA cuDNN, folded", functools.partial(torch_sdpa, SDPBackend.CUDNN_ATTENTION, True)),
        Peer("attend, sdpa", lambda q, key, value, scale: sdpa(q, key, value, None, False, scale)),
        Peer("attend, eager", lambda q, key, value, scale: eager(q, key, value, None, False, scale)),
    ]
    if device.type == "cuda":
        modules = {"FlashAttention-2": "flash_attn", "FlashAttention-3": "flash_attn_interface"}
        for name, module in modules.items():
            if importlib.util.find_spec(module) is not None:
                found.append(Peer(name, functools.partial(flash_attention, module)))
        found.append(Peer("FlexAttention, folded", flex, slow=True))
    return found


def torch_sdpa(backend: SDPBackend, folded: bool, q: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(backend):
        if folded:
            return F.scaled_dot_product_attention(q.transpose(1, 2), key, value, scale=scale).transpose(1, 2)
        return F.scaled_dot_product_attention(q, key, value, scale=scale, enable_gqa=True)


def flash_attention(module: str, q: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """flash_attn_with_kvcache, the same call in both packages."""
    kernel = importlib.import_module(module).flash_attn_with_kvcache
    out = kernel(q.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def flex(q: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    shapes = tuple(q.shape), tuple(key.shape), tuple(value.shape)
    return _compiled_flex(shapes)(q.transpose(1, 2), key, value, scale=scale).transpose(1, 2)


@functools.lru_cache(maxsize=1)
def _compiled_flex(shapes: object) -> Callable[..., Tensor]:
    """Compiled anew for every shape: after a few shapes the compiler would go on without fusing."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)
