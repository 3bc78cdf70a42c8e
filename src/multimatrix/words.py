"""Numbers as people read them."""

from __future__ import annotations


def short_count(count: int) -> str:
    """All digits where they fit, else an SI prefix: 24,576 and 12.19 M."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.2f} {prefix}"
    return f"{count:,}"


def short_tokens(count: float) -> str:
    """`512`, `8k`, `1M` in powers of 1024; all digits where they are no multiple."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if count >= size and count % size == 0:
            return f"{count / size:,.0f}{unit}"
    return f"{count:,.0f}"


def number(value: float | None, digits: int = 0, sign: bool = False) -> str:
    """`1,234` or `1.4321`, with `sign` also `+0.0213`; a dash for None."""
    return "–" if value is None else f"{value:{'+' if sign else ''},.{digits}f}"
