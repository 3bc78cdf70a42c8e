"""SIGTERM: not now, but after the step under way and a checkpoint; between runs at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as dist

from multimatrix.train import processes
from multimatrix.train.protocol import RunStopped


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Raise RunStopped in the main thread on SIGTERM; elsewhere, where no handler can be set, change nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise RunStopped("stopped by SIGTERM")

    with _handler(stop):
        yield


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM has come to any of the processes; all of them ask it together.

    Signals come to one process earlier than to another, and all must stop after the same step. They agree through
    memory of the host, so that no accelerator waits. Outside of the main thread no signal is heard. One that came too
    late to be asked for goes to `stop_on_sigterm`, where that is around.
    """
    requested = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        requested.set()

    group = None
    if processes.together() and dist.get_backend() != "gloo":
        group = dist.new_group(backend="gloo")

    def asked() -> bool:
        if not processes.together():
            return requested.is_set()
        flag = torch.tensor(int(requested.is_set()))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        return bool(flag)

    with _handler(request) as before:
        yield asked
    if requested.is_set() and callable(before):
        before(signal.SIGTERM, None)


@contextlib.contextmanager
def _handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[object]:
    """Have SIGTERM handled so; gives who handled it before."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield before
    finally:
        signal.signal(signal.SIGTERM, before)
