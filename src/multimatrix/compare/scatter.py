"""Final loss against bytes of KV cache, a point per variant."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from matplotlib.transforms import Bbox

from multimatrix.pages.drawing import INK, LABEL, display_name, dress, empty, format_bytes, style_of


class Point(NamedTuple):
    """One variant in the second figure."""

    variant: str
    size: int
    mean: float
    low: float
    high: float
    verdict: str | None


def loss_against_kv_bytes(results: dict[str, Any]) -> Figure:
    """Final validation loss against KV bytes per token, bars from lowest to highest seed, baseline dashed.

    Bytes are those counted from real storage where they were counted, else the stated ones. Variants without
    a loss are left out, and so are those that cache nothing: they have no place on a logarithmic axis.
    """
    points = [point for row in results.get("rows") or [] if (point := _point(row))]
    if not points:
        return empty("no variant has a validation loss yet")
    figure = Figure(figsize=(7, 4.3), layout="constrained")
    axes = figure.subplots()
    dress(axes)
    baseline = results.get("baseline")
    for point in points:
        colour, marker = style_of(point.variant)
        if point.variant == baseline:
            axes.axhline(point.mean, color=colour, linewidth=1, linestyle=(0, (5, 4)), zorder=1)
        if point.high > point.low:
            axes.plot([point.size] * 2, [point.low, point.high], color=colour, marker="_", markersize=9)
        axes.plot(point.size, point.mean, color=colour, marker=marker, markersize=9)
    sizes = [point.size for point in points]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / 1.8, max(sizes) * 1.8)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=14))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.minorticks_off()
    axes.margins(y=0.2)
    axes.set_xlabel("KV cache per token", color=INK)
    axes.set_ylabel("validation loss", color=INK)
    axes.set_title(_caption(results, points), loc="left", fontsize=8.5, color=INK)
    _label_points(figure, axes, points)
    return figure


def _point(row: dict[str, Any]) -> Point | None:
    """The row's place in the second figure, None where it has none."""
    size = row.get("kv_bytes_per_token_counted") or row.get("kv_bytes_per_token")
    loss = row.get("validation_loss") or {}
    mean = loss.get("mean")
    if not size or mean is None or not math.isfinite(mean):
        return None
    values = [mean, *(v for v in loss.get("values") or [] if v is not None and math.isfinite(v))]
    return Point(row["variant"], size, mean, min(values), max(values), row.get("verdict"))


def _caption(results: dict[str, Any], points: list[Point]) -> str:
    """What the marks mean, in one line above the figure."""
    bars = any(point.high > point.low for point in points)
    text = "Bars: lowest to highest seed." if bars else "One seed each: no spread, so no verdict."
    if any(point.variant == results.get("baseline") for point in points):
        text += f" Dashed: {display_name(results['baseline'])}."
    return text


def _label_points(figure: Figure, axes: Axes, points: list[Point]) -> None:
    """Write each name next to its point, where it covers no other point, bar, line or name."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    frame = axes.get_window_extent().padded(-5)
    taken = []
    for point in points:
        losses = (point.low, point.mean, point.high)
        (x, low), (_, y), (_, high) = axes.transData.transform([(point.size, loss) for loss in losses])
        taken.append(Bbox([[x - 9, min(low, y - 9)], [x + 9, max(high, y + 9)]]))
        if point.verdict == "baseline":
            taken.append(Bbox([[frame.x0, y - 2], [frame.x1, y + 2]]))
    for point in points:
        note = f" ({point.verdict})" if point.verdict in ("tie", "baseline") else ""
        label = axes.annotate(
            display_name(point.variant) + note,
            (point.size, point.mean),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            **LABEL,
        )
        box = label.get_window_extent()
        best = min(_places(box), key=lambda place: _hindrances(place, frame, taken))
        taken.append(best)
        point_size = figure.dpi / 72
        label.set_position(((best.x0 - box.x0) / point_size, (best.y0 - box.y0) / point_size))


def _places(box: Bbox) -> list[Bbox]:
    """Where a name centred on its point may go: right, left, above, below, the corners; then farther away."""
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
    return [
        box.translated(dx * (distance + box.width / 2), dy * (distance + box.height / 2))
        for distance in (13, 22, 36, 54)
        for dx, dy in sides
    ]


def _hindrances(box: Bbox, frame: Bbox, taken: list[Bbox]) -> int:
    """How many of the places taken `box` overlaps; leaving the frame is worse than any."""
    inside = frame.contains(*box.min) and frame.contains(*box.max)
    return box.count_overlaps(taken) + (0 if inside else 1000)
