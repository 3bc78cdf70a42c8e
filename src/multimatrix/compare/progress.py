"""Progress of a comparison: a bar per run on a terminal, a line per logged step elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from multimatrix.train.progress import row_text


class Progress:
    """One bar per run that is under way; in a log, one line per logged step. Everything goes to stderr."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._console = Console(file=sys.stderr)
        self._bars: rich_progress.Progress | None = None
        self._tasks: dict[str, rich_progress.TaskID] = {}
        self._numbers: dict[str, dict[str, Any]] = {}
        if sys.stderr.isatty():
            self._bars = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}", style="bold"),
                rich_progress.BarColumn(bar_width=None, table_column=Column(ratio=1)),
                rich_progress.MofNCompleteColumn(table_column=Column(min_width=2 * len(str(steps)) + 1)),
                rich_progress.TextColumn("{task.fields[numbers]}"),
                rich_progress.TimeRemainingColumn(compact=True, table_column=Column(min_width=5)),
                console=self._console,
                expand=True,
                transient=True,  # of what is done the table at the end tells
            )

    def start(self, name: str) -> None:
        """The run `name` is under way."""
        if self._bars is not None:
            self._bars.start()
            self._tasks[name] = self._bars.add_task(name, total=self.steps, numbers="starting")
            self._numbers[name] = {}

    def show(self, name: str, row: dict[str, Any]) -> None:
        """A metrics row of a run under way."""
        if self._bars is not None and name in self._tasks:
            self._numbers[name] |= row
            self._bars.update(self._tasks[name], completed=row["step"], numbers=_short(self._numbers[name]))
        elif self._bars is None:
            print(f"{name} {row_text(row, self.steps)}", file=sys.stderr, flush=True)

    def end(self, name: str) -> None:
        """The run `name` is no longer under way."""
        if self._bars is not None and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))

    def say(self, text: str) -> None:
        """A line above the bars."""
        if self._bars is not None and self._tasks:
            self._console.print(Text(text), soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()


def _short(numbers: dict[str, Any]) -> str:
    """`loss 2.310 valid. 2.402 18,250/s`."""
    labels = {"loss": "loss", "validation_loss": "valid."}
    parts = [f"{label} {numbers[key]:.3f}" for key, label in labels.items() if key in numbers]
    if "tokens_per_second" in numbers:
        parts.append(f"{numbers['tokens_per_second']:,.0f}/s")
    return " ".join(parts)
