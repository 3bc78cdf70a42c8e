"""The two figures of a comparison: loss against training tokens, and loss against bytes of KV cache.

How they look is in `pages.drawing`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator
from matplotlib.transforms import Bbox

from multimatrix.files import write_text
from multimatrix.pages.drawing import (
    INK,
    LABEL,
    End,
    display_name,
    dress,
    empty,
    format_bytes,
    label_ends,
    style_of,
    to_svg,
)


class Point(NamedTuple):
    """One variant in the second figure."""

    variant: str
    size: int
    mean: float
    low: float
    high: float
    verdict: str | None


@dataclass(frozen=True)
class Curve:
    """One variant's loss at each token count: mean, lowest and highest seed, each of shape [points]."""

    tokens: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def loss_against_tokens(results: dict[str, Any], directory: Path) -> Figure:
    """Validation and smoothed training loss against tokens: mean over seeds, band from lowest to highest.

    Reads `metrics.jsonl` of every run of `results` under `directory`. A variant with finished runs is drawn
    from those alone; one without is drawn as far as it came. Validation is left out where no variant was
    evaluated twice.
    """
    validation = _curves(results, directory, "validation_loss")
    training = {name: _smooth(curve) for name, curve in _curves(results, directory, "loss").items()}
    if training and all(len(curve.tokens) < 2 for curve in validation.values()):
        validation = {}
    panels = [
        (label, curves)
        for label, curves in (("validation loss", validation), ("training loss, smoothed", training))
        if curves
    ]
    if not panels:
        return empty("no metrics have been written yet")
    figure = Figure(figsize=(7, 3 * len(panels) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, curves) in zip(grid, panels, strict=True):
        dress(axes)
        axes.set_ylabel(label, color=INK)
        for name, curve in curves.items():
            colour, marker = style_of(name)
            shown = {"marker": marker, "markersize": 4.5} if len(curve.tokens) <= 30 else {}
            axes.fill_between(curve.tokens, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(curve.tokens, curve.mean, color=colour, linewidth=1.6, **shown)
        if _cut_the_start(axes, curves):
            axes.set_title("The start is above the frame.", loc="left", fontsize=8.5, color=INK)
        _label_ends(axes, curves)
    grid[-1].set_xlabel("training tokens", color=INK)
    grid[-1].xaxis.set_major_formatter(EngFormatter(sep=" "))
    return figure


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


def save_figures(results: dict[str, Any], directory: Path) -> dict[str, Path]:
    """Write both figures as PNG and SVG to `directory/figures` and return their paths by file name.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = directory / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    figures = {
        "loss_against_tokens": loss_against_tokens(results, directory),
        "loss_against_kv_bytes": loss_against_kv_bytes(results),
    }
    for name, figure in figures.items():
        svg, png, partial = (folder / f"{name}.{ending}" for ending in ("svg", "png", "partial"))
        write_text(svg, to_svg(figure))
        figure.savefig(partial, format="png", dpi=180)
        partial.replace(png)
        paths |= {svg.name: svg, png.name: png}
    return paths


def _curves(results: dict[str, Any], directory: Path, key: str) -> dict[str, Curve]:
    """One curve per variant that has values of `key`, in the order of the runs."""
    runs: dict[str, list[tuple[bool, np.ndarray]]] = {}
    for run in results.get("runs") or []:
        series = _read(directory / run["directory"] / "metrics.jsonl", key)
        if series.shape[1]:
            runs.setdefault(run["variant"], []).append((run.get("status") == "done", series))
    curves = {}
    for name, all_series in runs.items():
        chosen = [series for done, series in all_series if done] or [series for _, series in all_series]
        first, last = max(s[0, 0] for s in chosen), min(s[0, -1] for s in chosen)
        tokens = chosen[0][0]
        tokens = tokens[(tokens >= first) & (tokens <= last)]
        if tokens.size:
            values = np.stack([np.interp(tokens, *series) for series in chosen])  # [seeds, points]
            curves[name] = Curve(tokens, values.mean(0), values.min(0), values.max(0))
    return curves


def _read(path: Path, key: str) -> np.ndarray:
    """Tokens and finite values of `key`, [2, points].

    A resumed run writes a step twice: the later line counts. A line that is not whole is skipped: the run was
    interrupted while writing it.
    """
    found: dict[int, float] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.get(key) is not None and row.get("tokens") is not None and math.isfinite(row[key]):
            found[row["tokens"]] = row[key]
    return np.array(sorted(found.items()), dtype=float).reshape(-1, 2).T


def _smooth(curve: Curve) -> Curve:
    """Centred moving mean over a twentieth of the points; at the ends over as many as there are."""
    kernel = np.ones(2 * (len(curve.tokens) // 40) + 1)
    weight = np.convolve(np.ones_like(curve.mean), kernel, "same")
    mean, low, high = (np.convolve(y, kernel, "same") / weight for y in (curve.mean, curve.low, curve.high))
    return Curve(curve.tokens, mean, low, high)


def _cut_the_start(axes: Axes, curves: dict[str, Curve]) -> bool:
    """Fit the y axis to the losses after the first third of training; True if that cuts something off."""
    start = max(curve.tokens[-1] for curve in curves.values()) / 3
    late = [curve.tokens >= min(start, curve.tokens[-1]) for curve in curves.values()]
    low = min(curve.low[keep].min() for curve, keep in zip(curves.values(), late, strict=True))
    high = max(curve.high[keep].max() for curve, keep in zip(curves.values(), late, strict=True))
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    return any(curve.high.max() > high + margin for curve in curves.values())


def _label_ends(axes: Axes, curves: dict[str, Curve]) -> None:
    """Name and last value to the right of each line."""
    end = max(curve.tokens[-1] for curve in curves.values())
    ends = []
    for name, curve in curves.items():
        x, loss = curve.tokens[-1], curve.mean[-1]
        text = f"{display_name(name)} {loss:.3f}" + (" (stopped)" if x < 0.99 * end else "")
        ends.append(End(text, x, loss, style_of(name)[0]))
    label_ends(axes, ends)


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
