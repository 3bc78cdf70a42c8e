"""Multi-matrix factorization attention (MFA; Hu et al., arXiv 2412.19255).

    q_c = x S_q Q_c    k = x S_k    v = x S_v        c = 1..m heads of dim C
    W_c = S_q Q_c S_k^T    U_c = S_v O_c^T           S_q is H x R, Q_c is R x C, S_k, S_v and O_c are H x C

One key head and one value head; capacity comes from many wide query heads whose projections are low-rank.
The paper has R = C; Step-3 (arXiv 2507.19427) has R = 8C and a norm on x S_q. Cached per token: k (rotated) and
v, 2C elements, whatever m is.

Grouped-query attention with g groups of dim d is exactly an MFA with C = g * d, rotary_blocks = g,
softmax_scale = d^-0.5 and queries that are zero outside their group's block.
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
    output_matrices,
    side_by_side,
    split_heads,
)
from multimatrix.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from multimatrix.attention.module import Attention
    from multimatrix.ops.reference import Circuits
    from multimatrix.ops.rotary import Rotation


@dataclass(frozen=True, kw_only=True)
class MFASpec(AttentionSpec):
    """num_heads query heads (m) of head_dim (C) over one key and one value head.

    query_rank: R. query_norm: RMSNorm on the query latent x S_q. rotary_blocks: rotate the head as this many equal
    blocks, each like a head of its own.
    """

    variant: ClassVar[str] = "mfa"

    head_dim: int
    query_rank: int
    query_norm: bool = False
    rotary_blocks: int = 1

    @classmethod
    def sized(cls, hidden_size: int, head_dim: int, **options: Any) -> Self:
        # The paper's 7B run beside its MHA: heads twice as wide, 18 of them for 16, and R = C.
        heads, wide = hidden_size // head_dim, 2 * head_dim
        return cls(
            hidden_size=hidden_size,
            num_heads=max(1, heads * 9 // 8),
            head_dim=wide,
            query_rank=wide,
            **options,
        )

    def validate(self) -> None:
        if self.head_dim % self.rotary_blocks:
            raise InputError(
                f"{self.variant}: head_dim {self.head_dim} cannot be cut into {self.rotary_blocks} rotary blocks; "
                f"rotary_blocks must divide head_dim"
            )

    @property
    def query_weights(self) -> tuple[Weight, ...]:
        norm = (Weight("q_a_norm", (self.query_rank,), "norm"),) if self.query_norm else ()
        return (
            Weight("q_a_proj", (self.query_rank, self.hidden_size)),
            *norm,
            Weight("q_b_proj", (self.num_heads * self.head_dim, self.query_rank), heads="out"),
        )

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (
            *self.query_weights,
            Weight("k_proj", (self.head_dim, self.hidden_size)),
            Weight("v_proj", (self.head_dim, self.hidden_size)),
            Weight("o_proj", (self.hidden_size, self.num_heads * self.head_dim), heads="in"),
        )

    @property
    def cache(self) -> CacheLayout:
        return CacheLayout(key=(1, self.head_dim), value=(1, self.head_dim))

    @property
    def capacity(self) -> Capacity:
        return Capacity(self.num_heads, self.head_dim, self.head_dim)

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim

    @property
    def rotated_width(self) -> int:
        return self.head_dim // self.rotary_blocks

    @property
    def rope_blocks(self) -> int:
        return self.rotary_blocks

    def project_query(self, w: Attention, latent: Tensor) -> Tensor:
        """x S_q [B, T, R] -> un-rotated query [B, N, T, C]."""
        if self.query_norm:
            latent = w.q_a_norm(latent)
        return split_heads(w.q_b_proj(latent * self.latent_scale(self.query_rank)), self.head_dim)

    def project(self, w: Attention, x: Tensor, rope: Rotation) -> tuple[Tensor, tuple[Tensor, ...]]:
        latent, k, v = side_by_side(x, w.q_a_proj, w.k_proj, w.v_proj)  # [B, T, R] and two [B, T, C]
        return rope(self.project_query(w, latent)), (rope(k.unsqueeze(1)), v.unsqueeze(1))

    def circuits(self, w: Mapping[str, Tensor], x: Tensor) -> Circuits:
        from multimatrix.ops.reference import Circuits, rms_norm

        latent = x @ w["q_a_proj"].T  # x S_q
        if self.query_norm:
            latent = rms_norm(latent, w["q_a_norm"])
        heads, block = self.num_heads, self.rotated_width
        return Circuits(
            q=(latent * self.latent_scale(self.query_rank)) @ head_matrices(w["q_b_proj"], heads),
            k=(x @ w["k_proj"].T).expand(heads, -1, -1),
            v=(x @ self.value_matrix(w)).expand(heads, -1, -1),
            o=output_matrices(w["o_proj"], heads),
            rotated=tuple((b * block, b * block + self.rope_dim) for b in range(self.rotary_blocks)),
        )

    def value_matrix(self, w: Mapping[str, Tensor]) -> Tensor:
        """S_v [H, C]."""
        return w["v_proj"].T
