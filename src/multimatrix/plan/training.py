"""What training a decoder costs in FLOPs, and which share of an accelerator's peak a speed amounts to. No torch.

Everything is made from specs. Matrix products alone are counted, two FLOPs per multiply-add; norms, softmax, rotations,
the embedding's look-up and the optimizer are not, and what is computed twice to save memory counts once. For one token
of a sequence of T tokens, forward, summed over layers:

    attention linear   2 * (attention's linear weights), each used once
    attention core     N * (D + V) * (T + 1)       causal: a token sees (T + 1) / 2 tokens on average, about half of T
    feed-forward       2 * (weights of the feed-forward that the token takes), without the router
    router             2 * E * H
    output head        2 * vocab_size * H

The backward pass takes twice as much: one product for the gradient of either factor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from multimatrix.plan.hardware import bf16_peak
from multimatrix.plan.model import DecoderSizes, check_count

if TYPE_CHECKING:
    from multimatrix.model.configuration import MultimatrixConfig


@dataclass(frozen=True)
class TrainingCost:
    """FLOPs of one trained token of the whole model, forward and backward, by part."""

    attention_linear: int
    attention_core: int
    feed_forward: int
    router: int
    output_head: int

    @property
    def flops(self) -> int:
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def training_cost(sizes: DecoderSizes, context: int) -> TrainingCost:
    """The cost of one token of a sequence of `context` tokens.

    Raises:
        InputError: context is below 1.
    """
    check_count("the context", context)
    parts = sizes.parts(active=True)
    core = sum(spec.prefill_core_flops(context) for spec in sizes.specs)
    return TrainingCost(
        attention_linear=sum(spec.training_flops(context) for spec in sizes.specs) - 3 * core,
        attention_core=3 * core,
        feed_forward=6 * parts["feed_forward"],
        router=6 * parts["router"],
        output_head=6 * sizes.vocab_size * sizes.hidden_size,
    )


def training_flops_per_token(config: MultimatrixConfig, context: int) -> int:
    """FLOPs of one trained token of a model of this configuration; see `training_cost`."""
    return training_cost(sizes_of(config), context).flops


def sizes_of(config: MultimatrixConfig) -> DecoderSizes:
    """The sizes of a model's configuration."""
    return DecoderSizes(
        name=config.model_type,
        specs=tuple(config.layer_specs()),
        vocab_size=config.vocab_size,
        intermediate_size=config.intermediate_size,
        tie_word_embeddings=config.tie_word_embeddings,
        experts=config.experts_spec(),
    )


def flop_utilization(
    flops_per_token: float, tokens_per_second: float, device_name: str, devices: int = 1
) -> float | None:
    """Model FLOP utilization (MFU): the share of the devices' dense bfloat16 peak, 1 for all of it.

    device_name: as torch.cuda.get_device_name() gives it. devices: how many took part in tokens_per_second. Returns
    None where the peak of the device is not known, which is said once.
    """
    peak = bf16_peak(device_name)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * devices)
