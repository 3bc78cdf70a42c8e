"""Small config.json of every family that is planned: the fields, by model_type of transformers' config class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import step3 as step3_model

Fields = dict[str, Any]
SMALL: Fields = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
GROUPED: Fields = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDE: Fields = GROUPED | {"head_dim": 16}
LATENT: Fields = SMALL | {
    **{"num_attention_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 10},
    **{"q_lora_rank": 12, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2, "n_group": 2},
    **{"topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4},
}
ROUTED: Fields = GROUPED | {"num_experts_per_tok": 2}
QWEN_MOE: Fields = ROUTED | {"num_experts": 4, "moe_intermediate_size": 16, "norm_topk_prob": True}
QWEN2_MOE: Fields = QWEN_MOE | {"shared_expert_intermediate_size": 20}
QWEN3_MOE: Fields = QWEN_MOE | {"head_dim": 16}
GEMMA: Fields = WIDE | {"sliding_window": 4, "num_hidden_layers": 7}
GLM: Fields = WIDE | {"pad_token_id": 0}
GLM_MOE: Fields = GROUPED | {
    **{"head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2, "n_group": 2},
    **{"topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
}
LLAMA4: Fields = WIDE | {
    **{"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 4},
    **{"num_hidden_layers": 6},
}
GPT_OSS: Fields = WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
ON = {"use_sliding_window": True, "sliding_window": 4}


def sizes(
    kind: str, vocabulary: int, hidden: int, width: int, layers: int, heads: int, groups: int, **others: Any
) -> Fields:
    """The fields that all families have, in this order, and others."""
    return {
        **{"model_type": kind, "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": width},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups},
        **others,
    }


PEERS: dict[str, tuple[str, Fields]] = {
    "llama": ("llama", GROUPED),
    "llama-heads": ("llama", SMALL | {"num_attention_heads": 4}),
    "llama-biases": ("llama", WIDE | {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "mistral": ("mistral", GROUPED | {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("mistral", GROUPED | {"sliding_window": 4}),
    "ministral3": ("ministral3", WIDE),
    "mixtral": ("mixtral", ROUTED | {"num_local_experts": 4}),
    "mixtral-window": ("mixtral", ROUTED | {"num_local_experts": 4, "sliding_window": 4}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2-window": ("qwen2", GROUPED | ON | {"max_window_layers": 1}),
    "qwen2_moe": ("qwen2_moe", QWEN2_MOE),
    "qwen2_moe-no-biases": ("qwen2_moe", QWEN2_MOE | {"qkv_bias": False, "mlp_only_layers": [0]}),
    "qwen2_moe-window": ("qwen2_moe", QWEN2_MOE | ON | {"max_window_layers": 2}),
    "qwen3": ("qwen3", WIDE),
    "qwen3-biases": ("qwen3", WIDE | {"attention_bias": True}),
    "qwen3-window": ("qwen3", WIDE | ON | {"max_window_layers": 2}),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3_moe-dense": ("qwen3_moe", QWEN3_MOE | {"mlp_only_layers": [1], "attention_bias": True}),
    "qwen3_moe-every-other": ("qwen3_moe", QWEN3_MOE | {"decoder_sparse_step": 2}),
    "qwen3_moe-no-layer": ("qwen3_moe", QWEN3_MOE | {"decoder_sparse_step": 4}),
    "qwen3_moe-window": ("qwen3_moe", QWEN3_MOE | ON),
    "gemma": ("gemma", WIDE | {"num_key_value_heads": 1, "attention_bias": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2-untied": ("gemma2", GEMMA | {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3-pattern": ("gemma3_text", GEMMA | {"sliding_window_pattern": 3}),
    "deepseek": ("deepseek_v3", LATENT),
    "deepseek-queries": ("deepseek_v3", LATENT | {"q_lora_rank": None}),
    "deepseek-biases": ("deepseek_v3", LATENT | {"attention_bias": True}),
    "deepseek-dense": ("deepseek_v3", LATENT | {"first_k_dense_replace": 3}),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v2-lite": ("deepseek_v2", LATENT | {"q_lora_rank": None, "attention_bias": True}),
    "glm": ("glm", GLM),
    "glm4": ("glm4", GLM | {"attention_bias": False}),
    "glm4_moe": ("glm4_moe", GLM_MOE),
    "glm4_moe-norms": ("glm4_moe", GLM_MOE | {"use_qk_norm": True, "attention_bias": True}),
    "phi": ("phi", SMALL | {"num_attention_heads": 4}),
    "phi-norms": ("phi", GROUPED | {"qk_layernorm": True, "partial_rotary_factor": 0.25, "hidden_size": 64}),
    "phi3": ("phi3", GROUPED | {"pad_token_id": 0}),
    "phi3-window": ("phi3", GROUPED | {"pad_token_id": 0, "sliding_window": 4, "partial_rotary_factor": 0.75}),
    "phimoe": ("phimoe", ROUTED | {"num_local_experts": 4}),
    "phimoe-biases": ("phimoe", ROUTED | {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True}),
    "llama4": ("llama4_text", LLAMA4),
    "llama4-every-other": ("llama4_text", LLAMA4 | {"interleave_moe_layer_step": 2, "attention_bias": True}),
    "llama4-layers": ("llama4_text", LLAMA4 | {"moe_layers": [1, 2], "no_rope_layers": [1, 1, 0, 1, 1, 0]}),
    "llama4-whole": ("llama4_text", LLAMA4 | {"attention_chunk_size": None, "no_rope_layer_interval": 2}),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss-no-biases": ("gpt_oss", GPT_OSS | {"attention_bias": False, "layer_types": ["full_attention"] * 3}),
}
# Families that transformers has no class for.
OTHERS: dict[str, Fields] = {
    "step3": step3_model.step3_fields(**step3_model.KINDS["experts"]),
    "kimi": LATENT | {"model_type": "kimi_k2"},
    "ours": SMALL | {"model_type": "multimatrix", "attention": {"variant": "mha", "num_heads": 4, "head_dim": 8}},
}
# config.json of each case, as an author may have written it.
CONFIGS: dict[str, Fields] = {name: fields | {"model_type": kind} for name, (kind, fields) in PEERS.items()} | OTHERS

# Published models, as their config.json has them, and how many parameters their checkpoints hold.
PUBLISHED: dict[str, tuple[Fields, int]] = {
    "Llama-3-8B": (
        sizes("llama", 128_256, 4096, 14336, 32, 32, 8),
        8_030_261_248,
    ),
    "Qwen2.5-0.5B": (sizes("qwen2", 151_936, 896, 4864, 24, 14, 2, tie_word_embeddings=True), 494_032_768),
    "Qwen1.5-MoE-A2.7B": (
        sizes(
            *("qwen2_moe", 151_936, 2048, 5632, 24, 16, 16),
            **{"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408},
            shared_expert_intermediate_size=5632,
        ),
        14_315_784_192,
    ),
    "Qwen3-30B-A3B": (
        sizes(
            *("qwen3_moe", 151_936, 2048, 6144, 48, 32, 4),
            **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128},
        ),
        30_532_122_624,
    ),
    "Mixtral-8x7B": (
        sizes("mixtral", 32_000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2),
        46_702_792_704,
    ),
    "Gemma-2-9B": (
        sizes("gemma2", 256_000, 3584, 14336, 42, 16, 8, head_dim=256, sliding_window=4096),
        9_241_705_984,
    ),
    "DeepSeek-V2-Lite": (
        sizes(
            *("deepseek_v2", 102_400, 2048, 10944, 27, 16, 16),
            **{"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
            **{"v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
            **{"moe_intermediate_size": 1408, "first_k_dense_replace": 1},
        ),
        15_706_484_224,
    ),
    "Phi-2": (sizes("phi", 51_200, 2560, 10240, 32, 32, 32, partial_rotary_factor=0.4), 2_779_683_840),
    "Phi-3-mini": (sizes("phi3", 32_064, 3072, 8192, 32, 32, 32, sliding_window=2047), 3_821_079_552),
    "Phi-4": (sizes("phi3", 100_352, 5120, 17920, 40, 40, 10), 14_659_507_200),
    "Phi-3.5-MoE": (
        sizes(
            *("phimoe", 32_064, 4096, 6400, 32, 32, 8),
            **{"num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
        ),
        41_873_153_344,
    ),
    "gpt-oss-20b": (
        sizes(
            *("gpt_oss", 201_088, 2880, 2880, 24, 64, 8),
            **{"num_local_experts": 32, "num_experts_per_tok": 4, "head_dim": 64, "sliding_window": 128},
        ),
        20_914_757_184,
    ),
}


def peer(name: str, device: str = "meta", **options: Any) -> PreTrainedModel:
    """transformers' model of the case, as transformers builds it."""
    kind, fields = PEERS[name]
    config = AutoConfig.for_model(kind, **fields)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, **options)


def write_config(folder: Path, fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(fields), encoding="utf-8")
    return file
