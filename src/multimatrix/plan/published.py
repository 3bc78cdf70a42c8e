"""Published families of grouped-query attention: config.json as the arguments of `DecoderSizes`. No torch.

What our decoder has no place for is counted in other_parameters: biases, norms of queries and keys, sinks, gates of
shared experts.
"""

from __future__ import annotations

from multimatrix.errors import InputError
from multimatrix.plan.config_fields import CHUNKED, FULL, SLIDING, Fields
from multimatrix.plan.grouped import (
    QWEN_WINDOW,
    WINDOW,
    Sizes,
    attention_sizes,
    decoder_sizes,
    layer_spec,
    projection_biases,
    routed_experts,
    shared_experts,
    sparse_layers,
    uniform_layers,
    window_is_on,
    windows_above,
    windows_everywhere,
)


def llama(fields: Fields) -> Sizes:
    attention = attention_sizes(fields, groups=None)
    other = projection_biases(fields, attention, output=True) if fields.flag("attention_bias") else 0
    sizes = decoder_sizes(fields)
    if fields.flag("mlp_bias"):
        other += 2 * sizes["intermediate_size"] + attention["hidden_size"]
    return uniform_layers(fields, attention, sizes, other)


def mistral(fields: Fields) -> Sizes:
    if not fields.states("sliding_window"):
        raise InputError(
            f"{fields.place} has no sliding_window, for which Mistral's class takes 4096; write null if it has none"
        )
    return uniform_layers(fields, attention_sizes(fields), decoder_sizes(fields), 0, windows_everywhere(fields))


def ministral3(fields: Fields) -> Sizes:
    return uniform_layers(
        fields, attention_sizes(fields, divides=False), decoder_sizes(fields), 0, windows_everywhere(fields)
    )


def mixtral(fields: Fields) -> Sizes:
    experts = routed_experts(fields, fields.count("intermediate_size"))
    return uniform_layers(
        fields, attention_sizes(fields), decoder_sizes(fields), 0, windows_everywhere(fields), experts
    )


def qwen2(fields: Fields) -> Sizes:
    attention = attention_sizes(fields)
    biases = projection_biases(fields, attention, output=False)  # always there, and no field says so
    return uniform_layers(fields, attention, decoder_sizes(fields), biases, windows_above(fields))


def qwen2_moe(fields: Fields) -> Sizes:
    attention = attention_sizes(fields)
    other = projection_biases(fields, attention, output=False) if fields.flag("qkv_bias", True) else 0
    layers, chosen = fields.layers(), sparse_layers(fields)
    experts = routed_experts(fields, fields.count("moe_intermediate_size")) | {
        "shared_intermediate_size": fields.count("shared_expert_intermediate_size"),
        "layers": chosen,
    }
    on = window_is_on(fields)
    below = fields.count("max_window_layers", 0, default=28) if on else 0
    kinds = [SLIDING if layer % 2 == 0 and layer < below else FULL for layer in range(layers)]
    windows = fields.windows(kinds, QWEN_WINDOW if on else {})
    sizes = uniform_layers(fields, attention, decoder_sizes(fields), other, windows, experts if chosen else None)
    sizes["other_parameters"] += len(chosen) * attention["hidden_size"]  # a gate of the shared expert
    return sizes


def qwen3(fields: Fields) -> Sizes:
    attention = attention_sizes(fields, divides=False)
    return uniform_layers(
        fields, attention, decoder_sizes(fields), _qwen3_other(fields, attention), windows_above(fields)
    )


def qwen3_moe(fields: Fields) -> Sizes:
    attention, chosen = attention_sizes(fields, divides=False), sparse_layers(fields)
    experts = routed_experts(fields, fields.count("moe_intermediate_size")) | {"layers": chosen}
    kind = SLIDING if window_is_on(fields) else FULL
    windows = fields.windows([kind] * fields.layers(), QWEN_WINDOW)
    other = _qwen3_other(fields, attention)
    return uniform_layers(fields, attention, decoder_sizes(fields), other, windows, experts if chosen else None)


def _qwen3_other(fields: Fields, attention: Sizes) -> int:
    biases = projection_biases(fields, attention, output=True) if fields.flag("attention_bias") else 0
    return biases + 2 * attention["head_dim"]  # norms of queries and keys


def gemma(fields: Fields) -> Sizes:
    fields.only("use_bidirectional_attention", False)
    attention = attention_sizes(fields, divides=False)
    other = projection_biases(fields, attention, output=True) if fields.flag("attention_bias") else 0
    return uniform_layers(fields, attention, decoder_sizes(fields, tied=True), other)


def gemma2(fields: Fields) -> Sizes:
    return _windowed_gemma(fields, every=2, norms=False)


def gemma3(fields: Fields) -> Sizes:
    every = fields.count("sliding_window_pattern", default=fields.count("_sliding_window_pattern", default=6))
    return _windowed_gemma(fields, every, norms=True)


def _windowed_gemma(fields: Fields, every: int, *, norms: bool) -> Sizes:
    """Windows in every layer but each `every`-th; norms: of queries and keys, and Gemma 3's vocabulary."""
    fields.only("use_bidirectional_attention", False)
    attention = attention_sizes(fields, divides=False, heads=8, groups=4, head_dim=256)
    other = 2 * attention["head_dim"] if norms else 0
    if fields.flag("attention_bias"):
        other += projection_biases(fields, attention, output=True)
    kinds = [FULL if (layer + 1) % every == 0 else SLIDING for layer in range(fields.layers())]
    sizes = decoder_sizes(fields, tied=True, vocab_size=262_208 if norms else None)
    return uniform_layers(fields, attention, sizes, other, fields.windows(kinds, WINDOW)) | {"norms_per_layer": 4}


