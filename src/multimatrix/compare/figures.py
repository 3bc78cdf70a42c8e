"""The two figures of a comparison, and figures as files; how they look is in `pages.drawing`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multimatrix.compare.curves import loss_against_tokens, losses_of_runs
from multimatrix.compare.scatter import loss_against_kv_bytes
from multimatrix.files import write_text
from multimatrix.pages.drawing import to_svg

__all__ = ["loss_against_kv_bytes", "loss_against_tokens", "losses_of_runs", "save_figures"]


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
