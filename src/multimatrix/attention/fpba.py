"""Fully parameterized bilinear attention (FPBA; arXiv 2412.19255): the capacity ceiling, for toy sizes only.

    score_ij = x_i W_c x_j^T    value_j = x_j U_c    c = 1..H heads, W_c and U_c full H x H matrices

H^2 parameters for each circuit of each head, 2H^3 in all, and 2H^2 cached elements per token: the keys x W_c^T and
the values x U_c of every head. Every other variant factorizes these two matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from multimatrix.attention.gmha import (
    AttentionSpec,
    CacheLayout,
    Capacity,
    Weight,
    head_matrices,
    split_heads,
)

if TYPE_CHECKING:
    from torch import Tensor

    from multimatrix.attention.module import Attention
    from multimatrix.ops.reference import Circuits
    from multimatrix.ops.rotary import Rotation


@dataclass(frozen=True, kw_only=True)
class FPBASpec(AttentionSpec):
    """As many heads as hidden_size, each of full rank."""

    variant: ClassVar[str] = "fpba"
    output_weight: ClassVar[str] = "v_proj"

    num_heads: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_heads", self.hidden_size)
        super().__post_init__()

    @classmethod
    def sized(cls, hidden_size: int, head_dim: int, **options: Any) -> Self:
        return cls(hidden_size=hidden_size, **options)

    @property
    def weights(self) -> tuple[Weight, ...]:
        square = (self.hidden_size * self.hidden_size, self.hidden_size)
        return (Weight("k_proj", square, heads="out"), Weight("v_proj", square, heads="out"))

    @property
    def tensor_parallel_plan(self) -> dict[str, str]:
        # Each process sums over its own heads.
        return {**super().tensor_parallel_plan, "": "all_reduce"}

    @property
    def cache(self) -> CacheLayout:
        return CacheLayout(key=(self.hidden_size, self.hidden_size), value=(self.hidden_size, self.hidden_size))

    @property
    def capacity(self) -> Capacity:
        return Capacity(self.hidden_size, self.hidden_size, self.hidden_size)

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.hidden_size, self.hidden_size

    def project(self, w: Attention, x: Tensor, rope: Rotation) -> tuple[Tensor, tuple[Tensor, ...]]:
        k = split_heads(w.k_proj(x), self.hidden_size)  # [B, N, T, H]
        v = split_heads(w.v_proj(x), self.hidden_size)  # [B, N, T, H]
        q = rope(x.unsqueeze(1)).expand(-1, k.shape[1], -1, -1)  # [B, N, T, H]
        return q, (rope(k), v)

    def emit(self, w: Attention, o: Tensor) -> Tensor:
        return o.sum(1, dtype=o.dtype)  # [B, T, H]; autocast would sum to float32

    def circuits(self, w: Mapping[str, Tensor], x: Tensor) -> Circuits:
        from multimatrix.ops.reference import Circuits

        heads = self.num_heads
        return Circuits(
            q=x.expand(heads, -1, -1),
            k=x @ head_matrices(w["k_proj"], heads),  # x W_c^T
            v=x @ head_matrices(w["v_proj"], heads),  # x U_c
            o=x.new_ones(self.hidden_size).diag().expand(heads, -1, -1),
            rotated=((0, self.rope_dim),),
        )
