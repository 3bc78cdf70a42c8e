"""Accelerators, and what decoding costs on them by the Step-3 report's model (arXiv 2507.19427). No torch.

    attention   max(core FLOPs / peak, KV bytes / bandwidth) + linear FLOPs / peak      seconds per token
    rest        (feed-forward + router + output head FLOPs) / peak
    dollars     seconds * price

The model is of a batch so large that reading the weights costs nothing, on an accelerator that reaches its peaks: a
lower bound, good for comparing, not a forecast.
"""

from __future__ import annotations

import functools
import logging
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from multimatrix.errors import InputError
from multimatrix.plan.model import DecodeCost

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardware:
    """One accelerator: dollars per hour, peak FLOPs and bytes per second."""

    name: str
    title: str
    dollars_per_hour: float
    flops_per_second: float
    bytes_per_second: float

    @property
    def roofline(self) -> float:
        """FLOPs per byte at which arithmetic takes as long as memory."""
        return self.flops_per_second / self.bytes_per_second

    def bound(self, cost: DecodeCost) -> Literal["memory", "arithmetic"]:
        """What the attention core waits for."""
        return "memory" if cost.arithmetic_intensity < self.roofline else "arithmetic"

    def attention_seconds(self, cost: DecodeCost) -> float:
        """Of one decoded token's attention, its linear maps included."""
        core = max(cost.attention_core_flops / self.flops_per_second, cost.kv_bytes / self.bytes_per_second)
        return core + cost.linear_flops / self.flops_per_second

    def other_seconds(self, cost: DecodeCost) -> float:
        """Of everything else that one decoded token takes."""
        return (cost.feed_forward_flops + cost.router_flops + cost.output_head_flops) / self.flops_per_second

    def dollars(self, seconds: float) -> float:
        """The price of so many seconds for each of a million tokens."""
        return seconds * 1e6 * self.dollars_per_hour / 3600

    def row(self, cost: DecodeCost) -> dict[str, Any]:
        """The numbers of one plan, under plain names; dollars are those of a million tokens."""
        return {
            "hardware": self.name,
            "title": self.title,
            "roofline": self.roofline,
            "bound": self.bound(cost),
            "attention_dollars": self.dollars(self.attention_seconds(cost)),
            "other_dollars": self.dollars(self.other_seconds(cost)),
        }


@functools.cache
def hardware_table() -> dict[str, Hardware]:
    """The accelerators that have a price, by name; every number's source is in recipes/hardware.toml."""
    numbers = ("dollars_per_hour", "flops_per_second", "bytes_per_second")
    return {
        name: Hardware(name, row["title"], *(row[key]["value"] for key in numbers))
        for name, row in _rows().items()
        if "dollars_per_hour" in row
    }


@functools.cache
def bf16_peak(device_name: str) -> float | None:
    """FLOPs per second of dense bfloat16 products; None for a device that is not in the table, which is said once.

    device_name: as torch.cuda.get_device_name() gives it.
    """
    for row in _rows().values():
        if device_name in row.get("device_names", ()):
            return row["dense_bf16_flops_per_second"]["value"]
    logger.warning("no model FLOP utilization: the peak of %s is not in recipes/hardware.toml", device_name)
    return None


@functools.cache
def _rows() -> dict[str, dict[str, Any]]:
    file = resources.files("multimatrix") / "recipes" / "hardware.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def find_hardware(names: list[str]) -> list[Hardware]:
    """These accelerators; InputError with the known names where there is none of a name."""
    known = hardware_table()
    for name in names:
        if name not in known:
            raise InputError(f"there is no hardware {name!r} in the table; it has {', '.join(known)}")
    return [known[name] for name in names]
