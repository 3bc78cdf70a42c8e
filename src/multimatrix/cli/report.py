"""`multimatrix report`: the runs of a folder on one page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from multimatrix.errors import InputError


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison, of a training run, or of several.")],
    follow: Annotated[bool, typer.Option(help="Make the page again until no run is under way.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two pages with --follow.")] = 20.0,
) -> None:
    """Gather all runs of a folder in its report.html, also while they run.

    A comparison gets its own report, made anew from its runs; any other folder a page with the curves of all runs below
    it. The page reads itself again while a run is under way.
    """
    from rich.console import Console

    from multimatrix.compare.overview import write_overview

    if not 1 <= every <= 86_400:
        raise InputError(f"--every must be from 1 to 86400 seconds, got {every}")
    found = write_overview(folder)
    while follow and found.running:
        time.sleep(every)
        found = write_overview(folder)
    console = Console()
    console.print(found.table)
    console.print(f"Report: {found.path}", soft_wrap=True)
