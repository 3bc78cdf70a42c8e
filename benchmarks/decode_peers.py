"""Attention that others offer for the step that `decode.py` measures.

A peer takes q [B, m, 1, D], keys [B, 1, S, D] and values [B, 1, S, V] and returns [B, m, 1, V]. "Grouped" gives it m
query heads over one key head, "folded" one head with m query rows. What it refuses, it raises.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from multimatrix.ops.attend import eager, sdpa

PAGE = 64

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
        if importlib.util.find_spec("flashinfer") is not None:
            found.append(Peer("FlashInfer", flashinfer))
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


def flashinfer(q: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Its decode kernel on tensor cores or, where the value is the leading part of the key, its kernel for MLA."""
    wrapper = _planned_flashinfer(tuple(q.shape), tuple(key.shape), value.shape[-1], scale, q.device)
    pages = key.reshape(-1, PAGE, 1, key.shape[-1])
    if value.shape[-1] == key.shape[-1]:
        return wrapper.run(q.squeeze(2), (pages, value.reshape(-1, PAGE, 1, value.shape[-1]))).unsqueeze(2)
    parts = [tensor.tensor_split([value.shape[-1]], dim=-1) for tensor in (q.squeeze(2), pages.squeeze(2))]
    return wrapper.run(*parts[0], *parts[1]).unsqueeze(2)


@functools.lru_cache(maxsize=1)
def _planned_flashinfer(
    q_shape: tuple[int, ...], key_shape: tuple[int, ...], value_dim: int, scale: float, device: torch.device
) -> Any:
    """The plan waits for the device, so it is made once a shape."""
    flashinfer = importlib.import_module("flashinfer")
    (batch, heads, _, dim), pages = q_shape, key_shape[2] // PAGE
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    indices = torch.arange(batch * pages, dtype=torch.int32, device=device)
    if value_dim == dim:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        last = torch.full((batch,), PAGE, dtype=torch.int32, device=device)
        sizes = {"num_qo_heads": heads, "num_kv_heads": 1, "head_dim": dim, "page_size": PAGE, "sm_scale": scale}
        dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        wrapper.plan(starts * pages, indices, last, **sizes, **dtypes)
        return wrapper
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace)
    lengths = torch.full((batch,), key_shape[2], dtype=torch.int32, device=device)
    layout = starts, starts * pages, indices, lengths
    wrapper.plan(*layout, heads, value_dim, dim - value_dim, PAGE, False, scale, torch.bfloat16, torch.bfloat16)
    return wrapper
