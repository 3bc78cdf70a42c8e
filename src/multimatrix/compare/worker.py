"""A process that trains one run: `python -m multimatrix.compare.worker SHARED RUN`, started by `local.Local`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from multimatrix.compare.execute import DISK, PATIENCE, attempt
from multimatrix.compare.local import FAILED, read_shared
from multimatrix.train.protocol import STOPPED
from multimatrix.train.stopping import stop_on_sigterm


def main(shared: str, name: str) -> int:
    """Train the run; the exit status is 0, FAILED, STOPPED, or the errno of a disk that takes no more."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        with stop_on_sigterm():
            prepared, run, command = read_shared(Path(shared), name)
            return 0 if attempt(prepared, run, command, _ignore, print) is None else FAILED
    except KeyboardInterrupt:
        return STOPPED
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(error, file=sys.stderr)
        return error.errno


def _ignore(row: dict[str, Any]) -> None:
    """Who started us reads the rows from the file."""


def _end_with_the_parent() -> None:
    """Stop as if asked to when standard input ends, which it does when the other process has ended in whatever way."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
