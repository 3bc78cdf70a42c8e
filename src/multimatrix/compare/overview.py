"""The runs of a folder on one page, whatever command trained them, also while they are trained.

Everything is read from the files of the runs, so the page can be made by anybody at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from multimatrix import __version__
from multimatrix.compare import figures, report
from multimatrix.compare.folder import FAILURE, LOCK, RESULT, State, state_of
from multimatrix.compare.results import gather, latest
from multimatrix.errors import InputError
from multimatrix.files import write_json, write_text
from multimatrix.locks import is_locked, locked
from multimatrix.pages.drawing import OTHER_COLOURS, STYLES, format_bytes, inline
from multimatrix.pages.frame import page_template
from multimatrix.train.folder import METRICS, read_ours
from multimatrix.words import number

DRAWN = 24  # curves that can still be told apart
DESCRIBED = ("rows", "runs", "config", "corpus", "tokens", "device_type", "sharing")
# Heading, key in the metrics, and how its last value is written.
NUMBERS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("loss", "loss", lambda value: number(value, 4)),
    ("valid. loss", "validation_loss", lambda value: number(value, 4)),
    ("tok/s", "tokens_per_second", number),
    ("MFU", "mfu", report.percent),
    ("memory", "memory_bytes", format_bytes),
    ("left", "seconds_left", report.duration),
)


class Overview(NamedTuple):
    """What was written, for the terminal; and whether a run is under way."""

    path: Path
    table: Table
    running: bool


def write_overview(folder: Path) -> Overview:
    """Write `folder/report.html`: the report of the comparison in `folder`, or else all runs below it.

    Raises:
        InputError: there are no runs, or files of a comparison are damaged.
        OSError: the page cannot be written.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give one that holds runs")
    if (folder / "results.json").is_file() and (folder / "config.json").is_file():
        return _comparison(folder)
    runs = find_runs(folder)
    if not runs:
        raise InputError(
            f"no run lies below {folder}: no file there is called {METRICS}; give a folder that holds runs"
        )
    path = folder / "report.html"
    write_text(path, _render(folder, runs))
    return Overview(path, _table(runs), any(run["status"] == "running" for run in runs))


def _comparison(folder: Path) -> Overview:
    """The report of a comparison made anew from its runs; its results too, unless somebody is at work on them."""
    way_out = "run the comparison again, or give another folder"
    description = read_ours(folder / "results.json", DESCRIBED, "compare", way_out)

    def render(at_work: bool) -> dict[str, Any]:
        states = {run["directory"]: state_of(folder / run["directory"]) for run in description["runs"]}
        if at_work:
            states = {key: State("waiting") if s.status == "missing" else s for key, s in states.items()}
        running = at_work or any(state.status == "running" for state in states.values())
        results = gather(description, folder, states, running)
        report.write_report(results, folder)
        return results

    if is_locked(folder / LOCK):
        results = render(at_work=True)
    else:
        with locked(folder / LOCK, "wait for it"):
            results = render(at_work=False)
            write_json(folder / "results.json", results)
            report.write_csv(results, folder / "results.csv")
            figures.save_figures(results, folder)
    return Overview(folder / "report.html", report.console_table(results), results["running"])


def find_runs(folder: Path) -> list[dict[str, Any]]:
    """Every folder with metrics at or below `folder`, by name: how it stands, and its last numbers."""
    runs = []
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if METRICS not in files:
            continue
        path = Path(directory)
        state = state_of(path)
        numbers = latest(path / METRICS)
        steps = _steps(path)
        runs.append(
            {
                "directory": path.relative_to(folder).as_posix(),
                "name": path.relative_to(folder).as_posix() if path != folder else folder.resolve().name,
                "status": state.status,
                "reason": state.reason,
                "steps": steps,
                "step": numbers.get("step", 0),
                "numbers": numbers if state.status == "running" else {**numbers, "seconds_left": None},
                "changed": (path / METRICS).stat().st_mtime,
                "colour": None,
            }
        )
    return runs


def _steps(run: Path) -> int | None:
    """How many steps the run was to take, where one of its files tells."""
    for path, *keys in (
        (run / RESULT, "identity", "steps"),
        (run / FAILURE, "identity", "steps"),
        (run / "config.json", "steps"),
        (run.parent.parent / "config.json", "steps"),
    ):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(path.read_text(encoding="utf-8"))
            for key in keys:
                found = found[key]
            return int(found)
    return None


def _render(folder: Path, runs: list[dict[str, Any]]) -> str:
    drawn = sorted(runs, key=lambda run: run["changed"])[-DRAWN:]
    colours = [*dict.fromkeys([*(colour for colour, _ in STYLES.values()), *OTHER_COLOURS])]
    for place, run in enumerate(run for run in runs if run in drawn):
        run["colour"] = colours[place % len(colours)]
    states = report.count_states(runs)
    return page_template("multimatrix.compare", "runs.html.jinja").render(
        title="multimatrix report",
        version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        headline=f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} in {folder.resolve().name}",
        refresh=report.REFRESH if "running" in states else None,
        states=states,
        headings=_headings(runs),
        runs=[{**run, "cells": _cells(run, runs)} for run in runs],
        reasons=any(run["reason"] for run in runs),
        left_out=len(runs) - len(drawn),
        comparisons=[
            path.relative_to(folder).as_posix()
            for path in sorted(folder.rglob("report.html"))
            if path.parent != folder and (path.parent / "results.json").is_file()
        ],
        losses=inline(figures.losses_of_runs([run for run in runs if run in drawn], folder)),
    )


def _headings(runs: list[dict[str, Any]]) -> list[str]:
    """The columns of numbers that have something to show."""
    return [heading for heading, key, _ in NUMBERS if any(run["numbers"].get(key) is not None for run in runs)]


def _cells(run: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    """The numbers of a run as text, below `_headings`."""
    shown = _headings(runs)
    return [text(run["numbers"].get(key)) for heading, key, text in NUMBERS if heading in shown]


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("run", "status", "step", *_headings(runs)):
        table.add_column(heading, justify="left" if heading in ("run", "status") else "right", overflow="fold")
    for run in runs:
        step = f"{run['step']:,}" + (f"/{run['steps']:,}" if run["steps"] else "")
        table.add_row(*map(Text, (run["name"], run["status"], step, *_cells(run, runs))))
    return table
