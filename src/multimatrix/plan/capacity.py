"""The paper's capacity table with numbers filled in (arXiv 2412.19255, table 1). No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multimatrix.attention import AttentionSpec, make_spec
from multimatrix.errors import InputError
from multimatrix.plan.numbers import kv_bytes_per_token
from multimatrix.recipes import read_recipe


@dataclass(frozen=True)
class Recipe:
    """Published sizes: attention specs that share a hidden size and a number of layers."""

    name: str
    title: str
    source: str
    num_hidden_layers: int
    specs: dict[str, AttentionSpec]


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name; InputError with the known names where there is none."""
    recipe = read_recipe("sizes", name)
    specs = {
        variant: make_spec(recipe["hidden_size"], {"variant": variant, **sizes})
        for variant, sizes in recipe["attention"].items()
    }
    return Recipe(name, recipe["title"], recipe["source"], recipe["num_hidden_layers"], specs)


def capacity_rows(specs: Mapping[str, AttentionSpec], num_hidden_layers: int, context: int) -> list[dict[str, Any]]:
    """One row per spec: what the variant stores, what it costs, what it can represent.

    `parameters` and the FLOPs (per token, at `context`) are those of one layer's attention; `kv_bytes_per_token` is
    the whole model's at 16 bit.

    Raises:
        InputError: num_hidden_layers or context below 1.
    """
    for name, value in (("the number of layers", num_hidden_layers), ("the context", context)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    return [
        {
            "variant": label,
            "parameters": spec.parameters,
            "kv_elements_per_token_per_layer": spec.cache.elements,
            "kv_bytes_per_token_per_layer": kv_bytes_per_token([spec]),
            "kv_bytes_per_token": kv_bytes_per_token([spec] * num_hidden_layers),
            "heads": spec.capacity.heads,
            "rank_per_head": spec.capacity.rank_per_head,
            "shared_latent_dim": spec.capacity.shared_latent_dim,
            "total_effective_rank": spec.capacity.total_effective_rank,
            "training_flops_per_token": spec.training_flops(context),
            "decode_flops_per_token": spec.decode_flops(context),
            "context": context,
            "num_hidden_layers": num_hidden_layers,
            "hidden_size": spec.hidden_size,
            "sizes": spec.to_dict(),
        }
        for label, spec in specs.items()
    ]
