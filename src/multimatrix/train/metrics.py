"""metrics.jsonl: a row per logged step and per evaluation, none twice and none missing, however often a run starts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


class MetricsFile:
    """The rows of a run."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def cut(self, step: int) -> None:
        """Drop the rows after this step, from which the run goes on."""
        end = 0
        self._file.seek(0)
        for line in self._file:
            row = _row(line)
            if row is None or row["step"] > step:
                break
            end += len(line)
        self._file.seek(end)
        self._file.truncate()

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Have the rows on the disk before a checkpoint says that they are there."""
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def metrics_file(path: Path) -> Iterator[MetricsFile]:
    """The file, made where it is not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        yield MetricsFile(file)


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a whole line; None where a kill cut it or it is none of ours."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None
