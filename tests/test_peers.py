"""Oracles nobody here wrote: transformers' Llama and DeepSeek-V3 attention with the same weights."""

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from cases import random_attention, weights_of
from multimatrix.attention import make_spec

B, T, H = 2, 9, 32


def peer_output(attention, rotary, x):
    """Theirs, causal, at positions 0..T-1."""
    position_ids = torch.arange(x.shape[1])[None]
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)[None, None]
    return attention(x, position_embeddings=rotary(x, position_ids), attention_mask=mask)[0]


@pytest.mark.parametrize("groups", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_llama(groups):
    sizes = {4: {"variant": "mha"}, 2: {"variant": "gqa", "num_kv_heads": 2}, 1: {"variant": "mqa"}}[groups]
    ours = random_attention(make_spec(H, sizes | {"num_heads": 4, "head_dim": 8}))
    config = LlamaConfig(
        hidden_size=H,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=8,
        attn_implementation="eager",
    )
    theirs = LlamaAttention(config, 0).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(B, T, H, dtype=torch.float64)
    expected = peer_output(theirs, LlamaRotaryEmbedding(config), x)
    # Their angles are float32.
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_rank", [None, 12])
@pytest.mark.parametrize("interleaved", [False, True])
def test_deepseek_v3(query_rank, interleaved):
    spec = make_spec(
        H,
        {
            "variant": "mla",
            "num_heads": 4,
            "head_dim": 8,
            "rope_head_dim": 4,
            "latent_dim": 16,
            "value_head_dim": 6,
            "query_rank": query_rank,
        },
    )
    ours = random_attention(spec)
    config = DeepseekV3Config(
        hidden_size=H,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=query_rank,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        rope_interleave=interleaved,
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(config, 0).double()
    names = {
        "q_a_norm": "q_a_layernorm",
        "kv_a_proj": "kv_a_proj_with_mqa",
        "kv_a_norm": "kv_a_layernorm",
    }
    weights = weights_of(ours)
    if interleaved:
        # Their pairs lie side by side, ours half a head apart.
        order = torch.arange(4).view(2, 2).T.flatten()
        weights = dict(weights)
        last = "q_proj" if query_rank is None else "q_b_proj"
        per_head = weights[last].detach().clone().unflatten(0, (4, 12))
        per_head[:, 8:] = per_head[:, 8:][:, order.argsort()]
        weights[last] = per_head.flatten(0, 1)
        down = weights["kv_a_proj"].detach().clone()
        down[16:] = down[16:][order.argsort()]
        weights["kv_a_proj"] = down
    theirs.load_state_dict({f"{names.get(name, name)}.weight": value for name, value in weights.items()})
    x = torch.randn(B, T, H, dtype=torch.float64)
    expected = peer_output(theirs, DeepseekV3RotaryEmbedding(config), x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
