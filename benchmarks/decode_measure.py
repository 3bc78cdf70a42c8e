"""Measuring the cases of `decode.py`: the kernel and its peers on the same tensors, result and time together."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decode_modes import (
    PEER_TOLERANCE,
    TOLERANCE,
    Case,
    Check,
    Data,
    cache_arguments,
    keys_and_values,
    make_checks,
    make_data,
    worst_error,
)
from decode_peers import Peer
from multimatrix.errors import one_line
from multimatrix.ops.rotary import Rotation
from timing import buffer_sets, time_calls

PEER_REPLAYS = 5


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


@dataclass(frozen=True)
class Prepared:
    """A case on the device: its buffer sets, what some results must be, and R at all slots where a peer needs it."""

    case: Case
    sets: list[Data]
    checks: list[Check]
    rope: Rotation | None


def prepare(case: Case, device: torch.device, seed: int) -> Prepared:
    """The same numbers for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    sets = [make_data(case, generator) for _ in range(buffer_sets(case.bytes, device))]
    rope = None if case.rotation is None else case.rotation.at(case.context, torch.bfloat16, device)
    return Prepared(case, sets, make_checks(case, sets), rope)


@dataclass
class Bench:
    """One run of the program. kernel: `decode_attention` or its twin; rows: the JSON's, by case, as they come."""

    kernel: Callable[..., tuple[Tensor, Tensor]]
    peers: list[Peer]
    device: torch.device
    seed: int
    bandwidth: float
    budget: Budget
    replays: int
    rows: dict[Case, dict[str, Any]] = field(default_factory=dict)

    @torch.no_grad()
    def measure(self, cases: list[Case]) -> None:
        """Fill `rows` while the budget allows it."""
        fast, slow = ([peer for peer in self.peers if peer.slow == is_slow] for is_slow in (False, True))
        for seed, case in enumerate(cases, self.seed):
            if not self.budget.allows("case"):
                break
            with self.budget.step("case"):
                self._measure_case(case, seed, fast)
        # What compiles for every shape comes after everything else, on the same numbers drawn again.
        for seed, case in enumerate(cases if slow else [], self.seed):
            if case in self.rows and self.budget.allows("slow peers"):
                with self.budget.step("slow peers"):
                    self._measure_slow_peers(case, seed, slow)

    def _measure_case(self, case: Case, seed: int, peers: list[Peer]) -> None:
        try:
            prepared = prepare(case, self.device, seed)
        except Exception as error:  # there is no room, or an earlier kernel broke the device
            self._add(case, refused(one_line(error)))
            return

        def call(data: Data) -> Tensor:
            return self.kernel(data.q, **cache_arguments(case, data))[0]

        self._add(case, timed(call, prepared, TOLERANCE, self.replays))
        self._measure_peers(prepared, peers)

    def _measure_slow_peers(self, case: Case, seed: int, peers: list[Peer]) -> None:
        try:
            prepared = prepare(case, self.device, seed)
        except Exception as error:
            self.rows[case]["peers"] |= {peer.name: refused(one_line(error)) for peer in peers}
            return
        self._measure_peers(prepared, peers)

    def _measure_peers(self, prepared: Prepared, peers: list[Peer]) -> None:
        case = prepared.case
        for peer in peers:

            def call(data: Data, peer: Peer = peer) -> Tensor:
                return peer.run(data.q, *keys_and_values(case, data, prepared.rope), case.scale)

            result = refused("no time left")
            if self.budget.allows(peer.name):
                with self.budget.step(peer.name):
                    result = timed(call, prepared, PEER_TOLERANCE, PEER_REPLAYS)
            self.rows[case]["peers"][peer.name] = {**result, "share": self._share(case, result["us"])}
            say(case, peer.name, self.rows[case]["peers"][peer.name])

    def _add(self, case: Case, result: dict[str, Any]) -> None:
        us = result["us"]
        self.rows[case] = {
            "mode": case.mode,
            "m": case.heads,
            "C": case.dim,
            "V": case.value_dim,
            "batch": case.batch,
            "context": case.context,
            "shape": case.shape,
            "bytes": case.bytes,
            **result,
            "share": self._share(case, us),
            "TFLOP/s": None if us is None else case.flops / us * 1e-6,
            "peers": {},
        }
        say(case, "kernel", self.rows[case])

    def _share(self, case: Case, us: float | None) -> float | None:
        return None if us is None else case.bytes / (us * 1e-6) / self.bandwidth


def timed(call: Callable[[Data], Tensor], prepared: Prepared, tolerance: float, replays: int) -> dict[str, Any]:
    """us, us_min, us_max and error; no time where the result is wrong."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            calls = [functools.partial(call, data) for data in prepared.sets]
            outputs, times = time_calls(calls, replays, prepared.sets[0].q.device)
            error = worst_error(outputs, prepared.checks)
        except Exception as failure:
            return refused(reason_of(failure, caught))
    if not error <= tolerance:  # NaN is not
        number = error if math.isfinite(error) else None
        return {**refused(f"wrong: relative error {error:.2g}, above {tolerance:.2g}"), "error": number}
    return {"us": statistics.median(times), "us_min": min(times), "us_max": max(times), "error": error, "reason": None}


def refused(reason: str) -> dict[str, Any]:
    return {"us": None, "us_min": None, "us_max": None, "error": None, "reason": reason}


def reason_of(failure: Exception, caught: list[warnings.WarningMessage]) -> str:
    """One line. Why no backend of torch serves, it says in warnings; those that end in a colon lead to the next."""
    said = [" ".join(str(warning.message).split()).partition(" (Triggered internally")[0] for warning in caught]
    told = [text for text in dict.fromkeys(said) if not text.endswith(":")]
    return "; ".join([one_line(failure)[:200], *told])[:300]


def say(case: Case, name: str, result: dict[str, Any]) -> None:
    """Progress, a line a measurement."""
    us, share = result["us"], result["share"]
    told = result["reason"] if us is None else f"{us:,.1f} us, {100 * share:.0f} %, error {result['error']:.1e}"
    print(f"{case.label} {name}: {told}", file=sys.stderr, flush=True)


def rounded(value: Any) -> Any:
    """All floats inside to five digits: none is measured better."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
