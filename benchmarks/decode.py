"""Time of a decode step over a long cache, as a share of what the card can read, beside its peers.

    PYTHONPATH=src python benchmarks/decode.py                  the table: m = 64, C = 256, four modes, six shapes
    PYTHONPATH=src python benchmarks/decode.py --full --budget 540 --markdown decode.md
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
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from decode_measure import Bench, Budget, rounded
from decode_modes import MODES, make_cases, parse_shape
from decode_peers import peers
from decode_report import markdown, print_tables
from multimatrix.environment import environment
from multimatrix.files import write_text
from multimatrix.ops.decode import decode_attention, plain_decode_attention
from timing import cpu_read_bandwidth

SHAPES = "1x32k,1x128k,16x8k,64x8k,128x4k,8x128k"
QUICK_SHAPES = "1x32k,16x8k,64x8k"
REPLAYS = 15


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    budget = Budget(options.budget)
    device = torch.device("cpu" if options.smoke else "cuda")
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    cases = make_cases(options.modes, options.m, options.dim, options.shapes, options.smoke)
    bandwidth = bandwidth_of(device, seed)
    print(f"read bandwidth {bandwidth / 1e9:,.1f} GB/s", file=sys.stderr, flush=True)
    kernel = plain_decode_attention if options.smoke else decode_attention
    available = [] if options.no_peers else peers(device)
    bench = Bench(kernel, available, device, seed, bandwidth, budget, options.replays)
    bench.measure(cases)

    report = rounded(
        {
            **where_from(device, options.commit),
            "command": shlex.join(["python", "benchmarks/decode.py", *given]),
            "seed": seed,
            "read_bandwidth_gb_per_s": bandwidth / 1e9,
            "stopped_by_budget": budget.is_spent,
            "not_measured": [case.label for case in cases if case not in bench.rows],
            "rows": list(bench.rows.values()),
        }
    )
    print_tables(report)
    failed = {case: row["reason"] for case, row in bench.rows.items() if row["us"] is None}
    for case, reason in failed.items():
        print(f"decode.py: the kernel has no time at {case.label}: {reason}", file=sys.stderr, flush=True)
    print(json.dumps(report, allow_nan=False))
    if options.markdown is not None:
        write_text(options.markdown, markdown(report))
    return 1 if failed else 0


def parse(arguments: list[str]) -> argparse.Namespace:
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
        "platform": known["platform"],
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
