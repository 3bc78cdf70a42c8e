"""A round accelerator and a small decoder, for tests of what a plan says of devices."""

from __future__ import annotations

from multimatrix.attention import AttentionSpec
from multimatrix.plan.hardware import Hardware
from multimatrix.plan.model import DecoderSizes
from multimatrix.recipes import recipe_names

RECIPES = recipe_names("models")
CHIP = Hardware(
    name="own", title="own", memory_bytes=1e12, bytes_per_second=2e12, flops_per_second=3e14, dollars_per_hour=7.2
)


def one_attention(spec: AttentionSpec, layers: int = 3) -> DecoderSizes:
    """A small decoder whose layers are alike."""
    return DecoderSizes(name="tiny", specs=(spec,) * layers, vocab_size=50, intermediate_size=40)
