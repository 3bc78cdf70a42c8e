"""config.json of the model families that can be planned, by model_type. No torch.

A family reads every field that changes what is counted, refuses values that it cannot count, and says which fields it
did not know. Nothing is guessed: a default is taken only where transformers' class of the family has that default and
published configurations leave the field out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from multimatrix.attention import make_specs
from multimatrix.convert.step3_config import from_step3
from multimatrix.convert.step3_format import KNOWN_FIELDS
from multimatrix.errors import InputError
from multimatrix.model.experts import make_experts
from multimatrix.plan import grouped, published
from multimatrix.plan.config_fields import NEUTRAL, Fields

# What Step-3's format has to state and nothing that is counted depends on.
STEP3_UNCOUNTED = {"max_seq_len": 1, "rope_theta": 1e4, "rms_norm_eps": 1e-5}
OURS_NEUTRAL = ("depth_scaled_init", "zero_init_output", "skip_logits", "provenance")
LATENT_NEUTRAL = (
    *("aux_loss_alpha", "ep_size", "topk_method", "scoring_func", "seq_aux", "num_key_value_heads", "rope_interleave"),
    *("qk_head_dim", "head_dim", *grouped.ROUTING),
)


def deepseek(fields: Fields) -> dict[str, Any]:
    """Multi-head latent attention: DeepSeek-V2 and V3, Kimi K2.

    Without layers for multi-token prediction, and without the router's bias, which no gradient trains.
    """
    hidden, layers = fields.count("hidden_size"), fields.layers()
    fields.only("mlp_bias", False)
    if not fields.states("q_lora_rank"):
        raise InputError(f"{fields.place} has no q_lora_rank; write null if its queries have full rank")
    rank = fields.count("q_lora_rank") if "q_lora_rank" in fields else None
    latent, rotary = fields.count("kv_lora_rank"), fields.count("qk_rope_head_dim")
    attention = {
        "variant": "mla",
        "num_heads": fields.count("num_attention_heads"),
        "head_dim": fields.count("qk_nope_head_dim"),
        "rope_head_dim": rotary,
        "value_head_dim": fields.count("v_head_dim"),
        "latent_dim": latent,
        "query_rank": rank,
    }
    biases = (rank or 0) + latent + rotary + hidden  # of the projections down, and of the output
    experts = grouped.shared_experts(fields, layers)
    return {
        "specs": tuple(make_specs(hidden, attention, layers)),
        "vocab_size": fields.count("vocab_size"),
        "intermediate_size": fields.count("intermediate_size"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "experts": None if experts is None else make_experts(experts),
        "other_parameters": layers * biases if fields.flag("attention_bias") else 0,
        "unread_fields": fields.unread(*LATENT_NEUTRAL),
    }


def step3(fields: Fields) -> dict[str, Any]:
    fields.layers()
    for name in ("hidden_size", "vocab_size", "intermediate_size"):
        fields.count(name)
    known = fields.known(KNOWN_FIELDS - NEUTRAL)
    return _ours(from_step3(STEP3_UNCOUNTED | known, ())) | {"unread_fields": fields.unread()}


def multimatrix(fields: Fields) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    fields.layers()
    known: dict[str, Any] = {name: fields.count(name) for name in names}
    known |= {name: fields.get(name) for name in ("attention", "mixture_of_experts")}
    known["tie_word_embeddings"] = fields.flag("tie_word_embeddings")
    return _ours(known) | {"unread_fields": fields.unread(*OURS_NEUTRAL)}


def _ours(config: Mapping[str, Any]) -> dict[str, Any]:
    """From the fields of a `MultimatrixConfig`."""
    experts = config.get("mixture_of_experts")
    return {
        "specs": tuple(make_specs(config["hidden_size"], config["attention"], config["num_hidden_layers"])),
        "vocab_size": config["vocab_size"],
        "intermediate_size": config["intermediate_size"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "experts": None if experts is None else make_experts(experts),
    }


FAMILIES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "multimatrix": multimatrix,
    "step3_text": step3,
    "llama": published.llama,
    "llama4_text": published.llama4,
    "mistral": published.mistral,
    "ministral3": published.ministral3,
    "mixtral": published.mixtral,
    "qwen2": published.qwen2,
    "qwen2_moe": published.qwen2_moe,
    "qwen3": published.qwen3,
    "qwen3_moe": published.qwen3_moe,
    "gemma": published.gemma,
    "gemma2": published.gemma2,
    "gemma3_text": published.gemma3,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "kimi_k2": deepseek,
    "glm": published.glm,
    "glm4": published.glm4,
    "glm4_moe": published.glm4_moe,
    "phi": published.phi,
    "phi3": published.phi3,
    "phimoe": published.phimoe,
    "gpt_oss": published.gpt_oss,
}
# Models that also see: their language model is in text_config, whose model_type is this one where it is not stated.
WRAPPERS = {
    "step3_vl": "step3_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "gemma3": "gemma3_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
}
