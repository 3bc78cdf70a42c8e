"""How figures look that stand in a page: colours, frames, names at the ends of lines, and SVG that follows the theme.

Figures are drawn with matplotlib's object-oriented interface; no global state is touched. Everything that is not data
is drawn in `INK`, which `inline` replaces by the colour of the text around it, so that figures follow the theme.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

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


class End(NamedTuple):
    """The end of a line in data coordinates, its name and its colour."""

    text: str
    x: float
    y: float
    colour: str


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


def to_svg(figure: Figure, transparent: bool = False) -> str:
    """The figure as SVG text without dates or random identifiers: the same data give the same text."""
    buffer = StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "multimatrix"}):
        nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(buffer, format="svg", transparent=transparent, metadata=nothing)
    return buffer.getvalue()


def inline(figure: Figure) -> Markup:
    """The figure as an SVG element in the colour of the text around it; matplotlib escapes what it writes."""
    svg = to_svg(figure, transparent=True)
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Each name to the right of the end of its line, moved apart as little as it takes not to overlap.

    Call it when the limits of the axes are final.
    """
    if not ends:
        return
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((end.x, end.y)))[1] for end in ends]
    order = np.argsort(heights, kind="stable")
    steps = min(0.08, 1 / len(ends)) * np.arange(len(ends))  # of the axes' height
    moved = np.clip(isotonic_regression(np.array(heights)[order] - steps).x, 0, 1 - steps[-1]) + steps
    for place, y in zip(order, moved, strict=True):
        end = ends[place]
        leader = {"arrowstyle": "-", "linestyle": ":", "color": end.colour, "relpos": (0, 0.5)}
        axes.annotate(
            end.text,
            (end.x, end.y),
            (1.03, y),
            textcoords="axes fraction",
            arrowprops={**leader, "shrinkA": 0, "shrinkB": 2},
            va="center",
            annotation_clip=False,
            **LABEL,
        )


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
