"""Small models of ours that Step-3's format can state, and what its tests compare."""

from __future__ import annotations

from pathlib import Path

import torch

from cases import randomized
from multimatrix import MultimatrixConfig, MultimatrixForCausalLM

ATTENTION = {"variant": "mfa", "num_heads": 5, "head_dim": 16, "query_rank": 24, "query_norm": True}
MIXTURE = {"num_experts": 6, "experts_per_token": 2, "intermediate_size": 12, "shared_intermediate_size": 20}


def our_config(**changes) -> MultimatrixConfig:
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "max_position_embeddings": 128,
        "attention": ATTENTION,
    }
    return MultimatrixConfig(**settings | changes)


def our_model(dtype: torch.dtype = torch.float64, **changes) -> MultimatrixForCausalLM:
    return randomized(MultimatrixForCausalLM(our_config(**changes)).to(dtype), 0.4)


def saved(folder: Path, model: MultimatrixForCausalLM, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(a[name].flatten().view(torch.uint8), b[name].flatten().view(torch.uint8))
        for name in a
    )
