"""The variants and settings that the test matrices iterate; a new variant is tested the moment it is registered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from multimatrix import MultimatrixConfig, MultimatrixForCausalLM
from multimatrix.attention import VARIANTS, AttentionSpec, make_spec
from multimatrix.attention.module import Attention

Module = TypeVar("Module", bound=torch.nn.Module)

# Settings of one variant beyond what all share.
OWN_SETTINGS: dict[str, list[dict]] = {
    "gqa": [{"num_heads": 6, "num_kv_heads": 3}],
    "mla": [{"query_rank": 12}, {"value_head_dim": 6, "query_rank": 12, "latent_dim": 20, "latent_scaling": True}],
    "mfa": [
        {"query_norm": True, "query_rank": 12, "latent_scaling": True},
        {"rotary_blocks": 2, "softmax_scale": 0.3},
        {"num_heads": 5, "position": "alibi"},
    ],
    "mfa_kr": [
        {"value_map": value_map, "key_reuse": key_reuse}
        for value_map in ("tied", "projected", "residual", "gated")
        for key_reuse in ("unrotated", "relative")
    ]
    + [
        {"key_reuse": "relative", "rotary_blocks": 2},
        {"key_reuse": "relative", "rotary_dim": 4, "query_norm": True},
    ],
}
SHARED_SETTINGS: list[dict] = [{}, {"rotary_dim": 2}, {"position": "alibi"}, {"position": "none"}]


def _spec(variant: str, settings: dict) -> AttentionSpec:
    hidden = 6 if variant == "fpba" else 32
    return make_spec(hidden, VARIANTS[variant].sized(hidden, 8).to_dict() | settings)


def _name(variant: str, settings: dict) -> str:
    return "-".join([variant, *(f"{key}={value}" for key, value in settings.items())])


CASES: dict[str, AttentionSpec] = {
    _name(variant, settings): _spec(variant, settings)
    for variant in VARIANTS
    for settings in SHARED_SETTINGS + OWN_SETTINGS.get(variant, [])
}
# One of each, for tests that cost more.
DEFAULTS: dict[str, AttentionSpec] = {variant: _spec(variant, {}) for variant in VARIANTS} | {
    "mfa_kr-relative": _spec("mfa_kr", {"key_reuse": "relative"}),
    "mfa-alibi": _spec("mfa", {"position": "alibi"}),
}


# Decoders, as one spec per layer: every variant alone, all of one width in one model, and mixed position encodings.
HYBRIDS: dict[str, list[AttentionSpec]] = {
    "hybrid": [CASES[variant] for variant in ("mha", "mfa_kr", "mla")],
    "hybrid-all": [spec for spec in DEFAULTS.values() if spec.hidden_size == 32],
    "hybrid-positions": [
        CASES[name] for name in ("mla-position=none", "mfa_kr-position=alibi", "gqa-rotary_dim=2", "mfa_kr")
    ],
}
DECODERS: dict[str, list[AttentionSpec]] = {name: [spec] * 2 for name, spec in DEFAULTS.items()} | HYBRIDS


class Decoder(list[AttentionSpec]):
    """One spec per layer, and what else differs in the decoder's config."""

    def __init__(self, specs: Sequence[AttentionSpec], **changes) -> None:
        super().__init__(specs)
        self.changes = changes


EXPERTS = {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 16, "shared_intermediate_size": 8}
# The decoders of tests that ask for nothing but a model.
MODELS: dict[str, list[AttentionSpec]] = DECODERS | {
    "mfa-experts": Decoder(DECODERS["mfa"], mixture_of_experts=EXPERTS),
    "mfa_kr-experts": Decoder(DECODERS["mfa_kr"], mixture_of_experts=EXPERTS | {"layers": [1]}),
}
ALL_DECODERS: dict[str, list[AttentionSpec]] = {name: [spec] * 2 for name, spec in CASES.items()} | HYBRIDS


def random_attention(spec: AttentionSpec, dtype: torch.dtype = torch.float64) -> Attention:
    """A layer with no weight at a special value."""
    return randomized(Attention(spec).to(dtype), 0.5)


@torch.no_grad()
def randomized(module: Module, std: float) -> Module:
    """The module with every weight random, gates and norms included, in evaluation mode."""
    for parameter in module.parameters():
        parameter.normal_(0.0, std)
    return module.eval()


def weights_of(module: Attention) -> dict[str, Tensor]:
    """Weight name, as the spec lists it, -> tensor."""
    return {name.removesuffix(".weight"): parameter for name, parameter in module.named_parameters()}


def small_config(specs: Sequence[AttentionSpec], **changes) -> MultimatrixConfig:
    """A decoder with one spec per layer; a single size dictionary where they are all the same."""
    sizes = [spec.to_dict() for spec in specs]
    settings = {
        "vocab_size": 61,
        "hidden_size": specs[0].hidden_size,
        "intermediate_size": 32,
        "num_hidden_layers": len(specs),
        "max_position_embeddings": 64,
        "attention": sizes[0] if all(size == sizes[0] for size in sizes) else sizes,
    }
    return MultimatrixConfig(**settings | getattr(specs, "changes", {}) | changes)


def random_model(
    specs: Sequence[AttentionSpec], dtype: torch.dtype = torch.float64, **changes
) -> MultimatrixForCausalLM:
    """A decoder with no weight at a special value and with visible logits."""
    return randomized(MultimatrixForCausalLM(small_config(specs, **changes)).to(dtype), 0.4)


def random_ids(*shape: int) -> Tensor:
    """Token ids of the small decoder; id 0 is left out, so that padding shows."""
    return torch.randint(1, 61, shape)


def padded(rows: Sequence[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Sequences [T_b] of any lengths -> ids [B, T] and attention mask [B, T], filled up with id 0 on one side."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side=side)
    return ids, (ids != 0).long()


@torch.no_grad()
def logits_in_chunks(
    model: MultimatrixForCausalLM, ids: Tensor, chunks: Iterable[int], cache: Cache, mask: Tensor | None = None
) -> Tensor:
    """Logits [B, T, vocab_size] of ids [B, T] fed through a cache in chunks of these lengths."""
    logits, done = [], 0
    for chunk in chunks:
        step = slice(done, done := done + chunk)
        seen = None if mask is None else mask[:, :done]
        logits.append(model(ids[:, step], attention_mask=seen, cache=cache).logits)
    assert done == ids.shape[1]
    return torch.cat(logits, dim=1)
