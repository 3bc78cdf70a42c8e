"""Time of a decode step over a long cache, as a share of what the card can read, beside its peers.

    PYTHONPATH=src python benchmarks/decode.py                  the table: m = 64, C = 256, four modes, six shapes
    PYTHONPATH=src python benchmarks/decode.py --full --budget 540 --markdown results/decode.md
    PYTHONPATH=src python benchmarks/decode.py --quick --modes key --m 16,64
    PYTHONPATH=src python benchmarks/decode.py --smoke          tiny, on a CPU, the plain twin in the kernel's place

Every time is the median of CUDA graph replays. A graph runs the kernel once for every buffer set, in turn; the sets
hold fresh normal numbers and exceed four times the L2 cache together. The bytes of a call are those its cache stores,
scales of an FP8 cache included, each counted once, also for peers that read or write more. The share is of the card's
read bandwidth, which is measured first. Peers run in the same process on the same tensors; what they need made of the
cache first (keys rotated, numbers dequantized) they make in the timed call.

No time without its result: what the timed graph wrote, into memory that held NaN, is compared with
`plain_decode_attention` in float64 on the first and last sequence of the first and last buffer set. A kernel that is
wrong anywhere has no time and ends the program with status 1. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decode_cases import (
    MODES,
    PEER_TOLERANCE,
    TOLERANCE,
    Case,
    Check,
    Data,
    cache_arguments,
    keys_and_values,
    make_cases,
    make_checks,
    make_data,
    parse_shape,
    worst_error,
)
from decode_peers import Peer, peers
from decode_report import markdown, print_tables
from multimatrix.environment import environment
from multimatrix.errors import one_line
from multimatrix.files import write_text
from multimatrix.ops.decode import decode_attention, plain_decode_attention
from timing import buffer_sets, cpu_read_bandwidth, time_calls

SHAPES = "1x32k,1x128k,16x8k,64x8k,128x4k,8x128k"
QUICK_SHAPES = "1x32k,16x8k,64x8k"
REPLAYS, PEER_REPLAYS = 15, 5


class Budget:
    """A step starts only if the longest of its kind so far would still end in time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.longest: dict[str, float] = {}
        self.is_spent = False

    def allows(self, kind: str) -> bool:
        allowed = time.monotonic() + self.longest.get(kind, 0.0) < self.end
        self.is_spent |= not allowed
        return allowed

    @contextlib.contextmanager
    def step(self, kind: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - start)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = parse(arguments)
    budget = Budget(options.budget)
    device = torch.device("cpu" if options.smoke else "cuda")
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    cases = make_cases(options.modes, options.m, options.dim, options.shapes, options.smoke)
    bandwidth = bandwidth_of(device, seed)
    print(f"read bandwidth {bandwidth / 1e9:,.1f} GB/s", file=sys.stderr)
    run = plain_decode_attention if options.smoke else decode_attention
    available = [] if options.no_peers else peers(device)

    rows: dict[Case, dict[str, Any]] = {}
    # Slow peers come after everything else, on the same numbers drawn again.
    for stage in ("kernel", "slow peers"):
        for index, case in enumerate(cases):
            chosen = [peer for peer in available if peer.slow == (stage == "slow peers")]
            if stage == "slow peers" and (case not in rows or not chosen):
                continue
            if not budget.allows(stage):
                break
            with budget.step(stage), torch.no_grad():
                generator = torch.Generator(device).manual_seed(seed + index)
                try:
                    sets = [make_data(case, generator) for _ in range(buffer_sets(case.bytes, device))]
                    checks = make_checks(case, sets)
                except Exception as error:  # the device has no room, or an earlier kernel broke it
                    rows.setdefault(case, row_of(case, {"us": None, "error": None, "reason": one_line(error)}, 0.0))
                    continue
                if stage == "kernel":
                    result = measure(kernel_call(run, case), sets, checks, TOLERANCE, options.replays)
                    rows[case] = row_of(case, result, bandwidth)
                    say(case, "kernel", rows[case])
                measure_peers(case, chosen, sets, checks, bandwidth, budget, rows[case]["peers"])
            del sets, checks

    report = {
        **where_from(device, options.commit),
        "command": shlex.join(["python", *sys.argv] if arguments is None else ["python", __file__, *arguments]),
        "seed": seed,
        "read_bandwidth_gb_per_s": bandwidth / 1e9,
        "stopped_by_budget": budget.is_spent,
        "not_measured": [f"{case.mode} m={case.heads} C={case.dim} {case.shape}" for case in cases if case not in rows],
        "rows": list(rows.values()),
    }
    print_tables(report)
    if options.markdown is not None:
        write_text(options.markdown, markdown(report))
    failed = [row for row in report["rows"] if row["us"] is None]
    for row in failed:
        shape = f"{row['mode']} m={row['m']} C={row['C']} {row['shape']}"
        print(f"decode.py: the kernel has no time at {shape}: {row['reason']}", file=sys.stderr)
    print(json.dumps(report, allow_nan=False))
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--modes", type=list_of(mode), help=f"of {', '.join(MODES)}; by default all but mla")
    add("--m", type=list_of(positive), help="query heads, 64 by default; mla has its own")
    add("--dim", type=list_of(positive), help="head dim C, 256 by default; mla has its own")
    add("--shapes", type=list_of(parse_shape), help=f"batch x context, by default {SHAPES}")
    add("--full", action="store_true", help="every mode, m in 16, 64, 128 and C in 128, 256, 512")
    add("--quick", action="store_true", help=f"no peers; shapes {QUICK_SHAPES} by default")
    add("--no-peers", action="store_true", help="the kernel alone")
    add("--replays", type=positive, default=REPLAYS, help=f"timed graph replays of the kernel, {REPLAYS} by default")
    add("--budget", type=float, default=math.inf, help="seconds after which nothing more is started")
    add("--seed", type=int, help="of the random numbers; by default another one every time, which is reported")
    add("--commit", help="what is measured, where this is no git checkout")
    add("--markdown", type=Path, help="write the tables to this file too")
    add("--smoke", action="store_true", help="tiny shapes on the CPU, times mean nothing")
    options = parser.parse_args(arguments)
    small = options.smoke
    modes = list(MODES) if options.full else [name for name in MODES if name != "mla"]
    heads, dims = ([16, 64, 128], [128, 256, 512]) if options.full else ([64], [256])
    shapes = "2x48,3x64" if small else QUICK_SHAPES if options.quick else SHAPES
    options.modes = options.modes or modes
    options.m = options.m or ([4] if small else heads)
    options.dim = options.dim or ([32] if small else dims)
    options.shapes = options.shapes or [parse_shape(text) for text in shapes.split(",")]
    options.no_peers |= options.quick
    if not small and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke runs on a CPU")
    return options


