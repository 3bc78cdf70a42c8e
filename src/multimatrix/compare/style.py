"""How figures and tables name and colour variants, and what all figures share."""

from __future__ import annotations

import zlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Everything that is not data; the report replaces it by the colour of its text, so that figures follow the theme.
INK = "#24292f"
LABEL: dict[str, Any] = {"fontsize": 9.5, "color": INK, "parse_math": False}

# Okabe and Ito's colours, which stay apart under the common colour deficiencies.
STYLES = {
    "mha": ("#7a7f87", "o"),
    "gqa": ("#0072b2", "s"),
    "mqa": ("#56b4e9", "^"),
    "mla": ("#009e73", "D"),
    "mfa": ("#d55e00", "v"),
    "mfa_kr": ("#e69f00", "P"),
}
OTHER_COLOURS = ("#cc79a7", "#aa3377", "#999933", "#7b6fd0", "#8c564b", "#44aa99", "#b8336a")
OTHER_MARKERS = ("X", "<", ">", "p", "h", "*")


def style_of(variant: str) -> tuple[str, str]:
    """Colour and marker of a variant. They depend on the name alone: the same in every figure and run."""
    if variant in STYLES:
        return STYLES[variant]
    code = zlib.crc32(variant.encode())
    colour = OTHER_COLOURS[code % len(OTHER_COLOURS)]
    return colour, OTHER_MARKERS[code // len(OTHER_COLOURS) % len(OTHER_MARKERS)]


def display_name(variant: str) -> str:
    """The name as papers print it: `mfa_kr` becomes MFA-KR, `mfa_kr@tied` MFA-KR@tied."""
    name, at, tag = variant.partition("@")
    return name.upper().replace("_", "-") + at + tag


def format_bytes(count: float | None) -> str:
    """`512 B`, `6.75 KiB`, `1.5 GiB`: binary units, at most two decimals, a dash for None."""
    if count is None:
        return "–"
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.2f}".rstrip("0").rstrip(".") + f" {units[0]}"


def dress(axes: Axes) -> None:
    """Two quiet axis lines and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)


def empty(text: str) -> Figure:
    """A figure that says why there is nothing to see."""
    figure = Figure(figsize=(7, 1.6))
    figure.text(0.5, 0.5, text, ha="center", va="center", color=INK)
    return figure
