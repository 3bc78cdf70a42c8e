"""Where the runs of a comparison are trained: in this process, in one process per GPU, or on a Ray cluster.

All launchers call `execute.attempt` and tell a `Watcher` what happens; they differ in nothing that a run's numbers
depend on.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from multimatrix.compare.execute import attempt
from multimatrix.compare.prepare import Prepared, Run
from multimatrix.errors import InputError

LAUNCHERS = ("in-process", "local", "ray")


class Watcher(Protocol):
    """Who is told how the runs fare."""

    def start(self, run: Run) -> None:
        """It is being trained from now on."""

    def row(self, run: Run, row: dict[str, Any]) -> None:
        """It wrote a metrics row."""

    def end(self, run: Run, reason: str | None) -> None:
        """It is done, or failed for this reason."""

    def say(self, text: str) -> None:
        """A line for the person who waits."""

    def tick(self) -> None:
        """Nothing is to be done at this moment; called every second or so, but in training only after a row."""


class Launcher(Protocol):
    """Trains runs.

    device_type: of the devices it trains on. workers: how many runs it trains at once at most. sharing: a sentence
    for the report where runs share a device and slow each other down, else None.
    """

    device_type: str
    workers: int
    sharing: str | None

    def launch(self, prepared: Prepared, runs: Sequence[Run], out: Path, command: str, watcher: Watcher) -> None:
        """Train all of `runs`; when it returns or raises, nothing is being trained any more.

        Raises:
            OSError: the disk is full or read-only.
            KeyboardInterrupt: somebody wants it to stop; runs under way have been stopped.
        """


class InProcess:
    """One run after the other in this process, on the first GPU that is visible."""

    workers: int = 1
    sharing: str | None = None

    def __init__(self) -> None:
        self.device_type = "cuda" if visible_gpus() else "cpu"

    def launch(self, prepared: Prepared, runs: Sequence[Run], out: Path, command: str, watcher: Watcher) -> None:
        for run in runs:

            def show(row: dict[str, Any], run: Run = run) -> None:
                watcher.row(run, row)
                watcher.tick()

            watcher.start(run)
            watcher.tick()
            reason = attempt(prepared, run, command, show, watcher.say)
            gc.collect()  # what a run that failed held must not be missing to the next
            if prepared.device.type == "cuda":
                torch.cuda.empty_cache()
            watcher.end(run, reason)


def make_launcher(name: str | None, workers: int | None) -> Launcher:
    """The launcher of this name; None for the simplest that uses every GPU that is visible.

    Raises:
        InputError: there is no such launcher, or it cannot have so many workers.
    """
    if name is not None and name not in LAUNCHERS:
        raise InputError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {name!r}")
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    if name is None:
        name = "local" if (workers or len(visible_gpus())) > 1 else "in-process"
    if name == "in-process":
        if workers is not None and workers > 1:
            raise InputError(f"one process trains one run at a time, not {workers}; use --launcher local")
        return InProcess()
    if name == "local":
        from multimatrix.compare.local import Local

        return Local(workers)
    from multimatrix.compare.on_ray import OnRay

    return OnRay(workers)


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; no CUDA context is made."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(index) for index in range(count)]
    return names[:count]  # CUDA ignores what follows a name that it does not know
