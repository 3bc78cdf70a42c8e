"""A decoder language model around any attention variant, native to Hugging Face transformers."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask, sdpa_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from multimatrix.attention.gmha import plain_weight
from multimatrix.attention.module import Attention, RMSNorm, RotaryTables
from multimatrix.errors import InputError
from multimatrix.model.card import model_card, write_card
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.layer import DecoderLayer
from multimatrix.model.loss import loss_terms, next_token_loss
from multimatrix.model.masks import within_documents
from multimatrix.model.mixture import Experts, load_balancing_loss, share_of_step

# `attn_implementation` -> backend of `ops.attend`; others let it choose. The names of ours demand the decode kernel, or
# do without it.
BACKENDS = {"eager": "eager", "multimatrix_triton": "triton", "multimatrix_sdpa": "sdpa"}
for name in BACKENDS.keys() - {"eager"}:
    AttentionInterface.register(name, sdpa_attention_forward)  # only the name is used, and the kind of mask
    AttentionMaskInterface.register(name, sdpa_mask)

# What transformers calls the cache, in outputs and in its own functions: "past_key_values" before 5.24.
CACHE = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
)


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

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        include_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """transformers' `save_pretrained`, and a model card as README.md where no other README.md is.

        include_code: write the code of the model as well, so that the folder loads with `trust_remote_code=True` where
        multimatrix is not installed. A model that was loaded in that way always takes its code along.

        Raises:
            InputError: include_code and push_to_hub together, which would push the weights without the code.
        """
        if include_code and kwargs.get("push_to_hub"):
            raise InputError("include_code and push_to_hub exclude each other; save to a folder and upload the folder")
        travels = self.is_remote_code()  # then transformers copies the code and writes auto_map
        if not travels and hasattr(self.config, "auto_map"):
            del self.config.auto_map  # of the folder it came from
        if include_code and not travels:
            # By name, since the code that travels is what is imported here, and that needs no exporter.
            portable = importlib.import_module("multimatrix.model.portable")
            self.config.auto_map = dict(portable.AUTO_MAP)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        folder = Path(save_directory)
        is_adapter = getattr(self, "_hf_peft_config_loaded", False)
        if is_adapter or not folder.is_dir() or not self.should_save_on_this_rank(is_main_process):
            return
        if include_code and not travels:
            portable.write_code(folder)
        write_card(folder, model_card(self, has_code=include_code or travels))


class MultimatrixModel(MultimatrixPreTrainedModel):
    """Embeddings, decoder layers and the final norm."""

    def __init__(self, config: MultimatrixConfig) -> None:
        super().__init__(config)
        distributed = getattr(config, "distributed_config", None)
        self.tensor_parallel_processes = distributed.tp_size or 1 if distributed is not None else 1
        config.check_tensor_parallel(self.tensor_parallel_processes)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.specs = config.layer_specs()
        self.layers = nn.ModuleList(DecoderLayer(config, spec, layer_idx) for layer_idx, spec in enumerate(self.specs))
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
        position_ids: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | MoeModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, H] -> last_hidden_state [B, T, H].

        attention_mask: [B, S], 1 for tokens and 0 for padding on either side, cached tokens included. position_ids:
        [B or 1, T], for rows that hold several documents: a document starts at 0 and sees only itself, see
        `masks.within_documents`; a mask of four axes is taken as it is.
        cache, or past_key_values as it was called before transformers 5.24: a `Cache` of any length; it takes the new
        tokens. output_router_logits: return those of every layer with experts, [B * T, E] each; None as the config has
        it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if self.training and self.tensor_parallel_processes > 1:
            raise ValueError(
                "tensor parallelism is for inference: each process would give the shared key head only its own heads' "
                "gradient; train with FSDP"
            )
        if position_ids is None and kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("documents are told apart by position_ids; give them beside cu_seq_lens_q")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = _one_cache(cache, past_key_values)
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError("a layer that is run again in the backward pass would cache twice; leave the cache out")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        x = inputs_embeds  # [B, T, H]
        if torch.is_autocast_enabled(x.device.type):
            # Or the residual stream would stay in float32, and half of all traffic is the residual stream.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        seen = cache.get_seq_length() if cache is not None else 0
        # Positions are slots: rotations are relative, so left padding needs nothing more.
        positions = torch.arange(x.shape[1], device=x.device) + seen  # [T]
        rotary = RotaryTables(positions, x.dtype, self.config.rope)
        for spec in self.specs:
            rotary.new(spec)  # before the layers, so that layers that are compiled one by one are all alike
        mask = None  # all see what is before them; transformers would make a mask of it where a compiler reads along
        if attention_mask is not None or cache is not None:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                **{CACHE: cache},
            )
        if position_ids is not None and (attention_mask is None or attention_mask.dim() == 2):
            slots = cache.get_mask_sizes(x.shape[1], 0)[0] if cache is not None else x.shape[1]
            mask = within_documents(mask, position_ids, attention_mask, positions, slots)
        # "sdpa" is what transformers sets where nobody chose.
        backend = BACKENDS.get(str(self.config._attn_implementation), "auto")
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

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MultimatrixConfig) -> None:
        super().__init__(config)
        self.model = MultimatrixModel(config)
        self.vocab_size = config.vocab_size
        self.experts = config.experts_spec()
        self.loss_terms = loss_terms
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def compile_layers(self, **options: Any) -> None:
        """Compile every layer by itself, in place, and what `model.loss` makes of logits.

        Layers that are alike share one graph, so that a deep model compiles as fast as a single layer; names and
        hooks stay. options: of torch.compile.
        """
        for layer in self.model.layers:
            layer.compile(**options)
        self.loss_terms = torch.compile(loss_terms, **options)

    def static_cache(self, batch_size: int, max_cache_len: int) -> StaticCache:
        """A static cache whose memory exists from the start, as `torch.export` and CUDA graphs need it.

        `StaticCache.early_initialization` would give every layer a value as wide as its key.
        """
        cache = StaticCache(config=self.config, max_cache_len=max_cache_len)
        for layer, spec in zip(cache.layers, self.config.layer_specs(), strict=True):
            (heads, key_dim), value_dim = spec.cache.key, spec.cache.value[1] if spec.cache.value else 0
            if heads > 1:
                heads //= self.model.tensor_parallel_processes
            shapes = [(batch_size, heads, 0, dim) for dim in (key_dim, value_dim)]
            layer.lazy_initialization(*(torch.empty(s, dtype=self.dtype, device=self.device) for s in shapes))
        return cache

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
        position_ids: Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """Like `MultimatrixModel.forward`, and logits [B, T, vocab_size].

        labels: [B, T], -100 is ignored; the shift by one token is made here. logits_to_keep: only the last so many
        tokens' logits, 0 for all, or the indices of the tokens. skip_logits: return no logits beside a loss, None as
        the config has it. Where the router's logits are asked for, aux_loss is
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
            position_ids=position_ids,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]  # [B, T, H]
        skipped = labels is not None and (self.config.skip_logits if skip_logits is None else skip_logits)
        head = plain_weight(self.lm_head, hidden) if skipped and self.loss_function is ForCausalLMLoss else None
        logits = loss = None
        if head is not None:
            loss = next_token_loss(hidden, head, labels, terms=self.loss_terms, **kwargs)
        else:
            logits = self.lm_head(hidden)  # [B, T, vocab_size]
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if skipped:
            logits = None
        fields = {"logits": logits, "hidden_states": outputs.hidden_states, CACHE: outputs.get(CACHE)}
        router_logits = outputs.get("router_logits")
        if router_logits is None:
            return CausalLMOutputWithPast(loss=loss, **fields)
        assert self.experts is not None
        aux_loss = load_balancing_loss(router_logits, self.experts.experts_per_token, attention_mask)
        if loss is not None and self.training:
            share = share_of_step(labels, kwargs.get("num_items_in_batch"))
            loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, router_logits=router_logits, **fields)


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache under either of its names."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    return cache if cache is not None else past_key_values
