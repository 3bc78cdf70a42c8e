"""Progress of a comparison: bars on a terminal, a line per logged step elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from multimatrix.compare.run import Run
from multimatrix.train.progress import row_text


class Progress:
    """One bar per run on a terminal; in a log, one line per logged step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._name = ""
        self._bar: tqdm | None = None

    def show(self, run: Run, row: dict[str, Any]) -> None:
        """A metrics row of the run under way."""
        if run.name != self._name:
            self.close()
            self._name = run.name
            if sys.stderr.isatty():
                self._bar = tqdm(total=self.steps, desc=f"{run.name:>14}", unit="step", dynamic_ncols=True)
        if self._bar is not None:
            self._bar.update(row["step"] - self._bar.n)
            shown = {key: f"{row[key]:.3f}" for key in ("loss", "validation_loss") if key in row}
            self._bar.set_postfix(shown)
        else:
            print(f"{run.name} {row_text(row, self.steps)}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line between the bars."""
        self.close()
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar under way."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
