"""Multi-head attention (Vaswani et al., arXiv 1706.03762): every query head has a key and a value head of its own.

    W_c = Q_c K_c^T    U_c = V_c O_c^T        c = 1..n heads of dim d

Cached per token: 2nd elements. Grouped-query attention with as many groups as heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from multimatrix.attention.gmha import Capacity
from multimatrix.attention.gqa import GQASpec


@dataclass(frozen=True, kw_only=True)
class MHASpec(GQASpec):
    """num_heads heads of head_dim."""

    variant: ClassVar[str] = "mha"

    num_kv_heads: int = field(init=False, default=0)

    @classmethod
    def sized(cls, hidden_size: int, head_dim: int, **options: Any) -> Self:
        return cls(hidden_size=hidden_size, num_heads=hidden_size // head_dim, head_dim=head_dim, **options)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_kv_heads", self.num_heads)
        super().__post_init__()

    @property
    def capacity(self) -> Capacity:
        # All heads together read from the whole hidden vector (the paper's table gives H).
        return Capacity(self.num_heads, self.head_dim, self.hidden_size)
