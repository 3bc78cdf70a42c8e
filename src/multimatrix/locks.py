"""A lock on a folder that work goes on in: a file beside the work, which the system lets go when its holder ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from multimatrix.errors import InputError


@contextlib.contextmanager
def locked(
    path: Path, way_out: str, patience: float = 0, waiting: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold the lock file `path`; it is gone afterwards, and free when this process is killed.

    patience: seconds to wait for another process to let go, -1 for as long as it takes. waiting: called once where
    it has to wait.

    Raises:
        InputError: another process holds it, which the sentence names, before `way_out`.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire(timeout=patience)
    except Timeout:
        raise InputError(f"another process{_holder(path)} is at work in {path.parent}; {way_out}") from None
    try:
        path.write_text(f"{os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits sees that it is gone, and makes a new one
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock file."""
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    path.unlink(missing_ok=True)  # it was left by a process that was killed
    lock.release()
    return False


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        if found := path.read_text(encoding="utf-8").strip():
            return f" ({found})"
    return ""
