"""What each device holds under tensor, attention-data and data parallelism. No torch.

A layout is three factors, and their product is the number of devices:

    tensor          cuts heads, feed-forward, experts, embeddings and output head
    attention_data  attention is whole in each, for sequences of its own; everything else is cut further
    data            whole copies of all of the above

Tensor parallelism cuts the axis of a weight that is made of heads and replicates the rest (`Weight.heads`). A cache is
cut by its key heads: a device holds ceil(G / tensor) of G, so a single key head lies on every device.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from multimatrix.attention import AttentionSpec
from multimatrix.errors import InputError
from multimatrix.fields import nearest_divisor
from multimatrix.plan.model import DecoderSizes, check_count

MOST_DEVICES = 100_000


@dataclass(frozen=True)
class Layout:
    """How many ways attention is cut (tensor), attention is copied (attention_data) and the model is copied (data)."""

    tensor: int = 1
    attention_data: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            check_count(f"the number of ways of {field.replace('_', ' ')} parallelism", value, MOST_DEVICES)
        if self.devices > MOST_DEVICES:
            raise InputError(
                f"{' x '.join(str(ways) for ways in vars(self).values())} are {self.devices:,} devices; they must be "
                f"at most {MOST_DEVICES:,}"
            )

    @property
    def devices(self) -> int:
        return self.tensor * self.attention_data * self.data

    @property
    def attention_groups(self) -> int:
        """Groups of devices that have sequences of their own."""
        return self.attention_data * self.data

    @property
    def shards(self) -> int:
        """How many ways everything but attention is cut."""
        return self.tensor * self.attention_data

    def sequences(self, batch: int) -> int:
        """Of so many sequences those that the busiest device keeps the cache of."""
        return math.ceil(batch / self.attention_groups)

    def __str__(self) -> str:
        names = (("tensor", self.tensor), ("attention data", self.attention_data), ("data", self.data))
        return ", ".join(f"{name} {ways}" for name, ways in names if ways > 1) or "one device"


def cuts(sizes: DecoderSizes, layout: Layout) -> bool:
    """Whether heads and key heads can be shared out evenly."""
    return all(
        spec.num_heads % layout.tensor == 0
        and (spec.cache.key[0] % layout.tensor == 0 or layout.tensor % spec.cache.key[0] == 0)
        for spec in dict.fromkeys(sizes.specs)
    )


def check_layout(sizes: DecoderSizes, layout: Layout) -> None:
    """InputError unless `cuts`."""
    if cuts(sizes, layout):
        return
    for spec in dict.fromkeys(sizes.specs):
        if spec.num_heads % layout.tensor:
            raise InputError(
                f"{sizes.name} has {spec.num_heads} heads, which tensor parallelism cannot share out to "
                f"{layout.tensor} devices; their number must divide the heads, the nearest that does: "
                f"{nearest_divisor(spec.num_heads, layout.tensor)}"
            )
    groups = max(spec.cache.key[0] for spec in sizes.specs)
    raise InputError(
        f"{sizes.name} has {groups} key heads, which tensor parallelism can neither share out to {layout.tensor} "
        f"devices nor copy evenly; use a number that divides {groups} or is a multiple of it"
    )


def key_head_share(spec: AttentionSpec, layout: Layout) -> Fraction:
    """The part of a layer's cached elements that a device holds for its own sequences."""
    groups = spec.cache.key[0]
    return Fraction(math.ceil(groups / layout.tensor), groups)


def key_head_copies(spec: AttentionSpec, layout: Layout) -> int:
    """How many devices of one tensor-parallel group hold the same cached element."""
    return int(key_head_share(spec, layout) * layout.tensor)


def attention_share(spec: AttentionSpec, layout: Layout, *, linear: bool = False) -> int:
    """Elements of one layer's attention weights that a device holds; linear: of linear maps alone."""
    keys = key_head_share(spec, layout)
    total = 0
    for weight in spec.weights:
        if linear and weight.kind != "linear":
            continue
        if weight.heads is None:
            part = Fraction(1)
        else:
            # A weight of key heads is copied with them.
            part = keys if weight.name in ("k_proj", "v_proj") else Fraction(1, layout.tensor)
        total += math.ceil(weight.elements * part)
    return total


def weights_per_device(sizes: DecoderSizes, layout: Layout) -> dict[str, int]:
    """Learned parameters that a device holds, by part; norms, the router and other small ones are copied."""
    parts = sizes.parts()
    cut = {name: math.ceil(parts[name] / layout.shards) for name in ("embeddings", "feed_forward", "output_head")}
    attention = sum(attention_share(spec, layout) * count for spec, _, count in runs(sizes))
    return parts | cut | {"attention": attention}


@dataclass(frozen=True)
class Kind:
    """Layers that are alike: their number, the part of their cache that a device holds, and a model of one of them.

    The feed-forward of that model means nothing.
    """

    count: int
    share: Fraction
    layer: DecoderSizes


def kinds(sizes: DecoderSizes, layout: Layout) -> list[Kind]:
    """Every distinct attention with its window."""
    return [
        Kind(
            count,
            key_head_share(spec, layout),
            dataclasses.replace(sizes, specs=(spec,), windows=() if window is None else (window,), experts=None),
        )
        for spec, window, count in runs(sizes)
    ]


def runs(sizes: DecoderSizes) -> Iterator[tuple[AttentionSpec, int | None, int]]:
    """Every distinct attention with its window, None for none, and how many layers have both."""
    windows = sizes.windows or (None,) * len(sizes.specs)
    for (spec, window), count in Counter(zip(sizes.specs, windows, strict=True)).items():
        yield spec, window, count
