"""`multimatrix export`: a saved model in another project's format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from multimatrix.cli.options import MaxShardSize, byte_count
from multimatrix.errors import InputError


def _step3(model: Path, out: Path, max_shard_size: int) -> list[str]:
    from multimatrix.convert.step3 import export_step3

    return export_step3(model, out, max_shard_size).lines


# name -> function of model folder, output folder and bytes of the largest file; it returns the lines to print.
FORMATS: dict[str, Callable[[Path, Path, int], list[str]]] = {"step3": _step3}


def export(
    model: Annotated[Path, typer.Argument(help="Folder of a saved multimatrix model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    format_: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}.")],
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Write a saved model in another format; every bit of its weights is kept."""
    if format_ not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}; got {format_!r}")
    for line in FORMATS[format_](model, out, byte_count("--max-shard-size", max_shard_size)):
        print(line)
