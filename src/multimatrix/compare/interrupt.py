"""SIGTERM as an interrupt that can be caught, so that whoever sends it loses nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from multimatrix.train.protocol import RunStopped


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Raise RunStopped in the main thread on SIGTERM; elsewhere, where no handler can be set, change nothing.

    A run that is trained in this process takes the signal over meanwhile, and raises the same after a checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise RunStopped("stopped by SIGTERM")
