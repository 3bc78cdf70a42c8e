"""Decoding and prefill on given devices: time, what bounds it, what fits, and its price. No torch.

One decode step gives each of B sequences at a context of T one token. A device of a `Layout` keeps b = ceil(B /
attention groups) of them and works, beside them, on r = ceil(B / data) tokens cut into `shards`. The step has three
parts, one after the other; each takes the longer of its arithmetic and its memory:

    part     FLOPs of a device                                 bytes of a device
    core     b (attention core) / tensor                       b (KV bytes of its key heads, scales included)
    linear   2 b (its weights, and extra products / tensor)    its attention weights
    rest     r (feed-forward, router, head) / shards           (weights that r tokens meet) / shards

    seconds = sum over parts of max(FLOPs / peak, bytes / bandwidth) / efficiency

The peak is that of operands as narrow as what is stored, 8 bit at the least: of the cache for the core, of the weights
elsewhere. r tokens that each take K of E experts at random meet E (1 - (1 - K / E)^r) of them. Nothing else is counted:
no communication, no norms, no activations, no idle time; so this is a lower bound.

    memory for the cache   (1 - workspace) memory - weights of a device
    largest batch          groups * floor(that / stored KV bytes of a sequence at T)
    longest context        the longest whose stored KV bytes for ceil(B / groups) sequences fit

Prefill of one prompt is max(FLOPs / (peak * shards), weights / bandwidth). Its FLOPs are those of
`forms.prefill_flops`, feed-forward and router for every token, and the output head for the last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from multimatrix.errors import InputError
from multimatrix.plan.forms import crossing, prefill_flops
from multimatrix.plan.hardware import Hardware
from multimatrix.plan.model import (
    KV_BITS,
    LONGEST_CONTEXT,
    DecodeCost,
    DecoderSizes,
    check_count,
    decode_cost,
    stored_kv_bytes,
)
from multimatrix.plan.parallel import Kind, Layout, attention_share, check_layout, cuts, kinds, runs, weights_per_device

Bound = Literal["memory", "arithmetic"]
LONGEST = 2**40  # contexts beyond this are called unlimited
MOST_SEARCHED = 4096  # devices
MOST_SEQUENCES = 10**15


@dataclass(frozen=True)
class Work:
    """Seconds of one device's arithmetic and of its memory."""

    arithmetic: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.memory)

    @property
    def bound(self) -> Bound:
        """What takes longer."""
        return "memory" if self.arithmetic < self.memory else "arithmetic"


