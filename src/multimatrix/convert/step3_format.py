"""Step-3's checkpoint format (Step-3 report, arXiv 2507.19427, and its published configuration) beside ours, as data.

    attention   q = R wq inter_norm(q_proj x), k = R k_proj x, v = v_proj x, o_proj over the heads: our MFA with
                query_norm, scale head_dim^-0.5 and RoPE (half-split pairs) over the whole head
    layer       x + attention(input_layernorm x), then x + feed_forward(post_attention_layernorm x)
    dense       mlp.down_proj(silu(mlp.gate_proj x) * mlp.up_proj x)
    experts     p = softmax over all of moe.gate x; the moe_top_k largest weigh their experts, divided by their sum
                where norm_expert_weight; share_expert is added with weight one

Both sides store the same numbers in the same shapes, so a conversion renames tensors and changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from multimatrix.model.configuration import MultimatrixConfig
    from multimatrix.model.experts import ExpertsSpec

MODEL_TYPE = "step3_text"
VISION_MODEL_TYPE = "step3_vl"
ARCHITECTURE = "Step3TextForCausalLM"

# ---- config fields: ours -> Step-3's, the same value under both names --------------------------------------------

MODEL_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
}
ATTENTION_FIELDS = {"num_heads": "num_attention_heads", "head_dim": "head_dim", "query_rank": "share_q_dim"}
EXPERT_FIELDS = {
    "num_experts": "moe_num_experts",
    "experts_per_token": "moe_top_k",
    "intermediate_size": "moe_intermediate_size",
    "shared_intermediate_size": "share_expert_dim",
}
# Which layers have experts is the string moe_layers_enum, and whether weights are divided by their sum:
NORMALIZE, LAYERS = "norm_expert_weight", "moe_layers_enum"
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The usable context and the length of the rotary table; the third is transformers' own word.
CONTEXT_FIELDS = ("max_seq_len", "max_position_embedding", "max_position_embeddings")
# Fields that would change the function, with what they may say.
FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "num_attention_groups": (1, None),
    "hidden_act": ("silu", None),
    "tie_word_embeddings": (False, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_qk_norm": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, None),
    "moe_router_activation": ("softmax", None),
    "use_moe_router_bias": (False, None),
    "quantization_config": (None,),
    "compression_config": (None,),
}
# Fields that change nothing that is computed: bookkeeping, training, and what moe_layers_enum overrules.
NEUTRAL_FIELDS = {
    "architectures", "auto_map", "model_type", "transformers_version", "_name_or_path", "_attn_implementation",
    "torch_dtype", "dtype", "use_cache", "initializer_range", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "use_moe", "moe_layer_offset", "moe_every_n_layer",
}  # fmt: skip
KNOWN_FIELDS = {
    *MODEL_FIELDS.values(), *ATTENTION_FIELDS.values(), *EXPERT_FIELDS.values(), NORMALIZE, LAYERS, *TOKEN_FIELDS,
    *CONTEXT_FIELDS, *FIXED_FIELDS, *NEUTRAL_FIELDS, "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip

# ---- tensors of a layer: ours -> Step-3's ------------------------------------------------------------------------

ATTENTION_TENSORS = {
    "q_a_proj": "q_proj",
    "q_a_norm": "inter_norm",
    "q_b_proj": "wq",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
}
EXPERT_TENSORS = {
    "mlp.router.weight": "moe.gate.weight",
    "mlp.experts.gate_proj": "moe.gate_proj.weight",
    "mlp.experts.up_proj": "moe.up_proj.weight",
    "mlp.experts.down_proj": "moe.down_proj.weight",
    "mlp.shared_expert.gate_proj.weight": "share_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight": "share_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight": "share_expert.down_proj.weight",
}
# What the weights may be stored as.
DTYPES = ("float64", "float32", "float16", "bfloat16")
VISION_TENSORS = ("vision_model.", "vit_downsampler.", "vit_downsampler2.", "vit_large_projector.")


class Row(NamedTuple):
    """One tensor: our name, Step-3's, and its shape on both sides."""

    ours: str
    theirs: str
    shape: tuple[int, ...]


def tensor_rows(config: MultimatrixConfig) -> Iterator[Row]:
    """Every tensor of the model, in the order in which it runs."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    experts = config.experts_spec()
    yield _same("model.embed_tokens.weight", vocabulary, hidden)
    for layer, spec in enumerate(config.layer_specs()):
        at = f"model.layers.{layer}."
        yield _same(f"{at}input_layernorm.weight", hidden)
        for weight in spec.weights:
            theirs = ATTENTION_TENSORS[weight.name]
            yield Row(f"{at}self_attn.{weight.name}.weight", f"{at}self_attn.{theirs}.weight", weight.shape)
        yield _same(f"{at}post_attention_layernorm.weight", hidden)
        if experts is not None and experts.has_experts(layer):
            for (ours, theirs), shape in zip(EXPERT_TENSORS.items(), _expert_shapes(experts, hidden), strict=True):
                yield Row(at + ours, at + theirs, shape)
        else:
            for name, shape in zip(("gate", "up", "down"), _glu_shapes(config.intermediate_size, hidden), strict=True):
                yield _same(f"{at}mlp.{name}_proj.weight", *shape)
    yield _same("model.norm.weight", hidden)
    yield _same("lm_head.weight", vocabulary, hidden)


def _same(name: str, *shape: int) -> Row:
    return Row(name, name, shape)


def _glu_shapes(width: int, hidden: int) -> list[tuple[int, ...]]:
    return [(width, hidden), (width, hidden), (hidden, width)]


def _expert_shapes(experts: ExpertsSpec, hidden: int) -> list[tuple[int, ...]]:
    count = experts.num_experts
    routed = [(count, *shape) for shape in _glu_shapes(experts.intermediate_size, hidden)]
    return [(count, hidden), *routed, *_glu_shapes(experts.shared_intermediate_size, hidden)]


def layers_text(layers: Iterable[int]) -> str:
    """moe_layers_enum: the layers that have experts, "-1" for none, which no layer's number equals."""
    return ",".join(map(str, sorted(layers))) or "-1"
