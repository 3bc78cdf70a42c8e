"""config.json of the model families that can be planned, field by field. No torch.

A family reads every field that changes what is counted, refuses values that it cannot count, and says which fields it
did not know. Nothing is guessed: a default is taken only where transformers' class of the family has that default and
published configurations leave the field out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multimatrix.attention import make_spec, make_specs
from multimatrix.convert.step3_config import from_step3
from multimatrix.errors import InputError
from multimatrix.model.experts import make_experts
from multimatrix.plan.model import check_layers

# Bookkeeping, training, tokens and positions: nothing that is counted here depends on them.
NEUTRAL = {
    "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "name_or_path", "dtype",
    "torch_dtype", "use_cache", "initializer_range", "attention_dropout", "hidden_act", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "max_position_embeddings", "max_window_layers", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "pretraining_tp", "_attn_implementation", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "output_router_logits", "router_aux_loss_coef", "quantization_config", "tokenizer_class",
}  # fmt: skip
OURS_NEUTRAL = {"depth_scaled_init", "zero_init_output", "skip_logits", "provenance"}
# Of DeepSeek's mixture of experts: which experts a token takes, not how many.
ROUTING = {
    "aux_loss_alpha", "ep_size", "n_group", "topk_group", "topk_method", "norm_topk_prob", "scoring_func", "seq_aux",
    "routed_scaling_factor", "num_nextn_predict_layers", "num_key_value_heads", "rope_interleave", "qk_head_dim",
    "head_dim", "num_mtp_layers",
}  # fmt: skip


class Fields:
    """The fields of one config.json; what was asked for is remembered."""

    def __init__(self, place: Path, fields: Mapping[str, Any]) -> None:
        self.place, self._fields, self._read = place, fields, set(NEUTRAL)

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.get(name) is not None

    def get(self, name: str) -> Any:
        self._read.add(name)
        return self._fields.get(name)

    def states(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        return name in self._fields

    def all(self) -> Mapping[str, Any]:
        """Every field, for a reader that checks them itself."""
        self._read.update(self._fields)
        return self._fields

    def count(self, name: str, minimum: int = 1) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            has = f"{name} = {value!r}" if name in self._fields else f"no {name}"
            raise InputError(f"{self.place} has {has}, which must be a whole number of at least {minimum}")
        return value

    def layers(self) -> int:
        value = self.count("num_hidden_layers")
        check_layers(f"num_hidden_layers of {self.place}", value)
        return value

    def flag(self, name: str) -> bool:
        """A switch that is off where it is left out."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"{self.place} has {name} = {value!r}, which must be true or false")
        return bool(value)

    def only(self, name: str, allowed: Any) -> None:
        """InputError unless the field is left out, null or says just this."""
        value = self.get(name)
        if value is not None and value != allowed:
            raise InputError(f"{self.place} has {name} = {value!r}, which cannot be planned; only {allowed!r} can")

    def unread(self, *neutral: str) -> tuple[str, ...]:
        return tuple(sorted(set(self._fields) - self._read - set(neutral)))


