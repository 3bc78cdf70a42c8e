"""One layer of the decoder: attention and a feed-forward, each behind a norm and a residual connection."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from multimatrix.attention.gmha import AttentionSpec
from multimatrix.attention.module import Attention, RMSNorm, RotaryTables
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.feed_forward import SwiGLU
from multimatrix.model.mixture import MixtureOfExperts


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
