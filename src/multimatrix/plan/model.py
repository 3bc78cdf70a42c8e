"""What a whole decoder costs: parameters by part, KV bytes, and the FLOPs of one decoded token. No torch.

Everything is made from specs. Matrix products alone are counted, two FLOPs per multiply-add; norms, softmax, rotations
and sampling are not. For one token decoded at a context of T, itself included, and summed over layers:

    attention core   2 * N * (D + V) * T       scores and weighted sum over the cached latents; a layer with a window
                                               of W tokens sees min(T, W)
    linear           2 * (attention's linear weights), and what decoding adds to them
    feed-forward     2 * (weights of the feed-forward that the token takes), without the router
    router           2 * E * H
    output head      2 * vocab_size * H
    KV bytes read    (elements cached per token) * T * bits / 8, each byte once, and as with the core min(T, W)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from multimatrix.attention import AttentionSpec
from multimatrix.errors import InputError
from multimatrix.fields import LARGEST, check_most
from multimatrix.model.experts import ExpertsSpec
from multimatrix.plan.cache import KV_BITS, element_bytes, paged_tokens, scale_bytes
from multimatrix.plan.numbers import decoder_parts, kv_bytes_per_token

MAX_LAYERS = 10_000
# What is counted then stays within what a float holds.
MOST_PARAMETERS, LONGEST_CONTEXT = 10**18, 10**15


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """The sizes of a decoder that its cost follows from.

    specs: the attention of every layer. windows: how many tokens, itself included, a token sees at most in each layer,
    None for all; empty where every layer sees all. intermediate_size: of the dense feed-forwards, which are all those
    that `experts` does not replace. feed_forward_matrices: of each of them. norms_per_layer: of hidden_size each.
    other_parameters: learned numbers that our decoder has no place for, such as biases and norms of queries and keys;
    idle_parameters: those of them that belong to experts which a token does not take. unread_fields: of a config.json,
    what was not read and may change what is counted; notes: what else a reader of the numbers has to know.
    instead_of: the model that this one is to be compared with, where it is that model with another attention.

    Raises:
        InputError: a size is no whole number of at least 1, or the experts name a layer that is not there.
    """

    name: str
    source: str = ""
    specs: tuple[AttentionSpec, ...]
    vocab_size: int
    intermediate_size: int
    tie_word_embeddings: bool = False
    experts: ExpertsSpec | None = None
    other_parameters: int = 0
    idle_parameters: int = 0
    norms_per_layer: int = 2
    feed_forward_matrices: int = 3
    windows: tuple[int | None, ...] = ()
    unread_fields: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    instead_of: DecoderSizes | None = None

    def __post_init__(self) -> None:
        if not self.specs:
            raise InputError(f"{self.name} has no layers; num_hidden_layers must be at least 1")
        for field in ("vocab_size", "intermediate_size"):
            check_count(f"{field} of {self.name}", getattr(self, field))
        if not isinstance(self.tie_word_embeddings, bool):
            raise InputError(
                f"tie_word_embeddings of {self.name} must be true or false, got {self.tie_word_embeddings!r}"
            )
        if self.experts is not None:
            self.experts.check_layers(len(self.specs))
        if self.windows and len(self.windows) != len(self.specs):
            raise InputError(
                f"{self.name} states windows of {len(self.windows)} layers and has {len(self.specs)}; state one for "
                "each, or none"
            )
        for window in self.windows:
            if window is not None:
                check_count(f"a window of {self.name}", window)
        self._check_magnitudes()

    def _check_magnitudes(self) -> None:
        experts = {} if self.experts is None else vars(self.experts)
        for field, value in experts.items():
            if field != "layers":
                check_most(f"{field} of experts of {self.name}", value)
        for spec in dict.fromkeys(self.specs):
            if spec.parameters > MOST_PARAMETERS:
                raise InputError(
                    f"the attention of {self.name} has more than {MOST_PARAMETERS:.0e} parameters a layer; check its "
                    "sizes"
                )

    @property
    def warnings(self) -> list[str]:
        """What a reader of the numbers has to know, a sentence each."""
        unread = f"not read, and may change what is counted: {', '.join(self.unread_fields)}"
        return [*self.notes, *([unread] if self.unread_fields else [])]

    @property
    def hidden_size(self) -> int:
        return self.specs[0].hidden_size

    def parts(self, active: bool = False) -> dict[str, int]:
        """Learned parameters by part; active: without the experts that a token does not take."""
        parts = decoder_parts(
            self.specs,
            vocab_size=self.vocab_size,
            intermediate_size=self.intermediate_size,
            tie_word_embeddings=self.tie_word_embeddings,
            experts=self.experts,
            active=active,
            norms_per_layer=self.norms_per_layer,
            feed_forward_matrices=self.feed_forward_matrices,
        )
        return parts | {"other": self.other_parameters - (self.idle_parameters if active else 0)}

    def seen(self, context: int) -> list[int]:
        """Tokens that the last of `context` tokens sees in every layer, itself included.

        In a layer that cuts the context into chunks it is the last of its chunk, which sees the most.
        """
        windows = self.windows or (None,) * len(self.specs)
        return [context if window is None else min(context, window) for window in windows]

    @property
    def parameters(self) -> int:
        return sum(self.parts().values())

    @property
    def active_parameters(self) -> int:
        """Those that one token uses, with the whole embedding table."""
        return sum(self.parts(active=True).values())


@dataclass(frozen=True)
class DecodeCost:
    """What one decoded token of the whole model costs at one context.

    kv_bytes: the elements of the cache that it reads. kv_scale_bytes: the scales beside them.
    """

    kv_bytes: int
    kv_scale_bytes: int
    attention_core_flops: int
    linear_flops: int
    feed_forward_flops: int
    router_flops: int
    output_head_flops: int

    @property
    def flops(self) -> int:
        return (
            self.attention_core_flops
            + self.linear_flops
            + self.feed_forward_flops
            + self.router_flops
            + self.output_head_flops
        )

    @property
    def arithmetic_intensity(self) -> float:
        """FLOPs of the attention core per cached byte."""
        return self.attention_core_flops / self.kv_bytes


def decode_cost(sizes: DecoderSizes, context: int, kv_bits: int) -> DecodeCost:
    """The cost of one token that sees `context` tokens, itself included, with a cache of kv_bits an element.

    Raises:
        InputError: context is below 1 or kv_bits is none of KV_BITS.
    """
    _check_cache(context, kv_bits)
    parts = sizes.parts(active=True)
    layers = list(zip(sizes.specs, sizes.seen(context), strict=True))
    return DecodeCost(
        kv_bytes=sum(element_bytes(spec, kv_bits) * seen for spec, seen in layers),
        kv_scale_bytes=sum(scale_bytes(spec, kv_bits) * seen for spec, seen in layers),
        attention_core_flops=sum(spec.decode_core_flops(seen) for spec, seen in layers),
        linear_flops=sum(spec.decode_flops(0) for spec in sizes.specs),  # no context, no core
        feed_forward_flops=2 * parts["feed_forward"],
        router_flops=2 * parts["router"],
        output_head_flops=2 * sizes.vocab_size * sizes.hidden_size,
    )


def stored_kv_bytes(sizes: DecoderSizes, context: int, kv_bits: int, page_size: int = 1) -> int:
    """Bytes that the cache of one sequence of `context` tokens occupies, scales and the rest of open pages included.

    page_size: tokens of a page; every layer has pages of its own.

    Raises:
        InputError: context or page_size is below 1, or kv_bits is none of KV_BITS.
    """
    _check_cache(context, kv_bits)
    check_count("the page size", page_size)
    windows = sizes.windows or (None,) * len(sizes.specs)
    return sum(
        (element_bytes(spec, kv_bits) + scale_bytes(spec, kv_bits))
        * (paged_tokens(context, window, page_size) if page_size > 1 else seen)
        for spec, window, seen in zip(sizes.specs, windows, sizes.seen(context), strict=True)
    )


def _check_cache(context: int, kv_bits: int) -> None:
    check_count("the context", context, LONGEST_CONTEXT)
    if kv_bits not in KV_BITS:
        raise InputError(f"a cached element has 16, 8 or 4 bits, got {kv_bits}")


def plan_row(sizes: DecoderSizes, context: int, kv_bits: int, page_size: int = 1) -> dict[str, Any]:
    """Every number of one model at one context, under plain names."""
    cost = decode_cost(sizes, context, kv_bits)
    return {
        "model": sizes.name,
        "source": sizes.source,
        "unread_fields": list(sizes.unread_fields),
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": len(sizes.specs),
        "layers": _layer_rows(sizes, kv_bits),
        "parameters": sizes.parameters,
        "active_parameters": sizes.active_parameters,
        "parameters_by_part": sizes.parts(),
        "kv_bits": kv_bits,
        "kv_bytes_per_token": kv_bytes_per_token(sizes.specs, kv_bits),
        "kv_bytes_per_token_by_bits": {str(bits): kv_bytes_per_token(sizes.specs, bits) for bits in KV_BITS},
        "kv_scale_bytes_per_token_by_bits": {
            str(bits): sum(scale_bytes(spec, bits) for spec in sizes.specs) for bits in KV_BITS
        },
        "context": context,
        "kv_bytes": cost.kv_bytes,
        "kv_scale_bytes": cost.kv_scale_bytes,
        "page_size": page_size,
        "kv_stored_bytes": stored_kv_bytes(sizes, context, kv_bits, page_size),
        "attention_core_flops": cost.attention_core_flops,
        "linear_flops": cost.linear_flops,
        "feed_forward_flops": cost.feed_forward_flops,
        "router_flops": cost.router_flops,
        "output_head_flops": cost.output_head_flops,
        "flops": cost.flops,
        "arithmetic_intensity": cost.arithmetic_intensity,
    }


def _layer_rows(sizes: DecoderSizes, kv_bits: int) -> list[dict[str, Any]]:
    """Runs of layers that are alike, from the first to the last."""
    windows = sizes.windows or (None,) * len(sizes.specs)
    return [
        {
            "count": len(list(run)),
            "window": window,
            "kv_bytes_per_token": kv_bytes_per_token([spec], kv_bits),
            "attention": spec.to_dict(),
        }
        for (spec, window), run in groupby(zip(sizes.specs, windows, strict=True))
    ]


def check_layers(what: str, value: Any) -> None:
    """InputError unless it is a number of layers that a decoder may have: one spec is made for each."""
    check_count(what, value, MAX_LAYERS)


def check_count(what: str, value: Any, most: int = LARGEST) -> None:
    """InputError unless it is a whole number of at least 1 and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} must be a whole number of at least 1, got {value!r}")
    check_most(what, value, most)