def _decoder(fields: Fields) -> dict[str, Any]:
    """What all families call by the same names."""
    return {
        "vocab_size": fields.count("vocab_size"),
        "intermediate_size": fields.count("intermediate_size"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
    }


def _grouped(fields: Fields, *, default_head_dim: bool, default_groups: bool) -> tuple[int, dict[str, Any]]:
    """Hidden size and attention sizes of grouped-query attention over the whole context."""
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if "head_dim" in fields or not default_head_dim:
        head_dim = fields.count("head_dim")
    elif hidden % heads:
        raise InputError(
            f"{fields.place} has no head_dim, and its hidden_size of {hidden} does not divide into {heads} heads; add "
            "head_dim"
        )
    else:
        head_dim = hidden // heads
    groups = fields.count("num_key_value_heads") if "num_key_value_heads" in fields or not default_groups else heads
    layer_types = fields.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * fields.layers():
        raise InputError(
            f"{fields.place} has layer_types other than full_attention for each of its {fields.layers()} layers; "
            "sliding windows and other kinds of layers cannot be planned yet"
        )
    return hidden, {"variant": "gqa", "num_heads": heads, "head_dim": head_dim, "num_kv_heads": groups}


def _full_attention(fields: Fields) -> None:
    """InputError where a window may be in use: these classes have one that is off unless it is switched on."""
    window = fields.get("sliding_window")
    if fields.flag("use_sliding_window") and (window is not None or not fields.states("sliding_window")):
        raise _windowed(fields, window or "the class's 4096")


def _no_window(fields: Fields) -> None:
    """InputError where there is a window: these classes use it whenever it is stated."""
    window = fields.get("sliding_window")
    if window is not None:
        raise _windowed(fields, window)


def _windowed(fields: Fields, window: Any) -> InputError:
    return InputError(f"{fields.place} has a sliding window of {window} tokens; windows cannot be planned yet")


def llama(fields: Fields) -> dict[str, Any]:
    hidden, attention = _grouped(fields, default_head_dim=True, default_groups=True)
    sizes = _decoder(fields)
    layers = fields.layers()
    other = _attention_biases(hidden, attention, output=True) if fields.flag("attention_bias") else 0
    if fields.flag("mlp_bias"):
        other += 2 * sizes["intermediate_size"] + hidden
    return _uniform(fields, hidden, attention, layers, sizes, other)


def mistral(fields: Fields) -> dict[str, Any]:
    hidden, attention = _grouped(fields, default_head_dim=True, default_groups=False)
    if not fields.states("sliding_window"):
        raise InputError(
            f"{fields.place} has no sliding_window, for which Mistral's class takes 4096; write null if it has none"
        )
    _no_window(fields)
    return _uniform(fields, hidden, attention, fields.layers(), _decoder(fields), 0)


def qwen2(fields: Fields) -> dict[str, Any]:
    hidden, attention = _grouped(fields, default_head_dim=True, default_groups=False)
    _full_attention(fields)
    biases = _attention_biases(hidden, attention, output=False)  # always there, and no field says so
    return _uniform(fields, hidden, attention, fields.layers(), _decoder(fields), biases)


def qwen3(fields: Fields) -> dict[str, Any]:
    return _qwen3(fields, None)


def qwen3_moe(fields: Fields) -> dict[str, Any]:
    layers = fields.layers()
    every = fields.count("decoder_sparse_step") if "decoder_sparse_step" in fields else 1
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise InputError(f"{fields.place} has mlp_only_layers = {dense!r}, which must be a list of layer numbers")
    with_experts = [layer for layer in range(layers) if (layer + 1) % every == 0 and layer not in dense]
    experts = _routed(fields, fields.count("moe_intermediate_size"))
    return _qwen3(fields, experts | {"layers": with_experts} if with_experts else None)


def _qwen3(fields: Fields, experts: dict[str, Any] | None) -> dict[str, Any]:
    hidden, attention = _grouped(fields, default_head_dim=False, default_groups=False)
    _full_attention(fields)
    other = 2 * attention["head_dim"]  # norms of queries and keys
    if fields.flag("attention_bias"):
        other += _attention_biases(hidden, attention, output=True)
    return _uniform(fields, hidden, attention, fields.layers(), _decoder(fields), other, experts)


def mixtral(fields: Fields) -> dict[str, Any]:
    hidden, attention = _grouped(fields, default_head_dim=True, default_groups=False)
    _no_window(fields)
    experts = _routed(fields, fields.count("intermediate_size"))
    return _uniform(fields, hidden, attention, fields.layers(), _decoder(fields), 0, experts)


def _routed(fields: Fields, width: int) -> dict[str, Any]:
    """Experts without a shared one. Their number has two names in transformers."""
    number = "num_experts" if fields.states("num_experts") else "num_local_experts"
    return {
        "num_experts": fields.count(number),
        "experts_per_token": fields.count("num_experts_per_tok"),
        "intermediate_size": width,
    }


def deepseek_v3(fields: Fields) -> dict[str, Any]:
    """Without layers for multi-token prediction, and without the router's bias, which no gradient trains."""
    hidden, layers = fields.count("hidden_size"), fields.layers()
    fields.only("attention_bias", False)
    fields.only("moe_layer_freq", 1)
    if not fields.states("q_lora_rank"):
        raise InputError(f"{fields.place} has no q_lora_rank; write null if its queries have full rank")
    attention = {
        "variant": "mla",
        "num_heads": fields.count("num_attention_heads"),
        "head_dim": fields.count("qk_nope_head_dim"),
        "rope_head_dim": fields.count("qk_rope_head_dim"),
        "value_head_dim": fields.count("v_head_dim"),
        "latent_dim": fields.count("kv_lora_rank"),
        "query_rank": fields.count("q_lora_rank") if "q_lora_rank" in fields else None,
    }
    width, dense = fields.count("moe_intermediate_size"), fields.count("first_k_dense_replace", 0)
    experts = {
        "num_experts": fields.count("n_routed_experts"),
        "experts_per_token": fields.count("num_experts_per_tok"),
        "intermediate_size": width,
        "shared_intermediate_size": width * fields.count("n_shared_experts", 0),
        "layers": list(range(dense, layers)),
    }
    return {
        "specs": tuple(make_specs(hidden, attention, layers)),
        **_decoder(fields),
        "experts": make_experts(experts) if dense < layers else None,
        "unread_fields": fields.unread(*ROUTING),
    }


def step3(fields: Fields) -> dict[str, Any]:
    fields.layers()
    try:
        return _ours(from_step3(fields.all(), ()))
    except InputError as error:
        raise InputError(f"{fields.place} cannot be planned: {error}") from error


def multimatrix(fields: Fields) -> dict[str, Any]:
    fields.count("hidden_size")
    fields.layers()
    sizes = _decoder(fields)
    known = {name: fields.get(name) for name in ("hidden_size", "num_hidden_layers", "attention", "mixture_of_experts")}
    return _ours(known | sizes) | {"unread_fields": fields.unread(*OURS_NEUTRAL)}


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


def _uniform(
    fields: Fields,
    hidden: int,
    attention: dict[str, Any],
    layers: int,
    sizes: dict[str, Any],
    other: int,
    experts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Layers whose attention is alike; other: parameters of each that our decoder has no place for."""
    return {
        "specs": (make_spec(hidden, attention),) * layers,
        **sizes,
        "experts": None if experts is None else make_experts(experts),
        "other_parameters": other * layers,
        "unread_fields": fields.unread("norm_topk_prob", "router_jitter_noise"),
    }


def _attention_biases(hidden: int, attention: Mapping[str, Any], *, output: bool) -> int:
    """Biases of the projections of queries, keys and values, and of the output."""
    heads = attention["num_heads"] + 2 * attention["num_kv_heads"]
    return heads * attention["head_dim"] + (hidden if output else 0)


FAMILIES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "multimatrix": multimatrix,
    "step3_text": step3,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
    "kimi_k2": deepseek_v3,
}
