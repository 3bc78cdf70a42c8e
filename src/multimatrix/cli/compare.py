"""`multimatrix compare`: every variant trained under one protocol."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from multimatrix.cli.options import split_labels, whole_numbers
from multimatrix.cli.settings import training_options


@training_options
def compare(
    settings: dict[str, Any],
    preset: Annotated[str | None, typer.Option(help="Start from these settings: demo.")] = None,
    variants: Annotated[str | None, typer.Option(help="Comma-separated; NAME@TAG for two settings of one.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated, for example 0,1,2.")] = None,
    match: Annotated[str | None, typer.Option(help="parameters: equal totals; none: equal feed-forward.")] = None,
    launcher: Annotated[
        str | None, typer.Option(help="in-process, local (a process per run) or ray; default: local for several GPUs.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at once; default: one per GPU, or 1.")] = None,
    out: Annotated[str | None, typer.Option(help="Run directory; default: runs/PRESET or runs/compare.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Read the text, match the sizes, print them, stop.")] = False,
) -> None:
    """Train every variant under one protocol.

    What does each byte of cache buy? The same command again resumes, and retries runs that failed; more variants or
    seeds extend a comparison. Exit status: 0 all done, 1 some failed, 2 wrong input, 130 Ctrl-C, 75 SIGTERM.
    """
    from multimatrix.compare.command import run_command

    settings |= {
        "variants": split_labels(variants) if variants is not None else None,
        "seeds": whole_numbers("--seeds", seeds) if seeds is not None else None,
        "match": match,
    }
    folder = out or f"runs/{preset or 'compare'}"
    raise typer.Exit(run_command(preset, settings, folder, launcher=launcher, workers=workers, dry_run=dry_run))
