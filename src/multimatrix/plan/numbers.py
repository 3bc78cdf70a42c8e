"""Parameters and cache bytes of a whole decoder, from its specs. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from multimatrix.attention import AttentionSpec
from multimatrix.errors import InputError
from multimatrix.model.experts import ExpertsSpec
from multimatrix.plan.cache import element_bytes


def decoder_parameters(
    specs: Sequence[AttentionSpec],
    *,
    vocab_size: int,
    intermediate_size: int,
    tie_word_embeddings: bool,
    experts: ExpertsSpec | None = None,
    active: bool = False,
) -> int:
    """Learned parameters of `model.MultimatrixForCausalLM` with one spec per layer; see `decoder_parts`."""
    parts = decoder_parts(
        specs,
        vocab_size=vocab_size,
        intermediate_size=intermediate_size,
        tie_word_embeddings=tie_word_embeddings,
        experts=experts,
        active=active,
    )
    return sum(parts.values())


def decoder_parts(
    specs: Sequence[AttentionSpec],
    *,
    vocab_size: int,
    intermediate_size: int,
    tie_word_embeddings: bool,
    experts: ExpertsSpec | None = None,
    active: bool = False,
    norms_per_layer: int = 2,
    feed_forward_matrices: int = 3,
) -> dict[str, int]:
    """Learned parameters by part of the model.

    intermediate_size: of the dense feed-forwards, which are all those that `experts` does not replace. active: leave
    out the experts that a token does not take. norms_per_layer: of hidden_size each. feed_forward_matrices: of a dense
    feed-forward, 3 for SwiGLU and 2 where nothing is gated.
    """
    hidden = specs[0].hidden_size
    router, feed_forward = 0, 0
    for layer in range(len(specs)):
        if experts is not None and experts.has_experts(layer):
            router += experts.router_parameters(hidden)
            feed_forward += experts.active_parameters(hidden) if active else experts.parameters(hidden)
        else:
            feed_forward += feed_forward_matrices * hidden * intermediate_size
    return {
        "embeddings": vocab_size * hidden,
        "attention": sum(spec.parameters for spec in specs),
        "feed_forward": feed_forward - router,
        "router": router,
        "norms": (norms_per_layer * len(specs) + 1) * hidden,  # and the final one
        "output_head": 0 if tie_word_embeddings else vocab_size * hidden,
    }


def kv_bytes_per_token(specs: Sequence[AttentionSpec], bits: int = 16) -> int:
    """Bytes that one token adds to the KV cache of a model with one spec per layer, without scales of quantization."""
    return sum(element_bytes(spec, bits) for spec in specs)


def match_intermediate_size(
    specs: Sequence[AttentionSpec],
    target: int,
    *,
    vocab_size: int,
    tie_word_embeddings: bool,
    tolerance: float,
) -> int:
    """The feed-forward width that brings a dense decoder's parameters to `target`; see `_match_width`.

    Raises:
        InputError: the attention alone takes more than `target`, or no width comes within 0.5 %.
    """

    def parameters(width: int) -> int:
        return decoder_parameters(
            specs, vocab_size=vocab_size, intermediate_size=width, tie_word_embeddings=tie_word_embeddings
        )

    return _match_width(parameters, target, tolerance, specs[0].variant, "feed-forward")


def match_experts(
    specs: Sequence[AttentionSpec],
    target: int,
    experts: ExpertsSpec,
    *,
    vocab_size: int,
    intermediate_size: int,
    tie_word_embeddings: bool,
    tolerance: float,
) -> ExpertsSpec:
    """The experts at the width that brings a decoder's parameters to `target`; see `_match_width`.

    The shared expert's width takes up the difference: every token takes it, as every token takes the attention, so
    that active parameters are matched with the total. Without a shared expert it is the width of each expert.

    Raises:
        InputError: everything else takes more than `target`, or no width comes within 0.5 %.
    """
    shared = experts.shared_intermediate_size > 0
    name, what = ("shared_intermediate_size", "shared expert") if shared else ("intermediate_size", "routed expert")

    def at(width: int) -> ExpertsSpec:
        changed: Any = {name: width}
        return dataclasses.replace(experts, **changed)

    def parameters(width: int) -> int:
        # Linear in the width; a width of 0 is not one that an expert may have.
        one, two = (
            decoder_parameters(
                specs,
                vocab_size=vocab_size,
                intermediate_size=intermediate_size,
                tie_word_embeddings=tie_word_embeddings,
                experts=at(given),
            )
            for given in (1, 2)
        )
        return one + (width - 1) * (two - one)

    return at(_match_width(parameters, target, tolerance, specs[0].variant, what))


def _match_width(parameters: Callable[[int], int], target: int, tolerance: float, variant: str, what: str) -> int:
    """The width that brings `parameters(width)`, linear in it, to `target`.

    Widths that are multiples of a large power of two run faster, so the largest power up to 128 is taken whose
    nearest multiple stays within `tolerance` (relative); without one, the nearest width.
    """

    def mismatch(width: int) -> float:
        return abs(parameters(width) / target - 1)

    per_width = parameters(1) - parameters(0)
    exact = (target - parameters(0)) / per_width
    if exact < 1:
        raise InputError(
            f"{variant} has {parameters(0):,} parameters without a {what}, which leaves none of the "
            f"{target:,} to match for one; use fewer or narrower heads, or --match none"
        )
    for multiple in (128, 64, 32, 16, 8, 4, 2):
        width = round(exact / multiple) * multiple
        if width > 0 and mismatch(width) <= tolerance:
            return width
    width = max(1, round(exact))
    if mismatch(width) > 0.005:
        raise InputError(
            f"no {what} width brings {variant} within 0.5 % of {target:,} parameters: the nearest, "
            f"{width}, gives {parameters(width):,}; use a larger model or --match none"
        )
    return width
