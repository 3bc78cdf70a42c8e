"""MFA in the place of a model's attention: at equal parameters, at equal cache, or whatever fits a budget. No torch.

    parameters   the head dim C is twice the rank of this model's heads, or its own C where it is MFA already
    cache        C is what makes the cache as large as it was: half its elements for MFA, all of them for MFA-KR

Both have as many heads m of query rank R = C (as in the paper) as take no more parameters than the layer's attention
had, rounded down to a power of two's multiple where that loses less than an eighth, so that devices can share them.
What is left then goes to R, in steps of 64. The search tries C by C and R = C, 2C, 4C, 8C with the most heads that
take no more, and sorts by total effective rank, m C.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from multimatrix.attention import VARIANTS, AttentionSpec, make_spec
from multimatrix.attention.mfa import MFASpec
from multimatrix.errors import InputError
from multimatrix.plan.model import DecoderSizes

Equal = Literal["parameters", "cache"]
EQUAL: tuple[Equal, ...] = ("parameters", "cache")
REPLACEMENTS = tuple(name for name, cls in VARIANTS.items() if issubclass(cls, MFASpec))
HEAD_DIMS = (*range(32, 512, 32), *range(512, 1024, 64), *range(1024, 4097, 256))
RANK_FACTORS = (1, 2, 4, 8)


def replaced(
    sizes: DecoderSizes, variant: str, equal: Equal, *, fixed: Mapping[str, Any] | None = None, multiple: int = 1
) -> DecoderSizes:
    """The model with the attention of every layer replaced.

    fixed: sizes that are given, such as head_dim or num_heads. multiple: of which the number of heads must be one.

    Raises:
        InputError: the variant is none of REPLACEMENTS, or not one head fits into the parameters.
    """
    if variant not in REPLACEMENTS:
        raise InputError(f"attention can be replaced by {' or '.join(REPLACEMENTS)}, not by {variant!r}")
    specs = {spec: _match(spec, variant, equal, dict(fixed or {}), multiple) for spec in dict.fromkeys(sizes.specs)}
    ending = "" if equal == "parameters" else ", equal cache"
    return dataclasses.replace(
        sizes,
        name=f"{sizes.name} with {variant}{ending}",
        instead_of=sizes,
        specs=tuple(specs[spec] for spec in sizes.specs),
    )


def _match(spec: AttentionSpec, variant: str, equal: Equal, fixed: dict[str, Any], multiple: int) -> AttentionSpec:
    if "head_dim" in fixed:
        width = fixed["head_dim"]
    elif equal == "cache":
        pair = _mfa(spec, variant, {"head_dim": 2, "query_rank": 1}, 1)  # RoPE turns pairs
        width = max(1, spec.cache.elements // pair.cache.elements) * 2
    else:
        width = spec.head_dim if isinstance(spec, MFASpec) else 2 * spec.capacity.rank_per_head
    given = {"head_dim": width, "query_rank": width} | fixed
    if "num_heads" in given:
        return _mfa(spec, variant, given, given["num_heads"])
    heads = _heads_for(spec, variant, given, multiple)
    even = next((math.lcm(ways, multiple) for ways in (8, 4, 2) if heads >= 8 * ways), 1)
    heads = heads // even * even
    if heads < 1:
        least = _mfa(spec, variant, given, multiple)
        raise InputError(
            f"the attention to be replaced has {spec.parameters:,} parameters a layer, and {variant} of head_dim "
            f"{width:,} has {least.parameters:,} with {multiple} head{'s' * (multiple > 1)}; set a smaller one, for "
            f"example --set {variant}.head_dim={max(2, width // 4 * 2)}"
        )
    filled = _mfa(spec, variant, given, heads)
    if "query_rank" not in fixed:
        left = (spec.parameters - filled.parameters) / (spec.hidden_size + heads * width)
        filled = _mfa(spec, variant, given | {"query_rank": width + 64 * round(left / 64)}, heads)
    return filled


def _mfa(spec: AttentionSpec, variant: str, given: Mapping[str, Any], heads: int) -> AttentionSpec:
    return make_spec(
        spec.hidden_size, {"variant": variant, "position": spec.position} | dict(given) | {"num_heads": heads}
    )


def _heads_for(spec: AttentionSpec, variant: str, given: Mapping[str, Any], multiple: int) -> int:
    """The most heads, a multiple, that take no more parameters than `spec`."""
    one, two = (_mfa(spec, variant, given, heads).parameters for heads in (1, 2))  # linear in the heads
    return ((spec.parameters - one) // (two - one) + 1) // multiple * multiple


def search(
    sizes: DecoderSizes,
    allowed: Callable[[DecoderSizes], bool],
    *,
    fixed: Mapping[str, Mapping[str, Any]] | None = None,
    multiple: int = 1,
) -> list[DecoderSizes]:
    """The models with MFA in every layer that are `allowed` and no larger than this one, best effective rank first.

    Heads are no narrower than the model's own unless nothing else is allowed; then the widest that is stands alone.
    Of equal rank the one with the larger shared latent comes first. fixed: sizes that are given, by variant.
    """
    found: list[DecoderSizes] = []
    narrowest = max(spec.capacity.rank_per_head for spec in sizes.specs)
    largest = max(sizes.specs, key=lambda spec: spec.parameters)
    for variant in REPLACEMENTS:
        given = dict((fixed or {}).get(variant, {}))
        fitting = [
            candidate
            for candidate in _candidates(sizes, largest, variant, given, multiple)
            if candidate.parameters <= sizes.parameters and allowed(candidate)
        ]
        widths = {candidate.specs[0].capacity.rank_per_head for candidate in fitting}
        least = min(narrowest, max(widths, default=0))
        found += [candidate for candidate in fitting if candidate.specs[0].capacity.rank_per_head >= least]
    return sorted(found, key=_order)


def _order(candidate: DecoderSizes) -> tuple[int, int, int]:
    spec = candidate.specs[0]
    return -spec.capacity.total_effective_rank, -spec.capacity.shared_latent_dim, spec.parameters


def _candidates(
    sizes: DecoderSizes, largest: AttentionSpec, variant: str, given: dict[str, Any], multiple: int
) -> Iterator[DecoderSizes]:
    layers = len(sizes.specs)
    for width in [given["head_dim"]] if "head_dim" in given else HEAD_DIMS:
        ranks = [given["query_rank"]] if "query_rank" in given else [width * factor for factor in RANK_FACTORS]
        for rank in ranks:
            if rank > sizes.hidden_size:
                continue
            sized = given | {"head_dim": width, "query_rank": rank}
            heads = given.get("num_heads") or _heads_for(largest, variant, sized, multiple)
            if heads >= 1:
                spec = _mfa(largest, variant, sized, heads)
                yield dataclasses.replace(sizes, name=f"{sizes.name} with {variant}", specs=(spec,) * layers)
