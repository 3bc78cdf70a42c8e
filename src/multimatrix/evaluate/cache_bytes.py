"""Bytes that a transformers cache really holds, counted from its storage."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache


def stored_bytes(cache: Cache) -> int:
    """Bytes of the memory behind every key and value tensor, shared memory counted once, slack included."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())
