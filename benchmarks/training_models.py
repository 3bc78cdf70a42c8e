"""The models of `training.py`: every variant and transformers' Llama at equal parameters, in three sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from multimatrix import MultimatrixConfig, MultimatrixForCausalLM
from multimatrix.attention import AttentionSpec
from multimatrix.attention.sizes import specs_from_labels
from multimatrix.plan.families import FAMILIES, Fields
from multimatrix.plan.model import DecoderSizes
from multimatrix.plan.numbers import decoder_parameters, match_intermediate_size
from multimatrix.plan.training import TrainingCost, sizes_of, training_cost

LLAMAS = {"llama": "mha", "llama_gqa": "gqa"}
VARIANTS = ("mfa", "mha", "gqa", "mqa", "mla", "mfa_kr")
MODELS = ("mfa", "mha", "llama", "mfa_kr", "gqa", "llama_gqa", "mla", "mqa")  # what matters most comes first
TOLERANCE = 0.01  # of the parameters, for a rounder feed-forward width


@dataclass(frozen=True)
class Size:
    """One size; head_dim and intermediate_size are MHA's, the variants' follow from them.

    batch: sequences of `context` tokens that a pass takes, fewer where they do not fit.
    """

    hidden_size: int
    num_hidden_layers: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tokens_per_pass: int
    initializer_range: float = 0.02


SIZES = {
    # The depth and width of GPT-2's small and medium models, and of the MFA paper's 1B dense model.
    "124m": Size(768, 12, 64, 2048, 50_304, 65_536),
    "350m": Size(1024, 24, 128, 2816, 50_304, 65_536),
    "1b": Size(2048, 20, 128, 5504, 50_304, 32_768),
    "tiny": Size(64, 2, 16, 176, 256, 64),
}


@dataclass(frozen=True)
class Case:
    """One row: a model of one size at one context. head_dim: of MHA, where it is not the size's."""

    size_name: str
    model: str
    context: int
    head_dim: int | None = None

    @property
    def label(self) -> str:
        return f"{self.size_name} {self.model} {self.context}"

    @property
    def size(self) -> Size:
        size = SIZES[self.size_name]
        return size if self.head_dim is None else dataclasses.replace(size, head_dim=self.head_dim)

    @property
    def is_llama(self) -> bool:
        return self.model in LLAMAS

    @property
    def spec(self) -> AttentionSpec:
        variant = LLAMAS.get(self.model, self.model)
        size = self.size
        return specs_from_labels([variant], hidden_size=size.hidden_size, head_dim=size.head_dim)[variant]

    @property
    def config(self) -> MultimatrixConfig | LlamaConfig:
        size, spec = self.size, self.spec
        shared: dict[str, Any] = {
            "vocab_size": size.vocab_size,
            "hidden_size": size.hidden_size,
            "num_hidden_layers": size.num_hidden_layers,
            "max_position_embeddings": self.context,
            "initializer_range": size.initializer_range,
            "tie_word_embeddings": True,
            "intermediate_size": self._intermediate_size(spec),
            "rms_norm_eps": 1e-6,
            "use_cache": False,
        }
        if self.is_llama:
            groups = spec.cache.key[0]
            return LlamaConfig(
                **shared, num_attention_heads=spec.num_heads, num_key_value_heads=groups, head_dim=size.head_dim
            )
        return MultimatrixConfig(**shared, attention=spec.to_dict(), skip_logits=True)

    def _intermediate_size(self, spec: AttentionSpec) -> int:
        size, layers = self.size, self.size.num_hidden_layers
        shared: dict[str, Any] = {"vocab_size": size.vocab_size, "tie_word_embeddings": True}
        mha = specs_from_labels(["mha"], hidden_size=size.hidden_size, head_dim=size.head_dim)["mha"]
        target = decoder_parameters([mha] * layers, intermediate_size=size.intermediate_size, **shared)
        return match_intermediate_size([spec] * layers, target, tolerance=TOLERANCE, **shared)

    @property
    def sizes(self) -> DecoderSizes:
        config = self.config
        if isinstance(config, MultimatrixConfig):
            return sizes_of(config)
        fields = FAMILIES["llama"](Fields(Path(self.model), config.to_dict()))
        return DecoderSizes(name=self.model, **{name: fields[name] for name in fields if name != "unread_fields"})

    @property
    def cost(self) -> TrainingCost:
        return training_cost(self.sizes, self.context)

    def make_model(self, device: torch.device, weights: torch.dtype) -> nn.Module:
        """Fresh weights; the seed is the caller's."""
        kind: Callable[..., nn.Module] = LlamaForCausalLM if self.is_llama else MultimatrixForCausalLM
        with torch.device(device):
            return kind(self.config).to(weights).train()


def make_cases(
    sizes: Sequence[str], models: Sequence[str], contexts: Sequence[int], head_dim: int | None = None
) -> list[Case]:
    """In the order in which they are measured: what a bar asks for in all sizes, then the others."""
    first = [model for model in models if model in MODELS[:3]]
    rest = [model for model in models if model not in first]
    return [
        Case(size, model, context, head_dim)
        for context in contexts
        for group in (first, rest)
        for size in sizes
        for model in group
    ]