def glm(fields: Fields) -> Sizes:
    attention = attention_sizes(fields, divides=False, head_dim=128, rotary=0.5)
    other = projection_biases(fields, attention, output=False) if fields.flag("attention_bias", True) else 0
    return uniform_layers(fields, attention, decoder_sizes(fields), other)


def glm4(fields: Fields) -> Sizes:
    return glm(fields) | {"norms_per_layer": 4}


def glm4_moe(fields: Fields) -> Sizes:
    """Without layers for multi-token prediction, and without the router's bias, which no gradient trains."""
    attention = attention_sizes(fields, rotary=0.5)
    other = projection_biases(fields, attention, output=False) if fields.flag("attention_bias") else 0
    if fields.flag("use_qk_norm"):
        other += 2 * attention["head_dim"]
    return uniform_layers(
        fields, attention, decoder_sizes(fields), other, experts=shared_experts(fields, fields.layers())
    )


def phi(fields: Fields) -> Sizes:
    """Attention beside a feed-forward of two matrices, one norm before both, biases everywhere."""
    attention, sizes = attention_sizes(fields, groups=None, rotary=0.5), decoder_sizes(fields)
    hidden = attention["hidden_size"]
    other = projection_biases(fields, attention, output=True) + sizes["intermediate_size"] + hidden
    other += hidden  # the norm's bias
    if fields.flag("qk_layernorm"):
        other += 4 * attention["head_dim"]
    sizes = uniform_layers(fields, attention, sizes, other) | {"norms_per_layer": 1, "feed_forward_matrices": 2}
    sizes["other_parameters"] += hidden + sizes["vocab_size"]  # biases of the last norm and of the output head
    return sizes


def phi3(fields: Fields) -> Sizes:
    return uniform_layers(
        fields, attention_sizes(fields, groups=None), decoder_sizes(fields), 0, windows_everywhere(fields)
    )


def phimoe(fields: Fields) -> Sizes:
    attention, experts = attention_sizes(fields), routed_experts(fields, fields.count("intermediate_size"))
    hidden = attention["hidden_size"]
    other = 2 * hidden  # biases of the norms
    if fields.flag("attention_bias"):
        other += projection_biases(fields, attention, output=True)
    biased_head = fields.flag("lm_head_bias")
    sizes = uniform_layers(fields, attention, decoder_sizes(fields), other, windows_everywhere(fields), experts)
    sizes["other_parameters"] += hidden + (sizes["vocab_size"] if biased_head else 0)
    return sizes


def llama4(fields: Fields) -> Sizes:
    """Layers with RoPE see chunks of the context, those without see all of it."""
    attention, layers = attention_sizes(fields, divides=False), fields.layers()
    interval = fields.count("no_rope_layer_interval", default=4)
    rotated = fields.numbers("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(layers)]
    if len(rotated) < layers or any(flag not in (0, 1) for flag in rotated):
        raise fields.wrong("no_rope_layers", f"a list of 0 and 1 for each of the {layers} layers")
    has_chunks = "attention_chunk_size" in fields or not fields.states("attention_chunk_size")
    kinds = [CHUNKED if rope and has_chunks else FULL for rope in rotated[:layers]]
    windows = fields.windows(kinds, {CHUNKED: ("attention_chunk_size", 8192)})
    every = fields.count("interleave_moe_layer_step", default=1)
    chosen = fields.numbers("moe_layers") if "moe_layers" in fields else list(range(every - 1, layers, every))
    width = fields.count("intermediate_size")
    experts = routed_experts(fields, width) | {"shared_intermediate_size": width, "layers": chosen}
    other = projection_biases(fields, attention, output=True) if fields.flag("attention_bias") else 0
    sizes = decoder_sizes(fields, dense="intermediate_size_mlp")
    neutral = ("use_qk_norm", "attn_scale", "floor_scale", "attn_temperature_tuning", "for_llm_compressor")
    return uniform_layers(fields, attention, sizes, other, windows, experts if chosen else None, neutral) | {
        "specs": tuple(layer_spec(attention, rope=bool(flag)) for flag in rotated[:layers])
    }


def gpt_oss(fields: Fields) -> Sizes:
    """A learned sink for each head; biases in attention, router and experts."""
    attention = attention_sizes(fields, divides=False, head_dim=64)
    layers, hidden = fields.layers(), attention["hidden_size"]
    width = fields.count("intermediate_size")
    experts = routed_experts(fields, width)
    kinds = [SLIDING if layer % 2 == 0 else FULL for layer in range(layers)]
    other = attention["num_heads"] + experts["num_experts"]
    if fields.flag("attention_bias", True):
        other += projection_biases(fields, attention, output=True)
    of_expert = 2 * width + hidden
    windows = fields.windows(kinds, WINDOW)
    sizes = uniform_layers(fields, attention, decoder_sizes(fields), other, windows, experts, ("experts_per_token",))
    sizes["other_parameters"] += layers * experts["num_experts"] * of_expert
    sizes["idle_parameters"] = layers * (experts["num_experts"] - experts["experts_per_token"]) * of_expert
    return sizes
