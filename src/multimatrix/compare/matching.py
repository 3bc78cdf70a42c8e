"""Equal total parameters: the feed-forward width takes up what a variant's attention saves or spends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from multimatrix.attention import VARIANTS, AttentionSpec
from multimatrix.attention.sizes import specs_from_labels
from multimatrix.compare.configuration import Comparison
from multimatrix.plan.numbers import decoder_parameters, kv_bytes_per_token, match_intermediate_size

# Relative difference in total parameters that buys a rounder feed-forward width.
TOLERANCE = 0.001


@dataclass(frozen=True)
class Candidate:
    """One variant of a comparison at its matched size."""

    label: str
    spec: AttentionSpec
    num_hidden_layers: int
    intermediate_size: int
    parameters: int
    mismatch: float
    mha_kv_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Stated bytes per token of the whole model, at 16 bit."""
        return kv_bytes_per_token([self.spec] * self.num_hidden_layers)

    def row(self) -> dict[str, Any]:
        """The columns of the results table that need no run."""
        return {
            "variant": self.label,
            "heads": self.spec.num_heads,
            "head_dim": self.spec.head_dims[0],
            "shape": f"{self.spec.num_heads} x {self.spec.head_dims[0]}",
            "attention_parameters": self.spec.parameters * self.num_hidden_layers,
            "parameters": self.parameters,
            "parameter_mismatch": self.mismatch,
            "intermediate_size": self.intermediate_size,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_reduction": 1 - self.kv_bytes_per_token / self.mha_kv_bytes,
            "total_effective_rank": self.spec.capacity.total_effective_rank,
            "sizes": self.spec.to_dict(),
        }


def match(comparison: Comparison, vocab_size: int) -> list[Candidate]:
    """Every variant of a comparison, the feed-forward width chosen by `comparison.match`.

    Raises:
        InputError: sizes that cannot work, or that cannot be matched within 0.5 %.
    """
    specs = specs_from_labels(
        comparison.variants,
        hidden_size=comparison.hidden_size,
        head_dim=comparison.head_dim,
        overrides=comparison.sizes,
        position=comparison.position,
        latent_scaling=comparison.latent_scaling,
    )
    layers = comparison.num_hidden_layers
    shared: dict[str, Any] = {"vocab_size": vocab_size, "tie_word_embeddings": comparison.tie_word_embeddings}
    width = comparison.baseline_intermediate_size
    target = decoder_parameters([specs[comparison.baseline]] * layers, intermediate_size=width, **shared)
    mha = VARIANTS["mha"].sized(comparison.hidden_size, comparison.head_dim)
    candidates = []
    for label, spec in specs.items():
        if label != comparison.baseline and comparison.match == "parameters":
            chosen = match_intermediate_size([spec] * layers, target, tolerance=TOLERANCE, **shared)
        else:
            chosen = width
        parameters = decoder_parameters([spec] * layers, intermediate_size=chosen, **shared)
        candidates.append(
            Candidate(
                label=label,
                spec=spec,
                num_hidden_layers=layers,
                intermediate_size=chosen,
                parameters=parameters,
                mismatch=parameters / target - 1,
                mha_kv_bytes=kv_bytes_per_token([mha] * layers),
            )
        )
    return candidates
