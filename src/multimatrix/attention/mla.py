"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    q_c   = [q_c^nope ; R q_c^rope] from x, or from norm(x S_q) with low-rank queries
    l     = norm(x S_k)                             C elements, shared by keys and values
    k_c   = [l K_c ; R x K_rope]    v_c = l V_c     c = 1..m heads; the rotary part is shared by all heads
    W_c   = S_q Q_c K_c^T S_k^T (+ the rotary part)    U_c = S_k V_c O_c^T

Cached per token: [l ; R x K_rope], C + E elements, and nothing else. Training expands the keys and values;
decoding absorbs K_c into the query and V_c into the output and attends over the cache itself, whose first C
elements are the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from multimatrix.attention.gmha import (
    AttentionSpec,
    CacheLayout,
    Capacity,
    Weight,
    head_matrices,
    join_heads,
    linear_weight,
    output_matrices,
    split_heads,
)

if TYPE_CHECKING:
    from torch import Tensor

    from multimatrix.attention.module import Attention
    from multimatrix.ops.reference import Circuits
    from multimatrix.ops.rotary import Rotation


@dataclass(frozen=True, kw_only=True)
class MLASpec(AttentionSpec):
    """num_heads heads whose keys have head_dim latent and rope_head_dim rotary elements.

    latent_dim: C. rope_head_dim: E; without RoPE the part stays, un-rotated, so that sizes compare.
    value_head_dim: None for head_dim. query_rank: R, None for full-rank queries.
    """

    variant: ClassVar[str] = "mla"

    head_dim: int
    rope_head_dim: int
    latent_dim: int
    value_head_dim: int | None = None
    query_rank: int | None = None

    @classmethod
    def sized(cls, hidden_size: int, head_dim: int, **options: Any) -> Self:
        # DeepSeek's proportions: a latent of four heads and a rotary part of half a head.
        return cls(
            hidden_size=hidden_size,
            num_heads=hidden_size // head_dim,
            head_dim=head_dim,
            rope_head_dim=max(2, head_dim // 4 * 2),
            latent_dim=4 * head_dim,
            **options,
        )

    @property
    def value_dim(self) -> int:
        return self.value_head_dim if self.value_head_dim is not None else self.head_dim

    @property
    def weights(self) -> tuple[Weight, ...]:
        hidden, query = self.hidden_size, self.num_heads * (self.head_dim + self.rope_head_dim)
        if self.query_rank is None:
            query_weights: tuple[Weight, ...] = (Weight("q_proj", (query, hidden), heads="out"),)
        else:
            query_weights = (
                Weight("q_a_proj", (self.query_rank, hidden)),
                Weight("q_a_norm", (self.query_rank,), "norm"),
                Weight("q_b_proj", (query, self.query_rank), heads="out"),
            )
        return (
            *query_weights,
            Weight("kv_a_proj", (self.latent_dim + self.rope_head_dim, hidden)),
            Weight("kv_a_norm", (self.latent_dim,), "norm"),
            Weight("kv_b_proj", (self.num_heads * (self.head_dim + self.value_dim), self.latent_dim), heads="out"),
            Weight("o_proj", (hidden, self.num_heads * self.value_dim), heads="in"),
        )

    @property
    def cache(self) -> CacheLayout:
        return CacheLayout(key=(1, self.latent_dim + self.rope_head_dim), value=None, source="slice")

    @property
    def capacity(self) -> Capacity:
        return Capacity(self.num_heads, self.head_dim, self.latent_dim)

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.head_dim + self.rope_head_dim, self.value_dim

    @property
    def cached_head_dims(self) -> tuple[int, int]:
        return self.latent_dim + self.rope_head_dim, self.latent_dim

    @property
    def rotated_width(self) -> int:
        return self.rope_head_dim

    @property
    def has_expanded_form(self) -> bool:
        return True

    @property
    def expansion_products(self) -> int:
        return self.latent_dim * self.num_heads * (self.head_dim + self.value_dim)  # kv_b_proj

    @property
    def expanded_elements(self) -> int:
        return self.num_heads * sum(self.head_dims)

    def project(self, w: Attention, x: Tensor, rope: Rotation) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.query_rank is None:
            q = w.q_proj(x)
        else:
            q = w.q_b_proj(w.q_a_norm(w.q_a_proj(x)) * self.latent_scale(self.query_rank))
        q_nope, q_rope = split_heads(q, self.head_dim + self.rope_head_dim).split(
            (self.head_dim, self.rope_head_dim), dim=-1
        )
        latent, k_rope = w.kv_a_proj(x).unsqueeze(1).split((self.latent_dim, self.rope_head_dim), dim=-1)
        latent = w.kv_a_norm(latent) * self.latent_scale(self.latent_dim)  # [B, 1, T, C]
        return (
            join_heads(q_nope, rope(q_rope)),  # [B, N, T, D]
            (join_heads(latent, rope(k_rope)),),  # [B, 1, T, C + E]
        )

    def expand(self, w: Attention, latents: tuple[Tensor, ...], rope: Rotation) -> tuple[Tensor, Tensor]:
        latent, k_rope = latents[0].split((self.latent_dim, self.rope_head_dim), dim=-1)
        kv = split_heads(w.kv_b_proj(latent.squeeze(1)), self.head_dim + self.value_dim)  # [B, N, T, head_dim + V]
        k_nope, v = kv.split((self.head_dim, self.value_dim), dim=-1)
        return join_heads(k_nope, k_rope.expand(-1, kv.shape[1], -1, -1)), v

    def absorb(self, w: Attention, q: Tensor) -> Tensor:
        import torch  # here and below, so that specs can be read without torch

        q_nope, q_rope = q.split((self.head_dim, self.rope_head_dim), dim=-1)
        key_up, _ = self._up_projections(linear_weight(w.kv_b_proj, q))
        return torch.cat((q_nope @ key_up.transpose(1, 2), q_rope), dim=-1)  # [B, N, T, C + E]

    def restore(self, w: Attention, o: Tensor, rope: Rotation) -> Tensor:
        _, value_up = self._up_projections(linear_weight(w.kv_b_proj, o))
        return o @ value_up  # [B, N, T, V]

    def _up_projections(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """K_c [N, C, head_dim] and V_c [N, C, V] out of kv_b_proj."""
        heads = weight.shape[0] // (self.head_dim + self.value_dim)
        key_up, value_up = head_matrices(weight, heads).split((self.head_dim, self.value_dim), dim=-1)
        return key_up, value_up

    def circuits(self, w: Mapping[str, Tensor], x: Tensor) -> Circuits:
        import torch

        from multimatrix.ops.reference import Circuits, rms_norm

        if self.query_rank is None:
            query_latent, query_up = x, w["q_proj"]
        else:
            query_latent = rms_norm(x @ w["q_a_proj"].T, w["q_a_norm"]) * self.latent_scale(self.query_rank)
            query_up = w["q_b_proj"]
        down, k_rope = (x @ w["kv_a_proj"].T).split((self.latent_dim, self.rope_head_dim), dim=-1)
        latent = rms_norm(down, w["kv_a_norm"]) * self.latent_scale(self.latent_dim)
        key_up, value_up = self._up_projections(w["kv_b_proj"])
        return Circuits(
            q=query_latent @ head_matrices(query_up, self.num_heads),
            k=torch.cat((latent @ key_up, k_rope.expand(self.num_heads, -1, -1)), dim=-1),
            v=latent @ value_up,
            o=output_matrices(w["o_proj"], self.num_heads),
            rotated=((self.head_dim, self.head_dim + self.rope_dim),),
        )
