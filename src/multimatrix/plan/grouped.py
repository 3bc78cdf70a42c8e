"""What config.json of families of grouped-query attention have in common, as the sizes of a decoder. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multimatrix.attention import AttentionSpec, make_spec
from multimatrix.errors import InputError
from multimatrix.model.experts import make_experts
from multimatrix.plan.config_fields import FULL, SLIDING, Fields

Sizes = dict[str, Any]
WINDOW: dict[str, tuple[str, int | None]] = {SLIDING: ("sliding_window", None)}
QWEN_WINDOW: dict[str, tuple[str, int | None]] = {SLIDING: ("sliding_window", 4096)}
# Of a router: which experts a token takes, not how many.
ROUTING = ("n_group", "topk_group", "routed_scaling_factor", "num_nextn_predict_layers", "num_mtp_layers")


def attention_sizes(
    fields: Fields,
    *,
    divides: bool = True,
    heads: int | None = None,
    groups: int | None = -1,
    head_dim: int | None = None,
    rotary: float = 1.0,
) -> Sizes:
    """Sizes of grouped-query attention, with hidden_size.

    divides: without head_dim, hidden_size is shared out to the heads. heads, groups, head_dim: defaults of the family's
    class; groups None is as many as heads, -1 is no default. rotary: the default of partial_rotary_factor.
    """
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads", default=heads)
    if "head_dim" in fields or not divides:
        head_dim = fields.count("head_dim", default=head_dim)
    elif hidden % heads:
        raise InputError(
            f"{fields.place} has no head_dim, and its hidden_size of {hidden} does not divide into {heads} heads; add "
            "head_dim"
        )
    else:
        head_dim = hidden // heads
    groups = fields.count("num_key_value_heads", default=heads if groups is None else groups if groups > 0 else None)
    share = fields.share("partial_rotary_factor", rotary)
    return {
        "hidden_size": hidden,
        "num_heads": heads,
        "head_dim": head_dim,
        "num_kv_heads": groups,
        "rotary_dim": None if share == 1 else int(head_dim * share),
    }


def layer_spec(attention: Sizes, *, rope: bool = True) -> AttentionSpec:
    sizes = {name: value for name, value in attention.items() if name != "hidden_size" and value is not None}
    if not rope:
        sizes |= {"position": "none"}
    return make_spec(attention["hidden_size"], {"variant": "gqa", **sizes})


def decoder_sizes(
    fields: Fields, *, tied: bool = False, vocab_size: int | None = None, dense: str = "intermediate_size"
) -> Sizes:
    """What all families have; dense: the field that has the width of the dense feed-forward."""
    return {
        "vocab_size": fields.count("vocab_size", default=vocab_size),
        "intermediate_size": fields.count(dense),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", tied),
    }


def uniform_layers(
    fields: Fields,
    attention: Sizes,
    sizes: Sizes,
    other: int,
    windows: Sequence[int | None] = (),
    experts: Sizes | None = None,
    neutral: Sequence[str] = (),
) -> Sizes:
    """Layers of one kind of attention; other: parameters of each that our decoder has no place for."""
    layers = fields.layers()
    if not windows:
        fields.windows([FULL] * layers, {})
    return {
        "specs": (layer_spec(attention),) * layers,
        **sizes,
        "experts": None if experts is None else make_experts(experts),
        "windows": tuple(windows),
        "other_parameters": other * layers,
        "unread_fields": fields.unread(*neutral, *ROUTING),
    }


def projection_biases(fields: Fields, attention: Sizes, *, output: bool) -> int:
    """Biases of the projections of queries, keys and values, and of the output."""
    heads = attention["num_heads"] + 2 * attention["num_kv_heads"]
    return heads * attention["head_dim"] + (attention["hidden_size"] if output else 0)


def windows_everywhere(fields: Fields) -> tuple[int | None, ...]:
    """A window in every layer, where one is stated."""
    kind = SLIDING if "sliding_window" in fields else FULL
    return fields.windows([kind] * fields.layers(), WINDOW)


def window_is_on(fields: Fields) -> bool:
    """Whether Qwen's window is in use: it is 4096 unless stated, may be null, and has to be switched on."""
    has_one = "sliding_window" in fields or not fields.states("sliding_window")
    return fields.flag("use_sliding_window") and has_one


def windows_above(fields: Fields) -> tuple[int | None, ...]:
    """Qwen's window in the layers from max_window_layers on."""
    on, layers = window_is_on(fields), fields.layers()
    first = fields.count("max_window_layers", 0, default=28) if on else layers
    kinds = [SLIDING if layer >= first else FULL for layer in range(layers)]
    return fields.windows(kinds, QWEN_WINDOW if on else {})


def routed_experts(fields: Fields, width: int) -> Sizes:
    """Experts without a shared one. Their number has two names in transformers."""
    number = "num_experts" if fields.states("num_experts") else "num_local_experts"
    return {
        "num_experts": fields.count(number),
        "experts_per_token": fields.count("num_experts_per_tok"),
        "intermediate_size": width,
    }


def sparse_layers(fields: Fields) -> list[int]:
    """Qwen's layers with experts: every decoder_sparse_step-th but those of mlp_only_layers."""
    every, dense = fields.count("decoder_sparse_step", default=1), fields.numbers("mlp_only_layers")
    return [layer for layer in range(fields.layers()) if (layer + 1) % every == 0 and layer not in dense]


def shared_experts(fields: Fields, layers: int) -> Sizes | None:
    """DeepSeek's experts, with shared ones, in all layers from first_k_dense_replace on."""
    fields.only("moe_layer_freq", 1)
    width, dense = fields.count("moe_intermediate_size"), fields.count("first_k_dense_replace", 0)
    experts = {
        "num_experts": fields.count("n_routed_experts"),
        "experts_per_token": fields.count("num_experts_per_tok"),
        "intermediate_size": width,
        "shared_intermediate_size": width * fields.count("n_shared_experts", 0),
        "layers": list(range(dense, layers)),
    }
    return experts if dense < layers else None
