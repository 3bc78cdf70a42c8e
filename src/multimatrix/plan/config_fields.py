"""The fields of a config.json, read with care: every one is checked, and what was asked for is remembered. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multimatrix.errors import InputError
from multimatrix.fields import LARGEST
from multimatrix.plan.model import check_layers

# Bookkeeping, training, generation, tokens, positions and activations: nothing that is counted here depends on them.
NEUTRAL = {
    "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "name_or_path", "dtype",
    "torch_dtype", "use_cache", "initializer_range", "attention_dropout", "hidden_act", "hidden_activation",
    "rms_norm_eps", "layer_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq",
    "default_theta", "max_position_embeddings", "original_max_position_embeddings", "initial_context_length",
    "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp",
    "_attn_implementation", "attn_implementation", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise", "norm_topk_prob", "quantization_config",
    "tokenizer_class", "cache_implementation", "embd_pdrop", "resid_pdrop", "attn_logit_softcapping",
    "final_logit_softcapping", "query_pre_attn_scalar", "swiglu_alpha", "swiglu_limit", "base_model_tp_plan",
    "_attn_implementation_autoset", "torchscript", "use_bfloat16", "tf_legacy_loss", "finetuning_task",
    "task_specific_params", "prefix", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "max_length", "min_length",
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "num_return_sequences", "return_dict_in_generate", "output_scores", "exponential_decay_length_penalty",
    "remove_invalid_values",
}  # fmt: skip
# Switches that many configurations state and few families read: nothing is said of one that is off.
SWITCHES = {
    "attention_bias", "mlp_bias", "use_mrope", "add_cross_attention", "cross_attention_hidden_size", "is_decoder",
    "tie_encoder_decoder", "pruned_heads", "use_qk_norm", "use_sliding_window", "per_layer_config",
}  # fmt: skip
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


class Fields:
    """The fields of one model, and `place`, what an error calls the file that they come from.

    A default that a method takes is that of transformers' class of the family, given only where published
    configurations leave the field out. A field that is null counts as left out.
    """

    def __init__(self, place: Any, fields: Mapping[str, Any]) -> None:
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

    def known(self, names: set[str]) -> dict[str, Any]:
        """Those of the fields that are there, for a reader that checks them itself."""
        self._read.update(names)
        return {name: value for name, value in self._fields.items() if name in names}

    def count(self, name: str, minimum: int = 1, default: int | None = None) -> int:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= LARGEST:
            raise self.wrong(name, f"a whole number from {minimum} to {LARGEST:,}")
        return value

    def layers(self) -> int:
        value = self.count("num_hidden_layers")
        check_layers(f"num_hidden_layers of {self.place}", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return default if value is None else value

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers, empty where it is left out."""
        value = [] if self.get(name) is None else self.get(name)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.wrong(name, "a list of whole numbers")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """InputError unless the field is left out, null or says one of these."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise InputError(
                f"{self.place} has {name} = {shown(value)}, which cannot be planned; only {shown(allowed[0])} can"
            )

    def share(self, name: str, default: float) -> float:
        """A part of a whole, which may also stand in rope_parameters."""
        table = self.get("rope_parameters")
        value = self.get(name)
        if value is None and isinstance(table, dict):
            value = table.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise InputError(f"{self.place} has {name} = {shown(value)}, which must be above 0 and at most 1")
        return value

    def windows(self, kinds: list[str], sizes: Mapping[str, tuple[str, int | None]]) -> tuple[int | None, ...]:
        """How many tokens a token sees in each layer, None for all; empty where every layer sees all.

        kinds: of the layers, where layer_types does not state them. sizes: the field that says how many a kind sees,
        and its default.
        """
        stated = self.get("layer_types")
        if stated is not None:
            if not isinstance(stated, list) or len(stated) != len(kinds):
                raise self.wrong("layer_types", f"a list with one kind for each of the {len(kinds)} layers")
            kinds = stated
        self._read.update(field for field, _ in sizes.values())
        seen: dict[Any, int | None] = {FULL: None}
        for kind in kinds:
            if not isinstance(kind, str) or (kind != FULL and kind not in sizes):
                raise InputError(
                    f"{self.place} has a layer of kind {shown(kind)}, which cannot be planned; those that can are "
                    f"{', '.join([FULL, *sizes])}"
                )
            if kind not in seen:
                field, default = sizes[kind]
                if self.states(field) and field not in self:
                    raise self.wrong(field, f"a whole number, as it has layers of kind {kind}")
                seen[kind] = self.count(field, default=default)
        windows = tuple(seen[kind] for kind in kinds)
        return windows if any(windows) else ()

    def wrong(self, name: str, wanted: str) -> InputError:
        has = f"{name} = {shown(self._fields[name])}" if name in self._fields else f"no {name}"
        return InputError(f"{self.place} has {has}, which must be {wanted}")

    def unread(self, *neutral: str) -> tuple[str, ...]:
        """The fields that nobody asked for, but those that are neutral here and switches that are off."""
        off = {name for name in SWITCHES if not self._fields.get(name)}
        return tuple(sorted(set(self._fields) - self._read - off - set(neutral)))


def shown(value: Any) -> str:
    """A value in a sentence, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
