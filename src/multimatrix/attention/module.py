"""The module of every variant: the weights a spec lists, and the five steps around them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import cache_utils

from multimatrix.attention.gmha import AttentionSpec
from multimatrix.ops.alibi import alibi_slopes
from multimatrix.ops.attend import attend
from multimatrix.ops.rotary import RopeParameters, Rotation, SlotRotation

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

# The base of all quantized layers, which was the group-wise one before FP8 came.
QuantizedLayer = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, its scale in the dtype of the input, and under autocast too what it gives.

    The one kernel behind it works in float32. Autocast on a GPU would hand it float32 and take float32 from it, which
    is twice the traffic for nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        weight = self.weight.to(x.dtype)
        if not torch.is_autocast_enabled(x.device.type):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """One attention layer built from a spec; its weights carry the names that `spec.weights` lists.

    spec: the variant at its sizes. layer_idx: which layer of a transformers `Cache` is ours. eps: of every RMSNorm.
    """

    def __init__(self, spec: AttentionSpec, layer_idx: int = 0, eps: float = 1e-6) -> None:
        super().__init__()
        self.spec = spec
        self.layer_idx = layer_idx
        for weight in spec.weights:
            if weight.kind == "linear":
                out_features, in_features = weight.shape
                self.add_module(weight.name, nn.Linear(in_features, out_features, bias=False))
            elif weight.kind == "norm":
                self.add_module(weight.name, RMSNorm(weight.shape[0], eps=eps))
            else:
                self.register_parameter(weight.name, nn.Parameter(torch.zeros(weight.shape)))

    # The names are the spec's, so no static attribute can be declared for them.
    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def forward(
        self,
        x: Tensor,
        *,
        rotary: RotaryTables | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """x [B, T, H] -> [B, T, H], causal.

        rotary: tables of this step. mask: what the new tokens see, as in `ops.attend.attend`; None where they see
        every slot up to their own: the first T tokens, or one token over slots that are all filled. Where a layer is
        used by itself, without `rotary`, both are made here, at theta 10,000. cache: what was cached
        before; it takes the new latents.
        """
        spec, tokens = self.spec, x.shape[1]
        alone = rotary is None
        if rotary is None:
            seen = cache.get_seq_length(self.layer_idx) if cache is not None else 0
            rotary = RotaryTables(seen + torch.arange(tokens, device=x.device), x.dtype)
        rope = rotary.new(spec)
        q, latents = spec.project(self, x, rope)
        if cache is not None:
            latents = _store(cache, latents, self.layer_idx)
            if alone and mask is None:
                slots = torch.arange(latents[0].shape[2], device=x.device)
                mask = (slots <= rotary.positions[:, None])[None, None]  # [1, 1, T, S]
        if mask is None and tokens > 1:
            # The first tokens of a static cache: the slots behind them are still empty.
            latents = tuple(latent[:, :, :tokens] for latent in latents)
        run = functools.partial(
            attend,
            scale=spec.scale * (rotary.parameters.score_factor if spec.rope_dim else 1.0),
            mask=mask,
            slopes=self._slopes(q.shape[1]) if spec.position == "alibi" else None,
            query_positions=rotary.positions,
            backend=backend,
        )
        # Past tokens would have to be expanded again at every step, so only a whole sequence is expanded.
        if spec.has_expanded_form and latents[0].shape[2] == tokens > 1:
            o = run(q, spec.expand(self, latents, rope))
        else:
            o = run(
                spec.absorb(self, q),
                latents,
                source=spec.cache.source,
                value_dim=spec.cached_head_dims[1],
                slot_rope=functools.partial(rotary.slots, spec),
                rotation=SlotRotation(rotary.parameters, spec.rope_dim, spec.rope_blocks),
                lengths=rotary.length,
            )
            o = spec.restore(self, o, rope)
        return spec.emit(self, o)

    def _slopes(self, heads: int) -> list[float]:
        """ALiBi's slopes of the heads that this process holds, under tensor parallelism a part of all."""
        slopes = alibi_slopes(self.spec.num_heads)
        if heads == len(slopes):
            return slopes
        rank = getattr(self, self.spec.output_weight).weight.device_mesh.get_local_rank()
        return slopes[rank * heads : (rank + 1) * heads]


class RotaryTables:
    """Rotations at the new tokens and at the cached slots of one step, made once for all layers that share them.

    positions: slot numbers of the new tokens [T]. dtype: of the hidden states. parameters: RoPE's frequencies.
    """

    def __init__(self, positions: Tensor, dtype: torch.dtype, parameters: RopeParameters | None = None) -> None:
        self.positions = positions
        self.length = (positions[-1:] + 1).to(torch.int32)  # [1], slots that are filled
        self.dtype = dtype
        self.parameters = parameters if parameters is not None else RopeParameters()
        self._tables: dict[tuple[int, int, int], Rotation] = {}
        self._elsewhere: dict[torch.device, RotaryTables] = {}

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> RotaryTables:
        """The same on another device: accelerate asks for it where layers lie on several."""
        positions = self.positions.to(device, non_blocking=non_blocking)
        if positions.device == self.positions.device:
            return self
        if positions.device not in self._elsewhere:
            self._elsewhere[positions.device] = RotaryTables(positions, self.dtype, self.parameters)
        return self._elsewhere[positions.device]

    def new(self, spec: AttentionSpec) -> Rotation:
        """The rotation at the new tokens."""
        return self._at(spec, 0)

    def slots(self, spec: AttentionSpec, count: int) -> Rotation:
        """The rotation at slots 0..count-1."""
        return self._at(spec, count)

    def _at(self, spec: AttentionSpec, slots: int) -> Rotation:
        key = (spec.rope_dim, spec.rope_blocks, slots)
        if key not in self._tables:
            positions = torch.arange(slots, device=self.positions.device) if slots else self.positions
            self._tables[key] = Rotation.at(positions, spec.rope_dim, self.parameters, self.dtype, spec.rope_blocks)
        return self._tables[key]


def _store(cache: Cache, latents: tuple[Tensor, ...], layer_idx: int) -> tuple[Tensor, ...]:
    """Store the new latents; everything cached so far comes back, one tensor for key-only variants."""
    if len(latents) == 2:
        return cache.update(*latents, layer_idx)
    # A cache layer stores two tensors; one of width zero takes no memory.
    width = latents[0].shape[-1]
    if layer_idx < len(cache.layers) and isinstance(cache.layers[layer_idx], QuantizedLayer):
        # It cannot quantize nothing, and copies at every step anyway.
        width -= width // 2
    keys, values = cache.update(latents[0][..., :width], latents[0][..., width:], layer_idx)
    return (keys,) if values.shape[-1] == 0 else (torch.cat((keys, values), dim=-1),)
