"""SIGTERM as an interrupt that can be caught, so that whoever sends it loses nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """Somebody sent SIGTERM."""


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Raise Terminated in the main thread on SIGTERM; elsewhere, where no handler can be set, change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated
