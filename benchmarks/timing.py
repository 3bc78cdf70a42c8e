"""Time of a call per buffer set: CUDA graph replays on a GPU, a stopwatch on a CPU."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Calls = Sequence[Callable[[], Tensor]]  # one a buffer set

WARM_UPS = 3
LEAST_CALLS = 32  # of a graph, so that the gap between two replays does not count
LONGEST_REPLAY = 20_000.0  # us; a graph is longer only where one round over the buffer sets is


def buffer_sets(size: int, device: torch.device) -> int:
    """How many sets of `size` bytes exceed four times the L2 cache; 2 at least."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, 4 * cache // size + 1)


def time_calls(calls: Calls, replays: int, device: torch.device) -> tuple[list[Tensor], list[float]]:
    """Output of every call and, for every replay, microseconds a call."""
    return time_graph(calls, replays) if device.type == "cuda" else time_on_cpu(calls, replays)


def time_graph(calls: Calls, replays: int) -> tuple[list[Tensor], list[float]]:
    """One graph makes all calls, in turn and in several rounds; its replays are timed back to back.

    The outputs are those of a replay of the graph that was timed, into memory that held NaN before.
    """
    # Whatever is compiled, planned or allocated once must be so before the capture, on a stream of its own.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        began = time.perf_counter()
        for call in calls:
            call()
        stream.synchronize()
        once = (time.perf_counter() - began) * 1e6
    torch.cuda.current_stream().wait_stream(stream)
    rounds = max(1, min(math.ceil(LEAST_CALLS / len(calls)), int(LONGEST_REPLAY / once)))

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                outputs = [call() for call in calls]
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own
    times = [us / (rounds * len(calls)) for us in back_to_back(graph.replay, replays)]
    for output in outputs:
        output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return [output.clone() for output in outputs], times


def back_to_back(launch: Callable[[], object], times: int) -> list[float]:
    """Microseconds of each of some launches, after others that warm the device up.

    The host is ahead of the device, so that the device is not idle between two events.
    """
    for _ in range(WARM_UPS):
        launch()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        launch()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in itertools.pairwise(events)]


def time_on_cpu(calls: Calls, replays: int) -> tuple[list[Tensor], list[float]]:
    outputs, times = [], []
    for _ in range(replays):
        start = time.perf_counter()
        outputs = [call() for call in calls]
        times.append((time.perf_counter() - start) * 1e6 / len(calls))
    return outputs, times


def cpu_read_bandwidth() -> float:
    """Bytes per second of torch's sum; a number to divide by where no card is measured."""
    numbers = torch.randn(1 << 22)
    start = time.perf_counter()
    numbers.sum()
    return numbers.nbytes / (time.perf_counter() - start)
