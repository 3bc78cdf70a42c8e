"""Runs of a comparison in processes of their own, a GPU each.

Every run gets a fresh process: whatever ends it, ends it alone, and no memory of one run is missing to the next. The
text is prepared once and mapped into each of them from the token cache. What a worker says goes to `log.txt` of its
run, and how it fares is read from its metrics.jsonl and its exit status.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from multimatrix.compare.execute import DISK, PATIENCE, record_failure
from multimatrix.compare.folder import FAILURE, SHARED, state_of
from multimatrix.compare.launch import Watcher, visible_gpus
from multimatrix.compare.prepare import Prepared, Run
from multimatrix.train.folder import METRICS

# For the last words of a process that crashes.
FLAGS = ("-u", "-X", "faulthandler")
PREPARED = "prepared.pickle"
FAILED = 1  # exit status of a worker whose run failed; failed.json says why
POLL = 0.2  # seconds


class Local:
    """One process per run, at most `workers` at once, each with one of the visible GPUs."""

    def __init__(self, workers: int | None) -> None:
        self.gpus = visible_gpus()
        self.device_type = "cuda" if self.gpus else "cpu"
        self.workers = workers or max(1, len(self.gpus))
        self.sharing: str | None = None
        if self.workers > max(1, len(self.gpus)):
            where = f"on {len(self.gpus)} GPUs" if self.gpus else "on one processor"
            self.sharing = f"{self.workers} ran at once {where}"

    def launch(self, prepared: Prepared, runs: Sequence[Run], out: Path, command: str, watcher: Watcher) -> None:
        waiting, active = deque(runs), dict[int, _Worker]()
        shared = out / SHARED
        try:
            share(prepared, runs, command, shared)
            while waiting or active:
                for place in range(self.workers):
                    if waiting and place not in active:
                        run = waiting.popleft()
                        active[place] = _Worker(run, shared, self.surroundings(place))
                        watcher.start(run)
                watcher.tick()
                time.sleep(POLL)
                for place, worker in list(active.items()):
                    status = worker.process.poll()
                    for row in worker.metrics.new_rows():
                        watcher.row(worker.run, row)
                    if status is not None:
                        del active[place]
                        watcher.end(worker.run, worker.outcome(status))
        finally:
            stop([worker.process for worker in active.values()])
            shutil.rmtree(shared, ignore_errors=True)

    def surroundings(self, place: int) -> dict[str, str]:
        """Environment of a worker: its GPU, and its share of the cores unless the user has set the threads."""
        surroundings = dict(os.environ)
        if self.gpus:
            surroundings["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        surroundings.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.workers)))
        # Spinning threads of one worker would take the cores of the others.
        surroundings.setdefault("OMP_WAIT_POLICY", "passive")
        return surroundings


class _Worker:
    """The process of one run. It ends when its standard input does: a worker must not outlive who started it."""

    def __init__(self, run: Run, shared: Path, surroundings: dict[str, str]) -> None:
        self.run = run
        run.directory.mkdir(parents=True, exist_ok=True)
        self.metrics = Tail(run.directory / METRICS)
        (run.directory / FAILURE).unlink(missing_ok=True)
        with (run.directory / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *FLAGS, "-m", "multimatrix.compare.worker", str(shared), run.name],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=surroundings,
                start_new_session=True,  # a Ctrl-C at the terminal is for the process that started it
            )

    def outcome(self, status: int) -> str | None:
        """None where the run is done, else why it failed.

        Raises:
            OSError: the disk is full or read-only.
        """
        if self.process.stdin is not None:
            self.process.stdin.close()
        if status in DISK:
            raise OSError(status, os.strerror(status), str(self.run.directory))
        state = state_of(self.run.directory)
        if status == 0 and state.status == "done":
            return None
        if status == FAILED and state.status == "failed":
            return state.reason
        return record_failure(self.run, how_it_ended(status))


def how_it_ended(status: int) -> str:
    """What the exit status of a process that could not say it itself tells."""
    if status >= 0:
        return f"its process ended with status {status}; log.txt beside it has its last words"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}; log.txt beside it has its last words"


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ask all processes to end, and make those that have not after a while; a second Ctrl-C makes them at once."""
    for process in processes:
        process.terminate()
    try:
        end = time.monotonic() + PATIENCE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


class Mapped(NamedTuple):
    """Blocks `[blocks, context]` in a file, where every process maps them into memory."""

    path: Path
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, blocks: NDArray[np.integer], path: Path) -> Mapped:
        """Where the blocks are in a file already, as tokens of the cache are; else they are written to `path`."""
        if isinstance(blocks, np.memmap) and blocks.filename is not None and blocks.flags.c_contiguous:
            whole: Any = blocks
            while isinstance(whole.base, np.memmap):
                whole = whole.base
            first = blocks.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
            return cls(Path(blocks.filename).absolute(), blocks.dtype, whole.offset + first, blocks.shape)
        blocks.tofile(path)
        return cls(path.absolute(), blocks.dtype, 0, blocks.shape)

    def read(self) -> NDArray[np.integer]:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def share(prepared: Prepared, runs: Sequence[Run], command: str, shared: Path) -> None:
    """Write what workers read: where the text is, and everything else of the comparison."""
    shutil.rmtree(shared, ignore_errors=True)
    shared.mkdir(parents=True)
    text = prepared.text
    train, validation = Mapped.of(text.train, shared / "train"), Mapped.of(text.validation, shared / "validation")
    bare = prepared.with_blocks(text.train[:0], text.validation[:0])
    (shared / PREPARED).write_bytes(pickle.dumps((bare, train, validation, list(runs), command)))


def read_shared(shared: Path, name: str) -> tuple[Prepared, Run, str]:
    """The comparison, one run of it, and the command, as `share` wrote them; the text is mapped, not read."""
    bare, train, validation, runs, command = pickle.loads((shared / PREPARED).read_bytes())
    prepared = bare.with_blocks(train.read(), validation.read())
    return prepared, next(run for run in runs if run.name == name), command


class Tail:
    """The rows that are written to a metrics.jsonl from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = path.read_bytes() if path.is_file() else b""

    def new_rows(self) -> list[dict[str, Any]]:
        """What was written since the last call, whole lines only."""
        if not self.path.is_file():
            return []
        found = self.path.read_bytes()
        if not found.startswith(self._seen):  # it was cut to where the run goes on
            pairs = zip(self._seen.splitlines(keepends=True), found.splitlines(keepends=True), strict=False)
            self._seen = b"".join(old for old, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        new = found[len(self._seen) : found.rfind(b"\n") + 1]
        self._seen += new
        rows = []
        for line in new.splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and "step" in row]
