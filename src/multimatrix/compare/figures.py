"""The two figures of a comparison, and figures as files.

All are drawn with matplotlib's object-oriented interface; no global state is touched.
"""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from multimatrix.compare.curves import loss_against_tokens, losses_of_runs
from multimatrix.compare.scatter import loss_against_kv_bytes
from multimatrix.files import write_text

__all__ = ["loss_against_kv_bytes", "loss_against_tokens", "losses_of_runs", "save_figures", "to_svg"]


def to_svg(figure: Figure, transparent: bool = False) -> str:
    """The figure as SVG text without dates or random identifiers: the same data give the same text."""
    buffer = StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "multimatrix"}):
        nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(buffer, format="svg", transparent=transparent, metadata=nothing)
    return buffer.getvalue()


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
