"""Loss against training tokens: of variants over their seeds, and of single runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from multimatrix.pages.drawing import INK, End, display_name, dress, empty, label_ends, style_of
from multimatrix.train.folder import METRICS

# Points of a line that are drawn at most: long runs have more than a screen.
DRAWN = 400
# What is drawn, and the key of its values in the metrics.
KINDS = {"validation loss": "validation_loss", "training loss, smoothed": "loss"}


@dataclass(frozen=True)
class Curve:
    """One variant's loss at each token count: mean, lowest and highest seed, each of shape [points]."""

    tokens: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def thinned(self) -> Curve:
        """At most `DRAWN` of the points, evenly spread, the last among them."""
        last = len(self.tokens) - 1
        kept = np.unique(np.linspace(0, last, min(last + 1, DRAWN)).round().astype(int))
        return Curve(self.tokens[kept], self.mean[kept], self.low[kept], self.high[kept])


@dataclass(frozen=True)
class Panel:
    """One plot. curves: by name, with a label each. thin: runs under way, without."""

    label: str
    curves: dict[str, Curve]
    thin: list[tuple[str, Curve]]


def loss_against_tokens(results: dict[str, Any], directory: Path) -> Figure:
    """Validation and smoothed training loss against tokens: mean over seeds, band from lowest to highest.

    Reads `metrics.jsonl` of every run of `results` under `directory`. A variant with finished runs is drawn
    from those alone; one without is drawn as far as it came. Runs under way are thin lines beside. Validation is left
    out where no variant was evaluated twice.
    """
    running = [run for run in results.get("runs") or [] if run.get("status") == "running"]
    under_way = {run["variant"] for run in running}
    panels = []
    for label, key in KINDS.items():
        smooth = _smooth if key == "loss" else _as_it_is
        curves = {name: smooth(curve) for name, curve in _curves(results, directory, key).items()}
        thin = [(run["variant"], smooth(curve)) for run in running if (curve := _curve_of(directory, run, key))]
        panels.append(Panel(label, curves, thin))
    return _draw(
        panels,
        style=style_of,
        text=display_name,
        unfinished=lambda name: "running" if name in under_way else "stopped",
    )


def losses_of_runs(runs: list[dict[str, Any]], directory: Path) -> Figure:
    """Validation and smoothed training loss against tokens of single runs.

    runs: `directory` of each below `directory`, its `name`, `colour` and `status`.
    """
    by_name = {run["name"]: run for run in runs}
    panels = []
    for label, key in KINDS.items():
        smooth = _smooth if key == "loss" else _as_it_is
        found = {run["name"]: smooth(curve) for run in runs if (curve := _curve_of(directory, run, key))}
        panels.append(Panel(label, found, []))
    return _draw(
        panels,
        style=lambda name: (by_name[name]["colour"], "o"),
        text=str,
        unfinished=lambda name: by_name[name]["status"] if by_name[name]["status"] != "done" else "",
    )


def _draw(
    panels: list[Panel],
    *,
    style: Callable[[str], tuple[str, str]],
    text: Callable[[str], str],
    unfinished: Callable[[str], str],
) -> Figure:
    """The panels, one below the other.

    style: colour and marker of a curve. text: its name as it is written. unfinished: what is said of a curve that ends
    before the longest.
    """
    validation, training = panels
    if training.curves and all(len(curve.tokens) < 2 for curve in validation.curves.values()):
        panels = [training]
    panels = [panel for panel in panels if panel.curves]
    if not panels:
        return empty("no metrics have been written yet")
    height = max(3.0, 0.19 * max(len(panel.curves) for panel in panels))  # room for a name per curve
    figure = Figure(figsize=(7, height * len(panels) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        dress(axes)
        axes.set_ylabel(panel.label, color=INK)
        for name, curve in panel.curves.items():
            colour, marker = style(name)
            shown = {"marker": marker, "markersize": 4.5} if len(curve.tokens) <= 30 else {}
            axes.fill_between(curve.tokens, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(curve.tokens, curve.mean, color=colour, linewidth=1.6, **shown)
        for name, curve in panel.thin:
            axes.plot(curve.tokens, curve.mean, color=style(name)[0], linewidth=0.9)
            axes.plot(curve.tokens[-1], curve.mean[-1], color=style(name)[0], marker=".", markersize=5)
        if _cut_the_start(axes, panel.curves):
            axes.set_title("The start is above the frame.", loc="left", fontsize=8.5, color=INK)
        _label_ends(axes, panel.curves, style, text, unfinished)
    grid[-1].set_xlabel("training tokens", color=INK)
    grid[-1].xaxis.set_major_formatter(EngFormatter(sep=" "))
    return figure


def _curves(results: dict[str, Any], directory: Path, key: str) -> dict[str, Curve]:
    """One curve per variant that has values of `key`, in the order of the runs."""
    runs: dict[str, list[tuple[bool, np.ndarray]]] = {}
    for run in results.get("runs") or []:
        series = _read(directory / run["directory"] / METRICS, key)
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


def _curve_of(directory: Path, run: dict[str, Any], key: str) -> Curve | None:
    """The values of a single run, None where there are none."""
    series = _read(directory / run["directory"] / METRICS, key)
    return Curve(series[0], *[series[1]] * 3) if series.shape[1] else None


def _read(path: Path, key: str) -> np.ndarray:
    """Tokens and finite values of `key`, [2, points].

    A line that is not whole is skipped: it is being written, or the run was interrupted while writing it.
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
    return Curve(curve.tokens, mean, low, high).thinned()


def _as_it_is(curve: Curve) -> Curve:
    return curve.thinned()


def _cut_the_start(axes: Axes, curves: dict[str, Curve]) -> bool:
    """Fit the y axis to the losses after the first third of training; True if that cuts something off."""
    start = max(curve.tokens[-1] for curve in curves.values()) / 3
    late = [curve.tokens >= min(start, curve.tokens[-1]) for curve in curves.values()]
    low = min(curve.low[keep].min() for curve, keep in zip(curves.values(), late, strict=True))
    high = max(curve.high[keep].max() for curve, keep in zip(curves.values(), late, strict=True))
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    return any(curve.high.max() > high + margin for curve in curves.values())


def _label_ends(
    axes: Axes,
    curves: dict[str, Curve],
    style: Callable[[str], tuple[str, str]],
    text: Callable[[str], str],
    unfinished: Callable[[str], str],
) -> None:
    """Name and last value to the right of each line."""
    end = max(curve.tokens[-1] for curve in curves.values())
    ends = []
    for name, curve in curves.items():
        x, loss = curve.tokens[-1], curve.mean[-1]
        note = unfinished(name) if x < 0.99 * end else ""
        ends.append(End(f"{text(name)} {loss:.3f}" + (f" ({note})" if note else ""), x, loss, style(name)[0]))
    label_ends(axes, ends)
