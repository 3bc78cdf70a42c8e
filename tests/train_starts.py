"""Starts of `multimatrix train` that are killed, for `test_train_killed.py`.

Each start is a fork of this process, so that torch is imported once. The arguments are JSON: the words of the command,
and a list of starts. A start is a moment, `[NAME, STEP]`, at which it kills itself, or a number of seconds after which
it is killed, or null for one that runs to its end. Prints the exit status of every start, negative where a signal ended
it; the first one that ends well is the last.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch.distributed.checkpoint as dcp

from multimatrix import cli
from multimatrix.train import checkpoints, command  # noqa: F401
from multimatrix.train.metrics import MetricsFile


def kill_at(moment: str, step: int) -> None:
    """Have this process kill itself at a moment of its checkpoint of a step, or before the row of a step."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: object, name: str, matches) -> None:
        original = getattr(owner, name)

        def replaced(*args, **words):
            if matches(*args, **words):
                kill()
            return original(*args, **words)

        setattr(owner, name, replaced)

    temporary = f".step-{step}.writing"
    match moment:
        case "row":
            before(MetricsFile, "write", lambda self, row: row["step"] == step)
        case "cut row":

            def half(self, row):
                if row["step"] == step:
                    self._file.write(json.dumps(row).encode()[:20])
                    self._file.flush()
                    kill()
                write(self, row)

            write, MetricsFile.write = MetricsFile.write, half
        case "before state":
            before(dcp, "save", lambda *args, storage_writer, **words: temporary in str(storage_writer.path))
        case "before manifest":
            before(checkpoints, "write_json", lambda path, value: temporary in str(path))
        case "before rename":
            before(Path, "rename", lambda self, target: self.name == temporary)
        case "while deleting":  # half of an old checkpoint is gone
            original = shutil.rmtree

            def stop_halfway(path, *args, **words):
                if Path(path).name == f".step-{step}.old" and Path(path).exists():
                    shutil.move(Path(path) / "manifest.json", Path(path) / "gone")
                    kill()
                original(path, *args, **words)

            shutil.rmtree = stop_halfway
        case _:
            raise ValueError(moment)


def start(words: list[str], how: list | float | None) -> int:
    child = os.fork()
    if child == 0:
        if isinstance(how, list):
            kill_at(*how)
        sys.argv = ["multimatrix", *words]
        try:
            cli.main()
            status = 0
        except SystemExit as exit_:
            status = exit_.code or 0
        sys.stderr.flush()
        os._exit(status)
    if isinstance(how, int | float):
        time.sleep(how)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for how in json.loads(sys.argv[2]):
        status = start(json.loads(sys.argv[1]), how)
        print(status, flush=True)
        if status == 0:
            break
