"""Grouped-query attention (Ainslie et al., arXiv 2305.13245).

    q_c = x Q_c    k_g = x K_g    v_g = x V_g        c = 1..n heads of dim d, g = 1..groups
    W_c = Q_c K_g(c)^T    U_c = V_g(c) O_c^T         neighbouring heads share a group

Cached per token: k_g (rotated) and v_g of every group, 2 * groups * d elements. MHA is groups = n, MQA groups = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from multimatrix.attention.gmha import (
    AttentionSpec,
    CacheLayout,
    Capacity,
    Weight,
    head_matrices,
    output_matrices,
    side_by_side,
    split_heads,
)
from multimatrix.errors import InputError
from multimatrix.fields import nearest_divisor

if TYPE_CHECKING:
    from torch import Tensor

    from multimatrix.attention.module import Attention
    from multimatrix.ops.reference import Circuits
    from multimatrix.ops.rotary import Rotation


@dataclass(frozen=True, kw_only=True)
class GQASpec(AttentionSpec):
    """num_heads query heads of head_dim share num_kv_heads key and value heads."""

    variant: ClassVar[str] = "gqa"

    head_dim: int
    num_kv_heads: int

    @classmethod
    def sized(cls, hidden_size: int, head_dim: int, **options: Any) -> Self:
        heads = hidden_size // head_dim
        # A group for every four heads, but two groups at least: one would be MQA.
        groups = next((groups for groups in (heads // 4, 2) if groups > 1 and heads % groups == 0), 1)
        return cls(hidden_size=hidden_size, num_heads=heads, head_dim=head_dim, num_kv_heads=groups, **options)

    def validate(self) -> None:
        if self.num_heads % self.num_kv_heads:
            nearest = nearest_divisor(self.num_heads, self.num_kv_heads)
            raise InputError(
                f"{self.variant}: {self.num_heads} heads cannot be shared by {self.num_kv_heads} groups; num_kv_heads "
                f"must divide num_heads, the nearest that does: {nearest}"
            )

    @property
    def weights(self) -> tuple[Weight, ...]:
        query, shared = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        key_heads: Literal["out"] | None = "out" if self.num_kv_heads > 1 else None
        return (
            Weight("q_proj", (query, self.hidden_size), heads="out"),
            Weight("k_proj", (shared, self.hidden_size), heads=key_heads),
            Weight("v_proj", (shared, self.hidden_size), heads=key_heads),
            Weight("o_proj", (self.hidden_size, query), heads="in"),
        )

    @property
    def cache(self) -> CacheLayout:
        return CacheLayout(key=(self.num_kv_heads, self.head_dim), value=(self.num_kv_heads, self.head_dim))

    @property
    def capacity(self) -> Capacity:
        return Capacity(self.num_heads, self.head_dim, self.num_kv_heads * self.head_dim)

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim

    def project(self, w: Attention, x: Tensor, rope: Rotation) -> tuple[Tensor, tuple[Tensor, ...]]:
        projected = side_by_side(x, w.q_proj, w.k_proj, w.v_proj)
        q, k, v = (split_heads(part, self.head_dim) for part in projected)  # [B, N, T, D] and two [B, G, T, D]
        return rope(q), (rope(k), v)

    def circuits(self, w: Mapping[str, Tensor], x: Tensor) -> Circuits:
        from multimatrix.ops.reference import Circuits

        group_of_head = [c * self.num_kv_heads // self.num_heads for c in range(self.num_heads)]
        return Circuits(
            q=x @ head_matrices(w["q_proj"], self.num_heads),
            k=x @ head_matrices(w["k_proj"], self.num_kv_heads)[group_of_head],
            v=x @ head_matrices(w["v_proj"], self.num_kv_heads)[group_of_head],
            o=output_matrices(w["o_proj"], self.num_heads),
            rotated=((0, self.rope_dim),),
        )
