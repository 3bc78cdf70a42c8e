"""Runs of a comparison as tasks on a Ray cluster, on one machine or several.

The text goes into Ray's object store once and is mapped by the tasks of each machine. Every run is a task in a process
of its own with one GPU. `--out` must lie on a file system that all machines share: results, metrics and locks are
files.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multimatrix.compare.execute import DISK, PATIENCE, attempt, record_failure
from multimatrix.compare.folder import state_of
from multimatrix.compare.launch import Watcher
from multimatrix.compare.local import Tail
from multimatrix.compare.prepare import Prepared, Run
from multimatrix.errors import InputError, one_line
from multimatrix.locks import is_locked
from multimatrix.train.folder import METRICS, RUN_LOCK


class OnRay:
    """At most `workers` tasks at once, as many as the cluster has GPUs, or cores where it has none.

    The cluster is the one that RAY_ADDRESS names or that was started on this machine, else a new one on it.

    Raises:
        InputError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, workers: int | None) -> None:
        try:
            import ray
        except ImportError:
            raise InputError("--launcher ray needs Ray; install it with pip install 'multimatrix[ray]'") from None
        if not ray.is_initialized():
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(f"no Ray cluster can be reached: {one_line(error)}; check RAY_ADDRESS") from error
        resources = ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        self.device_type = "cuda" if gpus else "cpu"
        self.workers = min(workers or gpus or cores, gpus or cores)
        self.sharing = "several ran at once on one processor" if self.workers > 1 and not gpus else None

    def launch(self, prepared: Prepared, runs: Sequence[Run], out: Path, command: str, watcher: Watcher) -> None:
        import ray

        task: Any = ray.remote(
            num_cpus=1,
            num_gpus=1 if self.device_type == "cuda" else 0,
            max_calls=1,  # a process of its own
            max_retries=0,  # what ended one worker might end them all
        )(_train)
        # Tasks do not share the working directory of this process.
        waiting = deque(dataclasses.replace(run, directory=run.directory.absolute()) for run in runs)
        active: dict[Any, _Task] = {}
        # Machines share no token cache, so the text goes along; of memmaps Ray would make a copy in every task.
        stored = ray.put(prepared.with_blocks(*map(np.asarray, (prepared.text.train, prepared.text.validation))))
        try:
            while waiting or active:
                while waiting and len(active) < self.workers:
                    run = waiting.popleft()
                    run.directory.mkdir(parents=True, exist_ok=True)
                    tail = Tail(run.directory / METRICS)
                    active[task.remote(stored, run, command)] = _Task(run, tail)
                watcher.tick()
                done, _ = ray.wait(list(active), timeout=1)
                for known in active.values():
                    known.follow(watcher)
                for reference in done:
                    known = active.pop(reference)
                    watcher.end(known.run, _outcome(reference, known.run))
        finally:
            _stop(list(active))


class _Task:
    """A run that was given to the cluster, which starts it when it has room."""

    def __init__(self, run: Run, metrics: Tail) -> None:
        self.run = run
        self.metrics = metrics
        self.started = False

    def follow(self, watcher: Watcher) -> None:
        rows = self.metrics.new_rows()
        if not self.started and (rows or is_locked(self.run.directory / RUN_LOCK)):
            self.started = True
            watcher.start(self.run)
        for row in rows:
            watcher.row(self.run, row)


def _train(prepared: Prepared, run: Run, command: str) -> str | None:
    """What a task does; see `execute.attempt`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return attempt(prepared, run, command, lambda row: None, print)


def _outcome(reference: Any, run: Run) -> str | None:
    """None where the run is done, else why it failed.

    Raises:
        OSError: the disk is full or read-only.
    """
    import ray

    try:
        reason = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError) and error.cause.errno in DISK:
            raise error.cause from None
        return record_failure(run, one_line(error.cause), str(error))
    except ray.exceptions.RayError as error:
        reason = "its worker ended without a word, killed or crashed"
        return record_failure(run, f"{reason} ({type(error).__name__})", str(error))
    if reason is None and state_of(run.directory).status != "done":
        return record_failure(run, f"no result has come to {run.directory}; all machines must share that folder")
    return reason


def _stop(references: list[Any]) -> None:
    """Interrupt all tasks, and end those that go on after a while."""
    import ray

    for reference in references:
        ray.cancel(reference)
    try:
        if references:
            ray.wait(references, num_returns=len(references), timeout=PATIENCE)
    finally:
        for reference in references:
            ray.cancel(reference, force=True)
