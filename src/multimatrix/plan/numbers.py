"""Parameters and cache bytes of a whole decoder, from its specs. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from multimatrix.attention import AttentionSpec
from multimatrix.errors import InputError


def decoder_parameters(
    specs: Sequence[AttentionSpec], *, vocab_size: int, intermediate_size: int, tie_word_embeddings: bool
) -> int:
    """Learned parameters of `model.MultimatrixForCausalLM` with one spec per layer."""
    hidden = specs[0].hidden_size
    embeddings = vocab_size * hidden * (1 if tie_word_embeddings else 2)
    # Per layer: attention, SwiGLU's three matrices, two norms; then the final norm.
    layers = sum(spec.parameters + 3 * hidden * intermediate_size + 2 * hidden for spec in specs)
    return embeddings + layers + hidden


def kv_bytes_per_token(specs: Sequence[AttentionSpec], bits: int = 16) -> int:
    """Bytes that one token adds to the KV cache of a model with one spec per layer."""
    return sum(spec.cache.elements for spec in specs) * bits // 8


def match_intermediate_size(
    specs: Sequence[AttentionSpec],
    target: int,
    *,
    vocab_size: int,
    tie_word_embeddings: bool,
    tolerance: float,
) -> int:
    """The feed-forward width that brings a decoder's parameters to `target`.

    Widths that are multiples of a large power of two run faster, so the largest power up to 128 is taken whose
    nearest multiple stays within `tolerance` (relative); without one, the nearest width.

    Raises:
        InputError: the attention alone takes more than `target`, or no width comes within 0.5 %.
    """

    def parameters(width: int) -> int:
        return decoder_parameters(
            specs, vocab_size=vocab_size, intermediate_size=width, tie_word_embeddings=tie_word_embeddings
        )

    def mismatch(width: int) -> float:
        return abs(parameters(width) / target - 1)

    per_width = parameters(1) - parameters(0)
    exact = (target - parameters(0)) / per_width
    if exact < 1:
        raise InputError(
            f"{specs[0].variant} has {parameters(0):,} parameters without a feed-forward, which leaves none of the "
            f"{target:,} to match for one; use fewer or narrower heads, or --match none"
        )
    for multiple in (128, 64, 32, 16, 8, 4, 2):
        width = round(exact / multiple) * multiple
        if width > 0 and mismatch(width) <= tolerance:
            return width
    width = max(1, round(exact))
    if mismatch(width) > 0.005:
        raise InputError(
            f"no feed-forward width brings {specs[0].variant} within 0.5 % of {target:,} parameters: the nearest, "
            f"{width}, gives {parameters(width):,}; use a larger model or --match none"
        )
    return width
