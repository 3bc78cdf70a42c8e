"""Configuration of a decoder whose layers may each have an attention variant of their own."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from multimatrix.attention import AttentionSpec, make_spec
from multimatrix.errors import InputError
from multimatrix.model.experts import ExpertsSpec, make_experts


@strict
class MultimatrixConfig(PreTrainedConfig):
    r"""
    attention: the sizes of the attention variant, `{"variant": "mfa", "num_heads": 18, "head_dim": 256,
        "query_rank": 256}`, or a list with one such entry per layer (a hybrid). The field names are those of the
        variant's spec. None: MHA with heads of 64.
    rope_parameters: `{"rope_type": "default", "rope_theta": 10000.0}`.
    depth_scaled_init: divide the initial std of layer l's second feed-forward matrix by sqrt(2 l), l = 1..L, as
        the MFA paper does.
    zero_init_output: start every layer's attention output at zero (`output_weight` of its spec), for every variant.
    mixture_of_experts: experts in place of the dense feed-forward, `{"num_experts": 8, "experts_per_token": 2,
        "intermediate_size": 512, "shared_intermediate_size": 512}`; the fields are those of `ExpertsSpec`. Layers that
        its `layers` leaves out keep the dense one of `intermediate_size`.
    output_router_logits: return the router's logits and the load-balancing loss, which while training is added to the
        loss with the factor router_aux_loss_coef. Set it when you train a mixture of experts.

    Initialization: linear and embedding weights from a normal distribution of std `initializer_range`, norm scales
    at 1, gates (MFA-KR's alpha) at 0. Latent scaling is a field of every spec.

    Raises:
        InputError: the sizes cannot work together.
    """

    model_type = "multimatrix"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "router_logits", "aux_loss"]  # noqa: RUF012

    vocab_size: int = 32_000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    max_position_embeddings: int = 2048
    attention: dict | list | None = None
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    depth_scaled_init: bool = False
    zero_init_output: bool = False
    mixture_of_experts: dict | None = None
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attention is None:
            self.attention = {"variant": "mha", "num_heads": max(1, self.hidden_size // 64), "head_dim": 64}
        super().__post_init__(**kwargs)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 < self.initializer_range <= 1:
            raise InputError(f"initializer_range must be above 0 and at most 1, got {self.initializer_range}")
        scaling = (self.rope_parameters or {}).get("rope_type", "default")
        if scaling != "default":
            raise InputError(f"rope_type {scaling!r} is not supported yet; use 'default'")
        self.layer_specs()
        if (experts := self.experts_spec()) is not None:
            experts.check_layers(self.num_hidden_layers)
        elif self.output_router_logits:
            raise InputError("output_router_logits needs a router; leave it out or give mixture_of_experts")
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise InputError(f"router_aux_loss_coef must be a number from 0 on, got {self.router_aux_loss_coef}")

    def layer_specs(self) -> list[AttentionSpec]:
        """The attention spec of every layer."""
        if isinstance(self.attention, dict):
            return [make_spec(self.hidden_size, self.attention)] * self.num_hidden_layers
        if not isinstance(self.attention, list):
            raise InputError(
                f"attention must be one table of sizes or a list with one per layer, got {self.attention!r}"
            )
        if len(self.attention) != self.num_hidden_layers:
            raise InputError(
                f"attention lists {len(self.attention)} layers but num_hidden_layers is {self.num_hidden_layers}; "
                "give one entry per layer, or one for all"
            )
        return [make_spec(self.hidden_size, sizes) for sizes in self.attention]

    def experts_spec(self) -> ExpertsSpec | None:
        """The mixture of experts; None where every feed-forward is dense."""
        return None if self.mixture_of_experts is None else make_experts(self.mixture_of_experts)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        assert self.rope_parameters is not None
        return float(self.rope_parameters.get("rope_theta", 10_000.0))


AutoConfig.register(MultimatrixConfig.model_type, MultimatrixConfig)