def list_of(of_one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values separated by commas."""

    def parse_list(text: str) -> list[Any]:
        try:
            return [of_one(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_list


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a positive number is needed, got {text!r}")
    return int(text)


def mode(text: str) -> str:
    if text not in MODES:
        raise ValueError(f"there is no mode {text!r}; the modes are {', '.join(MODES)}")
    return text


def bandwidth_of(device: torch.device, seed: int) -> float:
    """Bytes per second."""
    if device.type == "cpu":
        return cpu_read_bandwidth()
    from read_bandwidth import read_bandwidth

    return read_bandwidth(device, torch.Generator(device).manual_seed(seed))


def kernel_call(run: Callable[..., tuple[Tensor, Tensor]], case: Case) -> Callable[[Data], Tensor]:
    return lambda data: run(data.q, **cache_arguments(case, data))[0]


def peer_call(peer: Peer, case: Case, device: torch.device) -> Callable[[Data], Tensor]:
    """The peer on what it needs made of the cache; cosines and sines are there before."""
    rope = None if case.rotation is None else case.rotation.at(case.context, torch.bfloat16, device)
    return lambda data: peer.run(data.q, *keys_and_values(case, data, rope), case.scale)


def measure(
    call: Callable[[Data], Tensor], sets: list[Data], checks: list[Check], tolerance: float, replays: int
) -> dict[str, Any]:
    """us, us_min, us_max and error; or us None and the reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            calls = [functools.partial(call, data) for data in sets]
            outputs, times = time_calls(calls, replays, sets[0].q.device)
            error = worst_error(outputs, checks)
        except Exception as failure:
            said = [one_line(warning.message) for warning in caught if isinstance(warning.message, UserWarning)]
            reason = "; ".join([one_line(failure), *dict.fromkeys(said)])
            return {"us": None, "error": None, "reason": reason}
    if not error <= tolerance:  # NaN is not
        number = error if math.isfinite(error) else None
        return {"us": None, "error": number, "reason": f"wrong: relative error {error:.2g}, above {tolerance:.2g}"}
    return {"us": statistics.median(times), "us_min": min(times), "us_max": max(times), "error": error, "reason": None}


def row_of(case: Case, result: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    """One entry of the JSON's rows."""
    us = result["us"]
    return {
        "mode": case.mode,
        "m": case.heads,
        "C": case.dim,
        "V": case.value_dim,
        "batch": case.batch,
        "context": case.context,
        "shape": case.shape,
        "bytes": case.bytes,
        **result,
        "share": None if us is None else case.bytes / (us * 1e-6) / bandwidth,
        "TFLOP/s": None if us is None else case.flops / us * 1e-6,
        "peers": {},
    }


def measure_peers(
    case: Case,
    chosen: list[Peer],
    sets: list[Data],
    checks: list[Check],
    bandwidth: float,
    budget: Budget,
    results: dict[str, Any],
) -> None:
    for peer in chosen:
        if not budget.allows(peer.name):
            results[peer.name] = {"us": None, "error": None, "reason": "no time left"}
            continue
        with budget.step(peer.name):
            result = measure(peer_call(peer, case, sets[0].q.device), sets, checks, PEER_TOLERANCE, PEER_REPLAYS)
        us = result["us"]
        results[peer.name] = {**result, "share": None if us is None else case.bytes / (us * 1e-6) / bandwidth}
        say(case, peer.name, results[peer.name])


def say(case: Case, name: str, result: dict[str, Any]) -> None:
    """Progress, a line a measurement."""
    us, share = result["us"], result["share"]
    told = result["reason"] if us is None else f"{us:,.1f} us, {100 * share:.0f} %, error {result['error']:.1e}"
    print(f"{case.mode} m={case.heads} C={case.dim} {case.shape} {name}: {told}", file=sys.stderr, flush=True)


def where_from(device: torch.device, commit: str | None) -> dict[str, Any]:
    """card, commit, date and versions."""
    known = environment(device)
    versions = {name: known[name] for name in ("multimatrix", "torch", "python")}
    if device.type == "cuda":
        import triton

        versions |= {"triton": triton.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "card": known["device"],
        "commit": commit or known["commit"],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "platform": platform.platform(),
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