@dataclass(frozen=True)
class Serving:
    """A model on devices of one kind.

    page_size: tokens of a page of the cache. workspace: the share of a device's memory that is neither weights nor
    cache. efficiency: the share of peak and bandwidth that is reached.

    Raises:
        InputError: a number of bits, a share or the layout cannot be.
    """

    sizes: DecoderSizes
    chip: Hardware
    layout: Layout
    kv_bits: int = 16
    weight_bits: int = 16
    page_size: int = 1
    workspace: float = 0.1
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        if self.weight_bits not in KV_BITS:
            raise InputError(f"a weight has 16, 8 or 4 bits, got {self.weight_bits}")
        if not 0 <= self.workspace < 1:
            raise InputError(f"the workspace must be at least 0 % and below 100 %, got {100 * self.workspace:g} %")
        if not 0.001 <= self.efficiency <= 1:
            raise InputError(f"the efficiency must be from 0.1 % to 100 %, got {100 * self.efficiency:g} %")
        check_layout(self.sizes, self.layout)

    @property
    def bits(self) -> list[int]:
        """Of the operands of weights and cache, each once: 8 at the least."""
        return sorted({max(8, bits) for bits in (self.weight_bits, self.kv_bits)}, reverse=True)

    # ---- time -------------------------------------------------------------------------------------------------

    def step(self, batch: int, context: int) -> dict[str, Work]:
        """The parts of one decode step on the busiest device."""
        check_count("the batch", batch, MOST_SEQUENCES)
        layout, fixed = self.layout, self._fixed
        sequences, tokens = layout.sequences(batch), math.ceil(batch / layout.data)
        costs = [(kind, decode_cost(kind.layer, context, self.kv_bits)) for kind in self._kinds]
        core = sum(kind.count * cost.attention_core_flops for kind, cost in costs)
        read = sum(kind.count * kind.share * (cost.kv_bytes + cost.kv_scale_bytes) for kind, cost in costs)
        rest = fixed.feed_forward_flops + fixed.router_flops + fixed.output_head_flops
        met = self._feed_forward_met(tokens) + (fixed.router_flops + fixed.output_head_flops) / 2  # a weight, two FLOPs
        return {
            "core": self._work(sequences * core / layout.tensor, float(sequences * read), self.kv_bits),
            "linear": self._weight_work(2 * sequences * self._linear_products, self._weights["attention"]),
            "rest": self._weight_work(tokens * rest / layout.shards, met / layout.shards),
        }

    def _work(self, flops: float, bytes_: float, bits: int) -> Work:
        peak, bandwidth = self.chip.peak(bits), self.chip.bytes_per_second
        return Work(flops / peak / self.efficiency, bytes_ / bandwidth / self.efficiency)

    def _weight_work(self, flops: float, weights: float) -> Work:
        return self._work(flops, weights * self.weight_bits / 8, self.weight_bits)

    @functools.cached_property
    def _kinds(self) -> list[Kind]:
        return kinds(self.sizes, self.layout)

    @functools.cached_property
    def _fixed(self) -> DecodeCost:
        """The cost of a token, of which what does not depend on the context is used."""
        return decode_cost(self.sizes, 1, self.kv_bits)

    @functools.cached_property
    def _linear_products(self) -> float:
        """Multiply-adds of the attention's linear maps on a device, for each token."""
        return sum(
            (attention_share(spec, self.layout, linear=True) + spec.extra_decode_products / self.layout.tensor) * count
            for spec, _, count in runs(self.sizes)
        )

    def _feed_forward_met(self, tokens: int) -> float:
        """Feed-forward weights that at least one of so many tokens takes, of every layer."""
        active, all_ = self._feed_forward
        experts = self.sizes.experts
        if experts is None or experts.num_experts == experts.experts_per_token:
            return active
        number, taken = experts.num_experts, experts.experts_per_token
        one = (all_ - active) / (number - taken)  # an expert, in all its layers
        return active + (number * (1 - (1 - taken / number) ** tokens) - taken) * one

    @functools.cached_property
    def _feed_forward(self) -> tuple[int, int]:
        """Weights that one token takes, and all."""
        return self.sizes.parts(active=True)["feed_forward"], self.sizes.parts()["feed_forward"]

    def prefill(self, context: int) -> Work:
        """One prompt of so many tokens, on each device of one copy of the model."""
        flops = prompt_flops(self.sizes, context) / self.layout.shards
        return self._weight_work(flops, sum(self._weights.values()))

    # ---- memory -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def _weights(self) -> dict[str, int]:
        return weights_per_device(self.sizes, self.layout)

    @property
    def weight_bytes(self) -> int:
        """Of one device."""
        return math.ceil(sum(self._weights.values()) * self.weight_bits / 8)

    @property
    def cache_memory(self) -> float:
        """Bytes of one device that are left for the cache; negative where the weights do not fit."""
        return self.chip.memory_bytes * (1 - self.workspace) - self.weight_bytes

    def kv_bytes_per_sequence(self, context: int) -> int:
        """Stored for one sequence, on one device of those that keep it."""
        return math.ceil(
            sum(
                kind.count * kind.share * stored_kv_bytes(kind.layer, context, self.kv_bits, self.page_size)
                for kind in self._kinds
            )
        )

    def fits(self, batch: int, context: int) -> bool:
        return self.layout.sequences(batch) * self.kv_bytes_per_sequence(context) <= self.cache_memory

    def largest_batch(self, context: int) -> int:
        """Sequences of so many tokens whose cache fits on all devices together; 0 where none does."""
        if self.cache_memory <= 0:
            return 0
        each = int(self.cache_memory // self.kv_bytes_per_sequence(context))
        return min(MOST_SEQUENCES, self.layout.attention_groups * each)

    def longest_context(self, batch: int) -> int:
        """The longest context at which so many sequences fit; 0 where none does, LONGEST where nothing bounds it."""
        first_too_long = crossing(lambda context: not self.fits(batch, context), 1, LONGEST)
        return LONGEST if first_too_long is None else first_too_long - 1

    # ---- as rows ----------------------------------------------------------------------------------------------

    def prediction(self, batch: int, context: int) -> dict[str, Any]:
        """Time and price of decoding so many sequences at once; None for both where they do not fit."""
        fits, step = self.fits(batch, context), self.step(batch, context)
        seconds = sum(work.seconds for work in step.values()) if fits else None
        return {
            "batch": batch,
            "context": context,
            "fits": fits,
            "seconds_per_token": seconds,
            "tokens_per_second": seconds and batch / seconds,
            "dollars_per_million_tokens": seconds and self.chip.dollars(seconds * self.layout.devices / batch),
            "bound": _whole(step).bound,
            **{f"{name}_bound": work.bound for name, work in step.items()},
            **{f"{name}_seconds": work.seconds for name, work in step.items()},
        }

    def bound_changes(self, batch: int | None, low: int, high: int) -> int | None:
        """The least context of low..high at which a step waits for something else than at `low`; None for none.

        batch: None for the largest that fits.
        """

        def bound(context: int) -> Bound:
            return _whole(self.step(batch or max(1, self.largest_batch(context)), context)).bound

        first = bound(low)
        return crossing(lambda context: bound(context) != first, low, high)


def _whole(step: dict[str, Work]) -> Work:
    """The parts of a step together."""
    return Work(sum(work.arithmetic for work in step.values()), sum(work.memory for work in step.values()))


def prompt_flops(sizes: DecoderSizes, context: int) -> int:
    """FLOPs of the prefill of one prompt: every layer for every token, the output head for the last."""
    check_count("the context", context, LONGEST_CONTEXT)
    parts = sizes.parts(active=True)
    attention = sum(prefill_flops(spec, context, window) * count for spec, window, count in runs(sizes))
    return (
        attention + 2 * context * (parts["feed_forward"] + parts["router"]) + 2 * sizes.vocab_size * sizes.hidden_size
    )


def least_layout(
    sizes: DecoderSizes,
    chip: Hardware,
    batch: int,
    context: int,
    *,
    at_least: int = 1,
    roomy: bool = False,
    **settings: Any,
) -> Serving | None:
    """The serving with the fewest devices, a power of two, on which so many sequences fit; None where none does.

    at_least: devices, a power of two. roomy: only such as have at least as much memory for the cache as for weights.
    Of the cuts of that many devices into tensor and attention-data parallelism the one with the largest batch is
    taken, of equals the one with more tensor parallelism.
    """
    devices = at_least
    while devices <= MOST_SEARCHED:
        found = [
            serving
            for serving in _cuts(sizes, chip, devices, settings)
            if serving.fits(batch, context) and not (roomy and serving.cache_memory < serving.weight_bytes)
        ]
        if found:
            return max(found, key=lambda serving: (serving.largest_batch(context), serving.layout.tensor))
        devices *= 2
    return None


def _cuts(sizes: DecoderSizes, chip: Hardware, devices: int, settings: dict[str, Any]) -> Iterator[Serving]:
    tensor = 1
    while tensor <= devices:
        layout = Layout(tensor=tensor, attention_data=devices // tensor)
        if cuts(sizes, layout):
            yield Serving(sizes, chip, layout, **settings)
        tensor *= 2
