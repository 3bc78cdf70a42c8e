"""Reading along: one line per metrics row."""

from __future__ import annotations

import sys
from typing import Any

# Metrics as they are shown: name, format.
SHOWN = {
    "loss": "{:.4f}",
    "validation_loss": "{:.4f}",
    "learning_rate": "{:.3g}",
    "tokens_per_second": "{:,.0f}",
    "mfu": "{:.1%}",
}


class Line:
    """Prints a row as a line of text, to stderr. steps: of the run. name: before every line."""

    def __init__(self, steps: int, name: str = "") -> None:
        self.steps = steps
        self.name = name

    def show(self, row: dict[str, Any]) -> None:
        print(f"{self.name}{row_text(row, self.steps)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is left open."""


def row_text(row: dict[str, Any], steps: int) -> str:
    """`step 3/100: loss 5.1234, learning rate 0.0003, tokens per second 12,345, memory 1.2 GB, left 0:12:34`."""
    parts = [f"{name.replace('_', ' ')} {shown.format(row[name])}" for name, shown in SHOWN.items() if name in row]
    if "memory_bytes" in row:
        parts.append(f"memory {row['memory_bytes'] / 1e9:.1f} GB")
    if "seconds_left" in row:
        minutes, seconds = divmod(round(row["seconds_left"]), 60)
        parts.append(f"left {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    return f"step {row['step']}/{steps}: {', '.join(parts)}"
