"""Bytes of a KV cache: its elements, the scales of a quantized one, and whole pages. No torch.

For one token and one cached vector, a head of the key or of the value with D elements:

    bits   elements        scales
    16     2 D             none
    8      D               4: one float32, as `ops.fp8` has it
    4      D / 2, up       2 for every 32 elements or part of them: one float16

The 4 bit layout is that of llama.cpp's q4_0, 4.5 bits an element; NVFP4, with a byte for every 16, takes as much.
"""

from __future__ import annotations

from multimatrix.attention import AttentionSpec

KV_BITS = (16, 8, 4)
FP8_SCALE_BYTES = 4
GROUP, GROUP_SCALE_BYTES = 32, 2  # of a 4 bit cache


def element_bytes(spec: AttentionSpec, bits: int) -> int:
    """Bytes that one token's elements take in one layer; every vector takes whole bytes."""
    return sum(heads * (-(-dim * bits // 8)) for heads, dim in spec.cache.vectors)


def scale_bytes(spec: AttentionSpec, bits: int) -> int:
    """Bytes of the scales that belong to them."""
    if bits == 8:
        return sum(heads * FP8_SCALE_BYTES for heads, _ in spec.cache.vectors)
    if bits == 4:
        return sum(heads * GROUP_SCALE_BYTES * -(-dim // GROUP) for heads, dim in spec.cache.vectors)
    return 0


def paged_tokens(context: int, window: int | None, page_size: int) -> int:
    """Tokens that the pages of one layer have room for.

    context: tokens so far. window: how many of them the layer sees, None for all. Pages that lie wholly before the
    window are free again; a window may begin inside a page, so that it touches one more than it would fill.
    """
    pages = -(-context // page_size)
    if window is not None:
        pages = min(pages, -(-(window - 1) // page_size) + 1)
    return pages * page_size
