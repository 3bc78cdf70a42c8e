"""Configuration of a decoder whose layers may each have an attention variant of their own."""

# Annotations stay types here: @strict checks no field whose annotation is text.
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from multimatrix.attention import AttentionSpec, make_specs
from multimatrix.errors import InputError
from multimatrix.model.experts import ExpertsSpec, make_experts
from multimatrix.ops.rotary import RopeParameters


@strict
class MultimatrixConfig(PreTrainedConfig):
    r"""
    attention: the sizes of the attention variant, `{"variant": "mfa", "num_heads": 18, "head_dim": 256,
        "query_rank": 256}`, or a list with one such entry per layer (a hybrid). The field names are those of the
        variant's spec. None: MHA with heads of 64.
    rope_parameters: `{"rope_type": "default", "rope_theta": 10000.0}`, or of type "linear" or "yarn", see
        `ops.rotary.RopeParameters`.
    depth_scaled_init: divide the initial std of layer l's second feed-forward matrix by sqrt(2 l), l = 1..L, as
        the MFA paper does.
    zero_init_output: start every layer's attention output at zero (`output_weight` of its spec), for every variant.
    provenance: how the model was trained, for its model card and nothing else: facts by name, such as `corpus` and
        `seed`, each a number, a text or a table of facts.
    mixture_of_experts: experts in place of the dense feed-forward, `{"num_experts": 8, "experts_per_token": 2,
        "intermediate_size": 512, "shared_intermediate_size": 512}`; the fields are those of `ExpertsSpec`. Layers that
        its `layers` leaves out keep the dense one of `intermediate_size`.
    skip_logits: where labels are given, return the loss without logits, which are then never held for all tokens, see
        `model.loss`. Set it while you train with a large vocabulary.
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
    rms_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    depth_scaled_init: bool = False
    zero_init_output: bool = False
    mixture_of_experts: dict | None = None
    router_aux_loss_coef: float | int = 0.01
    output_router_logits: bool = False
    skip_logits: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    provenance: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attention is None:
            self.attention = {"variant": "mha", "num_heads": max(1, self.hidden_size // 64), "head_dim": 64}
        self.base_model_tp_plan = self._parallel_plan()
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
        _ = self.rope  # raises where its parameters cannot work
        self.layer_specs()
        if (experts := self.experts_spec()) is not None:
            experts.check_layers(self.num_hidden_layers)
        elif self.output_router_logits:
            raise InputError("output_router_logits needs a router; leave it out or give mixture_of_experts")
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise InputError(f"router_aux_loss_coef must be a number from 0 on, got {self.router_aux_loss_coef}")

    def layer_specs(self) -> list[AttentionSpec]:
        """The attention spec of every layer."""
        return make_specs(self.hidden_size, self.attention, self.num_hidden_layers)

    def experts_spec(self) -> ExpertsSpec | None:
        """The mixture of experts; None where every feed-forward is dense."""
        return None if self.mixture_of_experts is None else make_experts(self.mixture_of_experts)

    @property
    def rope(self) -> RopeParameters:
        """The rotary frequencies."""
        return RopeParameters.from_dict(self.rope_parameters)

    # What `generate` asks of every config, for the first layer.

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.layer_specs()[0].num_heads

    @property
    def qk_head_dim(self) -> int:
        """Width of a cached key. That it is stated keeps `generate` from making values of that width ahead of time."""
        return self.layer_specs()[0].cache.key[1]

    def check_tensor_parallel(self, processes: int) -> None:
        """InputError where the layers cannot be shared out to so many processes."""
        if processes == 1:
            return
        plan = self._parallel_plan()
        for spec in self.layer_specs():
            spec.check_tensor_parallel(processes)
            for weight in spec.weights:
                # A plan holds one rule for the weights of one name in all layers.
                rule = plan.get(f"layers.*.self_attn.{weight.name}")
                if rule != spec.tensor_parallel_plan.get(weight.name):
                    raise InputError(
                        f"tensor parallelism cuts {weight.name} in all layers or in none, and here layers with one key "
                        f"head ({spec.variant}, for example) stand beside layers with several; use one process"
                    )

    def _parallel_plan(self) -> dict[str, str]:
        """transformers' tensor-parallel plan: heads and feed-forward width are cut, what heads share is replicated."""
        styles = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        plan = {f"layers.*.mlp.{name}": style for name, style in styles.items()}
        if self.mixture_of_experts is not None:
            # Every expert is cut, not their number; the layer sums the parts.
            for part in ("experts", "shared_expert"):
                plan |= {f"layers.*.mlp.{part}.{name}": style for name, style in styles.items()}
            plan["layers.*.mlp.experts"] = "moe_tp_experts"
        for spec in self.layer_specs():
            for weight, style in spec.tensor_parallel_plan.items():
                plan[f"layers.*.self_attn.{weight}".rstrip(".")] = style
        return plan
