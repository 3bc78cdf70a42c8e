"""The variants. To add one: write a file with its spec, and add its line to VARIANTS."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from multimatrix.attention.fpba import FPBASpec
from multimatrix.attention.gmha import AttentionSpec, CacheLayout, Capacity, Weight
from multimatrix.attention.gqa import GQASpec
from multimatrix.attention.mfa import MFASpec
from multimatrix.attention.mfa_kr import MFAKRSpec
from multimatrix.attention.mha import MHASpec
from multimatrix.attention.mla import MLASpec
from multimatrix.attention.mqa import MQASpec
from multimatrix.errors import InputError
from multimatrix.fields import check_sizes

__all__ = ["VARIANTS", "AttentionSpec", "CacheLayout", "Capacity", "Weight", "make_spec", "make_specs", "spec_class"]

VARIANTS: dict[str, type[AttentionSpec]] = {
    "fpba": FPBASpec,
    "mha": MHASpec,
    "gqa": GQASpec,
    "mqa": MQASpec,
    "mla": MLASpec,
    "mfa": MFASpec,
    "mfa_kr": MFAKRSpec,
}


def spec_class(variant: str) -> type[AttentionSpec]:
    """The spec class of a variant name; InputError with the known names where there is none."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        near = difflib.get_close_matches(str(variant), VARIANTS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"there is no variant {variant!r}; the variants are {', '.join(VARIANTS)}{hint}")
    return VARIANTS[variant]


def make_spec(hidden_size: int, sizes: Mapping[str, Any]) -> AttentionSpec:
    """The spec that `sizes`, {"variant": name, field: value, ...}, describes: the inverse of `spec.to_dict()`.

    Raises:
        InputError: the variant is unknown, a field is unknown or missing, or the sizes cannot work.
    """
    if not isinstance(sizes, Mapping):
        raise InputError(f"attention sizes are a table such as {{'variant': 'mha', ...}}, got {sizes!r}")
    if "variant" not in sizes:
        raise InputError(f"attention sizes need a 'variant', one of {', '.join(VARIANTS)}; got {dict(sizes)}")
    cls = spec_class(sizes["variant"])
    given = {name: value for name, value in sizes.items() if name != "variant"}
    check_sizes(cls.variant, given, cls, besides=("hidden_size",))
    return cls(hidden_size=hidden_size, **given)


def make_specs(hidden_size: int, attention: Any, num_hidden_layers: int) -> list[AttentionSpec]:
    """The spec of every layer: `attention` is one table of sizes for all, or a list with one per layer.

    Raises:
        InputError: it is neither, the list has another length, or a table cannot be read.
    """
    if isinstance(attention, dict):
        return [make_spec(hidden_size, attention)] * num_hidden_layers
    if not isinstance(attention, list):
        raise InputError(f"attention must be one table of sizes or a list with one per layer, got {attention!r}")
    if len(attention) != num_hidden_layers:
        raise InputError(
            f"attention lists {len(attention)} layers but num_hidden_layers is {num_hidden_layers}; "
            "give one entry per layer, or one for all"
        )
    return [make_spec(hidden_size, sizes) for sizes in attention]
