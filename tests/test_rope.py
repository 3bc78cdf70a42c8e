"""RoPE past the training length: linear and YaRN scaling at four times it, against independent computations."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cases import CASES, DECODERS, logits_in_chunks, padded, random_ids, random_model
from multimatrix.ops.reference import reference_attention, rms_norm, turn
from multimatrix.ops.rotary import RopeParameters

TRAINED = 8
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
    # Turns within 8 tokens are few, so the ramp is set to lie between the pairs of these small heads.
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 100.0,
        "original_max_position_embeddings": TRAINED,
        "beta_fast": 0.9,
        "beta_slow": 0.05,
    },
    "yarn-plain": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 50.0,
        "original_max_position_embeddings": TRAINED,
        "beta_fast": 1.5,
        "beta_slow": 0.1,
        "attention_factor": 0.8,
        "truncate": False,
    },
}
MODELS = DECODERS | {
    name: [CASES[name]] * 2 for name in ("mfa_kr-key_reuse=relative-rotary_blocks=2", "gqa-rotary_dim=2")
}
every_scaling = pytest.mark.parametrize("rope", SCALINGS.values(), ids=SCALINGS.keys())


@torch.no_grad()
def reference_logits(model, ids):
    """The whole decoder in float64 from the equations, attention by the oracle: ids [T] -> [T, vocab_size]."""
    rope = RopeParameters.from_dict(model.config.rope_parameters)
    x = model.model.embed_tokens.weight[ids]  # [T, H]
    for layer in model.model.layers:
        weights = {name.removesuffix(".weight"): p for name, p in layer.self_attn.named_parameters()}
        normed = rms_norm(x, layer.input_layernorm.weight)
        x = x + reference_attention(layer.self_attn.spec, weights, normed, rope=rope)
        normed = rms_norm(x, layer.post_attention_layernorm.weight)
        gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        x = x + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    return rms_norm(x, model.model.norm.weight) @ model.lm_head.weight.T


@every_scaling
@pytest.mark.parametrize("specs", MODELS.values(), ids=MODELS.keys())
def test_logits_at_four_times_the_training_length(specs, rope):
    model = random_model(specs, rope_parameters=rope, max_position_embeddings=4 * TRAINED)
    ids = random_ids(4 * TRAINED)
    expected = reference_logits(model, ids)
    tight = {"rtol": 1e-9, "atol": 1e-9}
    assert_close(model(ids[None]).logits[0].detach(), expected, **tight)
    stepped = logits_in_chunks(model, ids[None], [20, *[1] * 12], DynamicCache(config=model.config))
    assert_close(stepped[0], expected, **tight)
    rows, mask = padded([ids, ids[:9]])
    assert_close(model(rows, attention_mask=mask).logits[1, -9:].detach(), expected[:9], **tight)
    if any(spec.rope_dim for spec in specs):
        plain = model.config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        assert not torch.isclose(model(ids[None]).logits[0, 1:], expected[1:]).all(-1).any(), plain


@every_scaling
@pytest.mark.parametrize("dim", [4, 8, 10, 64])
def test_frequencies_are_those_of_transformers_and_of_the_oracle(rope, dim):
    ours = RopeParameters.from_dict(rope)
    config = LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, head_dim=dim, rope_parameters=dict(rope))
    theirs, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    assert_close(ours.frequencies(dim).float(), theirs, rtol=1e-5, atol=1e-7)
    assert factor**2 == pytest.approx(ours.score_factor)
    oracle = torch.tensor([turn(pair, dim, ours) for pair in range(dim // 2)], dtype=torch.float64)
    assert_close(ours.frequencies(dim), oracle, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("length", "theta"), [(4096, 10_000.0), (32_768, 1e6), (2048, 500_000.0)], ids=["llama", "qwen", "paper"]
)
def test_frequencies_at_real_sizes(length, theta):
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": theta, "original_max_position_embeddings": length}
    config = LlamaConfig(hidden_size=1024, num_attention_heads=8, head_dim=128, rope_parameters=dict(rope))
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    ours = RopeParameters.from_dict(rope)
    assert_close(ours.frequencies(128).float(), theirs, rtol=1e-5, atol=0)
    assert factor**2 == pytest.approx(ours.score_factor)


@every_scaling
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_whole_llama(groups, rope):
    """transformers' Llama with the same weights, at four times the length; its angles are float32."""
    ours = random_model([CASES[{4: "mha", 2: "gqa", 1: "mqa"}[groups]]] * 2, rope_parameters=rope, rms_norm_eps=1e-6)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=8,
        rope_parameters=dict(rope),
        max_position_embeddings=4 * TRAINED,
    )
    theirs = LlamaForCausalLM(config).double().eval()
    theirs.load_state_dict(ours.state_dict())
    ids = random_ids(2, 4 * TRAINED)
    assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
