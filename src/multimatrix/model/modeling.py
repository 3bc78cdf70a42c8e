"""A decoder language model around any attention variant, native to Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from multimatrix.attention.gmha import AttentionSpec
from multimatrix.attention.module import Attention, RMSNorm, RotaryTables
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.feed_forward import SwiGLU
from multimatrix.model.mixture import Experts, MixtureOfExperts, load_balancing_loss, share_of_step

# What transformers calls the cache, in outputs and in its own functions: "past_key_values" before 5.24.
CACHE = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
)


class DecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: MultimatrixConfig, spec: AttentionSpec, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(spec, layer_idx, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        experts = config.experts_spec()
        self.mlp: SwiGLU | MixtureOfExperts
        if experts is not None and experts.has_experts(layer_idx):
            self.mlp = MixtureOfExperts(experts, config.hidden_size)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        if config.depth_scaled_init:
            self.mlp.set_output_std(config.initializer_range * (2 * (layer_idx + 1)) ** -0.5)
        if config.zero_init_output:
            getattr(self.self_attn, spec.output_weight).init_std = 0.0

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables,
        mask: Tensor | None,
        cache: Cache | None,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """The new hidden states [B, T, H] and the router's logits [B * T, E] of a layer with experts.

        The logits are an output, not what a hook saw, so that checkpointing of either kind keeps their gradient.
        """
        x = x + self.self_attn(
            self.input_layernorm(x),
            rotary=rotary,
            mask=mask,
            cache=cache,
            backend=backend,
        )
        h = self.post_attention_layernorm(x)
        y, router_logits = self.mlp(h) if isinstance(self.mlp, MixtureOfExperts) else (self.mlp(h), None)
        return x + y, router_logits


class MultimatrixPreTrainedModel(PreTrainedModel):
    """What the model classes share: configuration, capabilities, initialization."""

    config: MultimatrixConfig
    config_class = MultimatrixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DecoderLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The rules stated in `MultimatrixConfig`.

        transformers skips modules that hold no parameter of their own, so a layer cannot have the last word here: a
        rule for one matrix is left on its linear map, as `init_std`, by the layer that knows it.
        """
        super()._init_weights(module)
        if hasattr(module, "init_std"):
            init.normal_(module.weight, mean=0.0, std=module.init_std)
        if isinstance(module, Experts):
            for name, matrices in module.named_parameters():
                scaled = module.output_std is not None and name == "down_proj"
                std = module.output_std if scaled else self.config.initializer_range
                init.normal_(matrices, mean=0.0, std=std)
        if isinstance(module, Attention):
            for weight in module.spec.weights:
                if weight.kind == "gate":
                    init.zeros_(getattr(module, weight.name))


class MultimatrixModel(MultimatrixPreTrainedModel):
    """Embeddings, decoder layers and the final norm."""

    def __init__(self, config: MultimatrixConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, spec, layer_idx) for layer_idx, spec in enumerate(config.layer_specs())
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | MoeModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, H] -> last_hidden_state [B, T, H].

        attention_mask: [B, S], 1 for tokens and 0 for padding on either side, cached tokens included.
        cache, or past_key_values as it was called before transformers 5.24: a `Cache` of any length; it takes the new
        tokens. output_router_logits: return those of every layer with experts, [B * T, E] each; None as the config has
        it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("position_ids") is not None:
            raise ValueError(
                "positions are cache slots, so position_ids and packed rows are not supported; leave them out"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = _one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        x = inputs_embeds  # [B, T, H]
        seen = cache.get_seq_length() if cache is not None else 0
        # Positions are slots: rotations are relative, so left padding needs nothing more.
        positions = torch.arange(x.shape[1], device=x.device) + seen  # [T]
        rotary = RotaryTables(positions, x.dtype, self.config.rope_theta)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            **{CACHE: cache},
        )
        # "sdpa" is what transformers sets where nobody chose.
        backend = "eager" if self.config._attn_implementation == "eager" else "auto"
        router_logits = []
        for layer in self.layers:
            x, routed = layer(x, rotary, mask, cache=cache, backend=backend)
            if routed is not None:
                router_logits.append(routed)
        outputs = {"last_hidden_state": self.norm(x), CACHE: cache}
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        if wanted and router_logits:
            return MoeModelOutputWithPast(**outputs, router_logits=tuple(router_logits))
        return BaseModelOutputWithPast(**outputs)


class MultimatrixForCausalLM(MultimatrixPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MultimatrixConfig) -> None:
        super().__init__(config)
        self.model = MultimatrixModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """Like `MultimatrixModel.forward`, and logits [B, T, vocab_size].

        labels: [B, T], -100 is ignored; the shift by one token is made here. logits_to_keep: only the last so many
        tokens' logits, 0 for all, or the indices of the tokens. Where the router's logits are asked for, aux_loss is
        the load-balancing loss; it is part of the loss while training only, so that an evaluated loss stays the cross
        entropy.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # [B, T, vocab_size]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        fields = {"logits": logits, "hidden_states": outputs.hidden_states, CACHE: outputs.get(CACHE)}
        router_logits = outputs.get("router_logits")
        if router_logits is None:
            return CausalLMOutputWithPast(loss=loss, **fields)
        experts = self.config.experts_spec()
        assert experts is not None
        aux_loss = load_balancing_loss(router_logits, experts.experts_per_token, attention_mask)
        if loss is not None and self.training:
            share = share_of_step(labels, kwargs.get("num_items_in_batch"))
            loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, router_logits=router_logits, **fields)


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache under either of its names."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    return cache if cache is not None else past_key_values


AutoModel.register(MultimatrixConfig, MultimatrixModel)
AutoModelForCausalLM.register(MultimatrixConfig, MultimatrixForCausalLM)
