"""Attention over cached latents, or over keys and values made from them: what each costs. No torch.

For t query tokens, the last of a sequence of T, one layer (D and V by form; E the multiply-adds that expand one token):

    pairs        t T - t (t - 1) / 2                     a query sees itself and what is before it
    absorbed     2 t (linear + extra) + 2 N (D + V)_cached pairs          over the latents, as decoding does
    recomputed   2 t (linear - E) + 2 T E + 2 N (D + V)_expanded pairs    all keys and values are made anew
    kept         2 t linear + 2 N (D + V)_expanded pairs                  expanded keys and values are the cache

`absorbed` and `recomputed` read the latents, `kept` reads what `expand` makes. A recomputation that writes nothing to
memory is assumed, which flatters it. With t = T, `kept` is prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from multimatrix.attention import AttentionSpec

FORMS = ("absorbed", "recomputed", "kept")


@dataclass(frozen=True)
class FormCost:
    """FLOPs of t query tokens and the cached elements that they read, one layer and one sequence."""

    flops: int
    elements: int


def pairs(queries: int, context: int, window: int | None = None) -> int:
    """How many tokens the last `queries` of `context` tokens see together, each at most the `window` nearest."""
    first = context - queries + 1  # what the first of them sees
    if window is None or window >= context:
        return queries * (first + context) // 2
    growing = max(0, window - first)  # queries that see less than the window
    return growing * (first + first + growing - 1) // 2 + (queries - growing) * window


def form_cost(spec: AttentionSpec, form: str, queries: int, context: int, window: int | None = None) -> FormCost:
    """The cost of one of FORMS for the last `queries` of `context` tokens."""
    seen = pairs(queries, context, window)
    cached = min(context, window + queries - 1) if window else context
    expanded_core = 2 * spec.num_heads * sum(spec.head_dims) * seen
    linear, expansion = spec.linear_products, spec.expansion_products
    if form == "absorbed":
        core = 2 * spec.num_heads * sum(spec.cached_head_dims) * seen
        return FormCost(2 * queries * (linear + spec.extra_decode_products) + core, cached * spec.cache.elements)
    if not spec.has_expanded_form:
        return form_cost(spec, "absorbed", queries, context, window)
    if form == "recomputed":
        flops = 2 * queries * (linear - expansion) + 2 * cached * expansion + expanded_core
        return FormCost(flops, cached * spec.cache.elements)
    return FormCost(2 * queries * linear + expanded_core, cached * spec.expanded_elements)


def prefill_flops(spec: AttentionSpec, context: int, window: int | None = None) -> int:
    """FLOPs of one layer's attention for a whole prompt: its training form."""
    return form_cost(spec, "kept", context, context, window).flops


def crossing(cheaper: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number of low..high for which `cheaper`, false below it and true from it on, is true; None for none."""
    if not cheaper(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cheaper(middle) else (middle + 1, high)
    return high
