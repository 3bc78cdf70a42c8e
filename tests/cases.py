"""The variants and settings that the test matrices iterate; a new variant is tested the moment it is registered."""

from __future__ import annotations

import torch
from torch import Tensor

from multimatrix import MultimatrixConfig, MultimatrixForCausalLM
from multimatrix.attention import VARIANTS, AttentionSpec, make_spec
from multimatrix.attention.module import Attention

# Settings of one variant beyond what all share.
OWN_SETTINGS: dict[str, list[dict]] = {
    "gqa": [{"num_kv_heads": 2}],
    "mla": [{"query_rank": 12}, {"value_head_dim": 6, "query_rank": 12, "latent_scaling": True}],
    "mfa": [{"query_norm": True, "query_rank": 12, "latent_scaling": True}, {"rotary_blocks": 2, "softmax_scale": 0.3}],
    "mfa_kr": [
        {"value_map": value_map, "key_reuse": key_reuse}
        for value_map in ("tied", "projected", "residual", "gated")
        for key_reuse in ("unrotated", "relative")
    ]
    + [{"key_reuse": "relative", "rotary_blocks": 2}, {"key_reuse": "relative", "rotary_dim": 4, "query_norm": True}],
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


def random_attention(spec: AttentionSpec, dtype: torch.dtype = torch.float64) -> Attention:
    """A layer with no weight at a special value."""
    module = Attention(spec).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5)
    return module.eval()


def weights_of(module: Attention) -> dict[str, Tensor]:
    """Weight name, as the spec lists it, -> tensor."""
    return {name.removesuffix(".weight"): parameter for name, parameter in module.named_parameters()}


def small_config(spec: AttentionSpec, **changes) -> MultimatrixConfig:
    settings = {
        "vocab_size": 61,
        "hidden_size": spec.hidden_size,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "attention": spec.to_dict(),
    }
    return MultimatrixConfig(**settings | changes)


def random_model(spec: AttentionSpec, dtype: torch.dtype = torch.float64, **changes) -> MultimatrixForCausalLM:
    """A two-layer decoder whose every weight is random, gates and norms included, with visible logits."""
    model = MultimatrixForCausalLM(small_config(spec, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    return model.eval()
