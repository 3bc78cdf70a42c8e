"""Equal total parameters: the feed-forward width takes up what a variant's attention saves or spends.

In a mixture of experts it is the width of the shared expert, see `plan.numbers.match_experts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from multimatrix.attention import VARIANTS, AttentionSpec
from multimatrix.attention.sizes import specs_from_labels
from multimatrix.compare.configuration import Comparison
from multimatrix.model.experts import ExpertsSpec
from multimatrix.plan.numbers import decoder_parameters, kv_bytes_per_token, match_experts, match_intermediate_size

# Relative difference in total parameters that buys a rounder feed-forward width.
TOLERANCE = 0.001


@dataclass(frozen=True)
class Candidate:
    """One variant of a comparison at its matched size; intermediate_size is not used where there are experts."""

    label: str
    spec: AttentionSpec
    num_hidden_layers: int
    intermediate_size: int
    experts: ExpertsSpec | None
    parameters: int
    active_parameters: int
    mismatch: float
    mha_kv_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Stated bytes per token of the whole model, at 16 bit."""
        return kv_bytes_per_token([self.spec] * self.num_hidden_layers)

    def row(self) -> dict[str, Any]:
        """The columns of the results table that need no run."""
        experts: dict[str, Any] = {}
        if self.experts is not None:
            experts = {
                "intermediate_size": None,
                "mixture_of_experts": self.experts.to_dict(),
                "feed_forward": self.experts.shape,
                "active_parameters": self.active_parameters,
            }
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
            **experts,
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
    width, experts = comparison.feed_forward_width, comparison.experts
    target = decoder_parameters(
        [specs[comparison.baseline]] * layers, intermediate_size=width, experts=experts, **shared
    )
    mha = VARIANTS["mha"].sized(comparison.hidden_size, comparison.head_dim)
    candidates = []
    for label, spec in specs.items():
        sizes: dict[str, Any] = {"intermediate_size": width, "experts": experts}
        if label != comparison.baseline and comparison.match == "parameters":
            if experts is None:
                sizes["intermediate_size"] = match_intermediate_size(
                    [spec] * layers, target, tolerance=TOLERANCE, **shared
                )
            else:
                sizes["experts"] = match_experts([spec] * layers, target, tolerance=TOLERANCE, **sizes, **shared)
        parameters = decoder_parameters([spec] * layers, **sizes, **shared)
        candidates.append(
            Candidate(
                label=label,
                spec=spec,
                num_hidden_layers=layers,
                parameters=parameters,
                active_parameters=decoder_parameters([spec] * layers, active=True, **sizes, **shared),
                mismatch=parameters / target - 1,
                mha_kv_bytes=kv_bytes_per_token([mha] * layers),
                **sizes,
            )
        )
    return candidates
