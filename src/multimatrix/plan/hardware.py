"""Accelerators, and what decoding costs on them by the Step-3 report's model (arXiv 2507.19427). No torch.

    attention   max(core FLOPs / peak, KV bytes / bandwidth) + linear FLOPs / peak      seconds per token
    rest        (feed-forward + router + output head FLOPs) / peak
    dollars     seconds * price

The model is of a batch so large that reading the weights costs nothing, on an accelerator that reaches its peaks: a
lower bound, good for comparing, not a forecast. The report counts with an 8 bit cache and the peak of FP8 where the
accelerator has it; `storing` gives the peak of other widths.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from multimatrix.errors import InputError
from multimatrix.plan.model import DecodeCost

logger = logging.getLogger(__name__)

LARGEST_RATE = 1e24  # far beyond any machine; times and prices stay finite


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One accelerator: dollars per hour, peak FLOPs and bytes per second, and bytes of memory.

    flops_per_second: the peak that is counted with. bf16_..., fp8_... and fp4_flops_per_second: those of dense matrix
    products by the width of their operands. A rate is None where it is not known or not there, and so is a price.

    Raises:
        InputError: a number is not positive, a rate or the memory is below 1, or one is beyond LARGEST_RATE.
    """

    name: str
    title: str
    dollars_per_hour: float | None = None
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: float
    bf16_flops_per_second: float | None = None
    fp8_flops_per_second: float | None = None
    fp4_flops_per_second: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, str):
                continue
            if not 0 < value <= LARGEST_RATE or (value < 1 and field.name != "dollars_per_hour"):
                least = "above 0" if field.name == "dollars_per_hour" else "at least 1"
                raise InputError(
                    f"{field.name} of {self.name} must be {least} and at most {LARGEST_RATE:.0e}, got {value:g}"
                )

    def computing(self, bits: int) -> Hardware:
        """The accelerator with its peak of products whose operands have so many bits, or of the next wider ones.

        One whose rates are not known stays as it is.
        """
        rates = {4: self.fp4_flops_per_second, 8: self.fp8_flops_per_second, 16: self.bf16_flops_per_second}
        fitting = [rate for width, rate in rates.items() if rate is not None and width >= bits]
        return dataclasses.replace(self, flops_per_second=fitting[0]) if fitting else self

    def storing(self, bits: int) -> Hardware:
        """The accelerator with its peak on numbers that are stored with so many bits; below 8 they are widened to 8."""
        return self.computing(max(bits, 8))

    def peak(self, bits: int) -> float:
        """FLOPs per second of `storing`."""
        return self.storing(bits).flops_per_second

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

    def dollars(self, seconds: float) -> float | None:
        """The price of so many seconds for each of a million tokens; None where no price is known."""
        return None if self.dollars_per_hour is None else seconds * 1e6 * self.dollars_per_hour / 3600

    def row(self, cost: DecodeCost) -> dict[str, Any]:
        """The numbers of one plan, under plain names; dollars are those of a million tokens."""
        return {
            "hardware": self.name,
            "title": self.title,
            "memory_bytes": self.memory_bytes,
            "bytes_per_second": self.bytes_per_second,
            "dollars_per_hour": self.dollars_per_hour,
            "roofline": self.roofline,
            "bound": self.bound(cost),
            "attention_dollars": self.dollars(self.attention_seconds(cost)),
            "other_dollars": self.dollars(self.other_seconds(cost)),
        }


@functools.cache
def hardware_table() -> dict[str, Hardware]:
    """The accelerators that ship with the package, by name; every number's source is in recipes/hardware.toml.

    Their flops_per_second is that of FP8, or of BF16 where there is no FP8, as the Step-3 report takes it.
    """
    chips = {}
    for name, row in _rows().items():
        numbers = {key: entry["value"] for key, entry in row.items() if key not in ("title", "device_names")}
        peak = numbers.get("fp8_flops_per_second", numbers["bf16_flops_per_second"])
        chips[name] = Hardware(name=name, title=row["title"], flops_per_second=peak, **numbers)
    return chips


@functools.cache
def bf16_peak(device_name: str) -> float | None:
    """FLOPs per second of dense bfloat16 products; None for a device that is not in the table, which is said once.

    device_name: as torch.cuda.get_device_name() gives it.
    """
    for row in _rows().values():
        if device_name in row.get("device_names", ()):
            return row["bf16_flops_per_second"]["value"]
    logger.warning("no model FLOP utilization: the peak of %s is not in recipes/hardware.toml", device_name)
    return None


@functools.cache
def _rows() -> dict[str, dict[str, Any]]:
    file = resources.files("multimatrix") / "recipes" / "hardware.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))["hardware"]


def find_hardware(names: list[str]) -> list[Hardware]:
    """These accelerators; InputError with the known names where there is none of a name."""
    known = hardware_table()
    for name in names:
        if name not in known:
            raise InputError(f"there is no hardware {name!r} in the table; it has {', '.join(known)}")
    return [known[name] for name in names]
