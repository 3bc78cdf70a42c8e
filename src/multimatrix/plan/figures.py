"""The figures of a plan: cache against context, speed against context, the roofline, and reuse or recompute.

How they look is in `pages.drawing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from multimatrix.pages.drawing import INK, LABEL, OTHER_COLOURS, OTHER_MARKERS, STYLES, End, dress, empty, label_ends
from multimatrix.plan.forms import form_cost
from multimatrix.plan.hardware import Hardware
from multimatrix.plan.model import DecoderSizes, stored_kv_bytes
from multimatrix.plan.parallel import runs
from multimatrix.plan.serving import Serving
from multimatrix.words import short_tokens

SHORTEST, LONGEST = 2**9, 2**20
RING: dict[str, Any] = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.8}


class Style(NamedTuple):
    """How a model is drawn. Earlier ones are wider, so that they are seen beneath later ones that coincide."""

    colour: str
    marker: str
    width: float

    @property
    def markersize(self) -> float:
        return 3.5 + 2.2 * self.width


def model_styles(names: Sequence[str]) -> dict[str, Style]:
    """By name: a variant has its own colour and marker, other models take what is left in order."""
    own = {name: STYLES[name] for name in names if name in STYLES}
    taken = {colour for colour, _ in own.values()}
    colours = [*(colour for colour, _ in reversed(STYLES.values())), *OTHER_COLOURS]
    markers = [*(marker for _, marker in reversed(STYLES.values())), *OTHER_MARKERS]
    free = cycle([pair for pair in zip(colours, cycle(markers), strict=False) if pair[0] not in taken])
    widths = np.linspace(3.0, 1.6, len(names)) if len(names) > 1 else [1.8]
    return {name: Style(*(own.get(name) or next(free)), width) for name, width in zip(names, widths, strict=True)}


def kv_bytes_against_context(
    planned: Sequence[DecoderSizes], styles: Mapping[str, Style], chips: Sequence[Hardware], kv_bits: int, longest: int
) -> Figure:
    """Bytes that the cache of one sequence occupies; the band spans the memory of one device."""
    figure, axes = _axes(4.2)
    contexts = _contexts(longest)
    ends = []
    for sizes in planned:
        stored = [stored_kv_bytes(sizes, int(context), kv_bits) for context in contexts]
        style = styles[sizes.name]
        axes.plot(contexts, stored, color=style.colour, linewidth=style.width)
        ends.append(End(sizes.name, contexts[-1], stored[-1], style.colour))
    if chips:
        least, most = (of(chip.memory_bytes for chip in chips) for of in (min, max))
        axes.axhspan(least * 0.985, most * 1.015, color=INK, alpha=0.18, linewidth=0)
        span = " to ".join(f"{memory / 1e9:,.0f}" for memory in dict.fromkeys((least, most)))
        axes.annotate(
            f"memory of one device, {span} GB",
            (contexts[0], most),
            (5, 4),
            textcoords="offset points",
            **LABEL | {"fontsize": 8.5},
        )
    _log_scale(axes, "B")
    _tokens_axis(axes, contexts)
    axes.set_ylabel("KV cache of one sequence", color=INK)
    _finish(figure, axes, ends)
    return figure


def speed_against_context(
    servings: Sequence[Serving], styles: Mapping[str, Style], batch: int | None, longest: int
) -> Figure:
    """Decoded tokens per second and device; batch: None for the largest that fits at each context.

    A line is dashed where the step waits for arithmetic, solid where for memory, and ringed between.
    """
    figure, axes = _axes(4.6)
    contexts = _contexts(longest)
    handles = []
    for serving in servings:
        colour, _, width = styles[serving.sizes.name]
        points = [point for context in contexts if (point := _point(serving, batch, int(context)))]
        if not points:
            continue
        for bound, run in groupby(enumerate(points), lambda pair: pair[1][2]):
            numbers = [number for number, _ in run]
            shown = points[max(0, numbers[0] - 1) : numbers[-1] + 1]  # from the end of the run before
            axes.plot(
                [point[0] for point in shown],
                [point[1] for point in shown],
                color=colour,
                linewidth=width,
                linestyle=(0, (3, 1.5)) if bound == "arithmetic" else "-",
            )
        crossing = serving.bound_changes(batch, int(contexts[0]), points[-1][0])
        if crossing is not None and (point := _point(serving, batch, crossing)):
            axes.plot(*point[:2], color=colour, **RING)
        handles.append(
            Line2D([], [], color=colour, linewidth=width, label=f"{serving.sizes.name}, {_devices(serving)}")
        )
    if not handles:
        return empty("No model fits at any context.")
    _log_scale(axes)
    _tokens_axis(axes, contexts)
    axes.set_ylabel("tokens per second and device", color=INK)
    _legend(figure, handles)
    _finish(figure, axes, [])
    return figure


def roofline(rows: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], chips: Sequence[Hardware]) -> Figure:
    """Attainable FLOPs per second against FLOPs per cached byte: a roof per accelerator, a point per model on each."""
    if not chips:
        return empty("No accelerator was given.")
    figure, axes = _axes(4.6)
    models = {row["model"]: row for row in rows}
    intensities = [row["arithmetic_intensity"] for row in models.values()]
    bits = rows[0]["kv_bits"]
    ridges = [chip.peak(bits) / chip.bytes_per_second for chip in chips]
    low, high = min(*intensities, *ridges) / 2.5, max(*intensities, *ridges) * 2.5
    ends = []
    for chip, ridge in zip(chips, ridges, strict=True):
        peak = chip.peak(bits)
        axes.plot([low, ridge, high], [low * chip.bytes_per_second, peak, peak], color=INK, alpha=0.5, linewidth=1.1)
        ends.append(End(chip.name, high, peak, INK))
        for name, row in models.items():
            x = row["arithmetic_intensity"]
            axes.plot(x, min(peak, x * chip.bytes_per_second), **_marked(styles[name]))
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _log_scale(axes, "FLOP/s")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"FLOPs of the attention core per byte of a {rows[0]['kv_bits']} bit cache", color=INK)
    axes.set_ylabel("attainable", color=INK)
    handles = [Line2D([], [], linestyle="", **_marked(styles[name]), label=name) for name in models]
    _legend(figure, handles)
    _finish(figure, axes, ends)
    return figure


def forms_against_queries(planned: Sequence[DecoderSizes], styles: Mapping[str, Style], context: int) -> Figure:
    """FLOPs of attention per query token over the cached latents (solid) and over what is made anew (dashed)."""
    figure, axes = _axes(4.2)
    queries = np.unique(np.geomspace(1, context, 80).astype(int))
    ends = []
    for sizes in planned:
        colour, _, width = styles[sizes.name]
        absorbed, recomputed = (
            [_flops(sizes, form, int(number), context) / number for number in queries]
            for form in ("absorbed", "recomputed")
        )
        axes.plot(queries, absorbed, color=colour, linewidth=width)
        ends.append(End(sizes.name, float(queries[-1]), absorbed[-1], colour))
        if absorbed != recomputed:
            axes.plot(queries, recomputed, color=colour, linewidth=width, linestyle=(0, (3, 1.5)))
            pairs = enumerate(zip(absorbed, recomputed, strict=True))
            crossed = next((place for place, (reused, anew) in pairs if anew < reused), None)
            if crossed is not None:
                axes.plot(queries[crossed], recomputed[crossed], color=colour, **RING)
    _log_scale(axes, "FLOP")
    _tokens_axis(axes, queries)
    axes.set_xlabel("query tokens at once", color=INK)
    axes.set_ylabel("attention, per query token", color=INK)
    _finish(figure, axes, ends)
    return figure


def _marked(style: Style) -> dict[str, Any]:
    return {"color": style.colour, "marker": style.marker, "markersize": style.markersize}


def _flops(sizes: DecoderSizes, form: str, queries: int, context: int) -> int:
    return sum(form_cost(spec, form, queries, context, window).flops * count for spec, window, count in runs(sizes))


def _point(serving: Serving, batch: int | None, context: int) -> tuple[int, float, str] | None:
    """Context, tokens per second and device, and what the step waits for; None where it does not fit."""
    number = batch or serving.largest_batch(context)
    if not number:
        return None
    prediction = serving.prediction(number, context)
    if not prediction["fits"]:
        return None
    return context, prediction["tokens_per_second"] / serving.layout.devices, prediction["bound"]


def _devices(serving: Serving) -> str:
    return "1 device" if serving.layout.devices == 1 else f"{serving.layout.devices} devices"


def _contexts(longest: int) -> np.ndarray:
    return np.unique(np.geomspace(SHORTEST, max(LONGEST, longest), 90).astype(int))


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    dress(axes)
    return figure, axes


def _tokens_axis(axes: Axes, counts: np.ndarray) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(counts[0], counts[-1])
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_tokens(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context", color=INK)


def _log_scale(axes: Axes, unit: str = "") -> None:
    """A logarithmic y axis over two ticks at least."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 20 * low:
        axes.set_ylim(low / 2, high * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 1000 * low else (1, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _si(value, unit)))


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Names below the axes."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = next((columns for columns, room in ((3, 22), (2, 38)) if longest <= room), 1)
    lines = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, lines - 2))  # inches that would be taken from the axes
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=9.5)
    for text in legend.get_texts():
        text.set(color=INK, parse_math=False)


def _finish(figure: Figure, axes: Axes, ends: Sequence[End]) -> None:
    """Names at the ends of lines, when the limits are final; long ones in a legend, which leaves room to the lines."""
    axes.yaxis.set_minor_locator(NullLocator())
    if ends and max(len(end.text) for end in ends) > 20:
        _legend(figure, [Line2D([], [], color=end.colour, linewidth=2, label=end.text) for end in ends])
        return
    figure.draw_without_rendering()
    label_ends(axes, ends)


def _si(value: float, unit: str = "") -> str:
    """`1 kB`, `10 TFLOP/s`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()
