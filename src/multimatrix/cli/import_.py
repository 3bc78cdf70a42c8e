"""`multimatrix import`: a checkpoint of another format as a saved multimatrix model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from multimatrix.cli.options import MaxShardSize, byte_count
from multimatrix.errors import InputError


def _step3(folder: Path, out: Path, max_shard_size: int) -> list[str]:
    from multimatrix.convert.step3 import import_step3

    return import_step3(folder, out, max_shard_size).lines


# name -> function of checkpoint folder, output folder and bytes of the largest file; it returns the lines to print.
FORMATS: dict[str, Callable[[Path, Path, int], list[str]]] = {"step3": _step3}
# What config.json calls the models of a format.
MODEL_TYPES = {"step3_text": "step3", "step3_vl": "step3"}


def import_(
    folder: Annotated[Path, typer.Argument(help="Folder of the checkpoint: config.json and safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    format_: Annotated[
        str | None, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}; by default what config.json says.")
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Write a checkpoint of another format as a multimatrix model.

    Every bit of its weights is kept.
    """
    from multimatrix.files import read_config

    if format_ is None:
        kind = read_config(folder)["model_type"]
        if kind not in MODEL_TYPES:
            raise InputError(
                f"{folder} holds a {kind!r} model; those that can be imported are {', '.join(MODEL_TYPES)}"
            )
        format_ = MODEL_TYPES[kind]
    if format_ not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}; got {format_!r}")
    for line in FORMATS[format_](folder, out, byte_count("--max-shard-size", max_shard_size)):
        print(line)
