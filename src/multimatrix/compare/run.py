"""Run a comparison: every variant and seed that is not done yet, then the results, figures and report."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from multimatrix.compare import figures, report
from multimatrix.compare.folder import LOCK, State, claim, state_of
from multimatrix.compare.launch import InProcess, Launcher
from multimatrix.compare.live import Watch
from multimatrix.compare.prepare import Prepared, make_runs
from multimatrix.compare.progress import Progress
from multimatrix.compare.results import describe, gather
from multimatrix.files import write_json
from multimatrix.locks import locked

# Of the time, that rendering the report may take: where it holds up training, and where another process trains.
SHARE_IN_PROCESS, SHARE = 0.02, 0.2


def run_comparison(
    prepared: Prepared, out: Path, launcher: Launcher, *, command: str, progress: Progress
) -> dict[str, Any]:
    """Train what is missing under `out` and return the results, which are also written there.

    While runs are under way results.json and report.html are written again and again, see `live.Watch`.

    Raises:
        InputError: `out` holds a comparison of another configuration, or something that is not ours, or another
            process is at work on it.
        OSError: `out` cannot be written, for example because the disk is full; finished runs are as they were.
        KeyboardInterrupt: the results of what was finished are written first.
    """
    claim(out, prepared)  # a folder that is not ours is not touched, not even by a lock
    with locked(out / LOCK, "wait for it, or choose another --out", patience=1):
        settings = claim(out, prepared)
        runs = make_runs(prepared, out)
        missing = [run for run in runs if run.finished() is None]
        if len(missing) < len(runs):
            progress.say(f"{len(runs) - len(missing)} of {len(runs)} runs are done already")
        write_json(out / "config.json", settings)
        description = describe(prepared, runs, command, settings, launcher.sharing)

        def state(name: str, directory: Path) -> State:
            if name in watch.waiting:
                return State("waiting")
            return State("running") if name in watch.running else state_of(directory)

        def write(running: bool) -> dict[str, Any]:
            states = {f"runs/{run.name}": state(run.name, run.directory) for run in runs}
            results = gather(description, out, states, running)
            write_json(out / "results.json", results)
            report.write_report(results, out)
            return results

        def finish() -> dict[str, Any]:
            watch.waiting.clear()
            watch.running.clear()
            for run in runs:
                if state_of(run.directory).status == "done":
                    run.drop_checkpoints()  # it may have been stopped before it did
            results = write(running=False)
            report.write_csv(results, out / "results.csv")
            figures.save_figures(results, out)
            return results

        share = SHARE_IN_PROCESS if isinstance(launcher, InProcess) else SHARE
        watch = Watch(missing, progress, lambda: write(running=True), share)
        try:
            if missing:
                launcher.launch(prepared, missing, out, command, watch)
        except BaseException:
            progress.close()
            with contextlib.suppress(OSError):  # the disk may be full
                finish()
            raise
        progress.close()
        return finish()
