"""SIGTERM: not now, but after the step under way and a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as dist

from multimatrix.train import processes


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM has come to any of the processes; all of them ask it together.

    Signals come to one process earlier than to another, and all must stop after the same step. They agree through
    memory of the host, so that no accelerator waits. Outside of the main thread no signal is heard.
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

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, request)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
