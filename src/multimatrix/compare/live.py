"""A comparison under way: which run stands how, told to the terminal and to report.html as it changes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from multimatrix.compare.prepare import Run
from multimatrix.compare.progress import Progress

# Seconds between two renderings of the report while runs are under way.
INTERVAL = 20.0


class Watch:
    """Hears from a launcher how runs fare; shows progress, and has the report rendered now and then.

    render: writes the report; due when a run has started or ended, and every `INTERVAL` seconds, but in between not so
    often that it takes more than `share` of the time: in one process it holds up training.
    """

    def __init__(self, waiting: list[Run], progress: Progress, render: Callable[[], object], share: float) -> None:
        self.waiting = {run.name for run in waiting}
        self.running: set[str] = set()
        self._progress = progress
        self._render = render
        self._share = share
        self._due = 0.0

    def start(self, run: Run) -> None:
        self.waiting.discard(run.name)
        self.running.add(run.name)
        self._progress.start(run.name)
        self._due = 0.0

    def row(self, run: Run, row: dict[str, Any]) -> None:
        self._progress.show(run.name, row)

    def end(self, run: Run, reason: str | None) -> None:
        self.waiting.discard(run.name)
        self.running.discard(run.name)
        self._progress.end(run.name)
        if reason is not None:
            self.say(f"{run.name} failed: {reason}")
        self._due = 0.0

    def say(self, text: str) -> None:
        self._progress.say(text)

    def tick(self) -> None:
        start = time.monotonic()
        if start < self._due:
            return
        with contextlib.suppress(OSError):  # training goes on; if it cannot be written at the end either, that is said
            self._render()
        took = time.monotonic() - start
        self._due = start + max(INTERVAL, took / self._share)
