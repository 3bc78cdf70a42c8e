"""Multi-query attention (Shazeer, arXiv 1911.02150): all query heads share one key and one value head.

    W_c = Q_c K^T    U_c = V O_c^T        c = 1..n heads of dim d

Cached per token: 2d elements. Grouped-query attention with one group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from multimatrix.attention.gqa import GQASpec


@dataclass(frozen=True, kw_only=True)
class MQASpec(GQASpec):
    """num_heads query heads of head_dim over one key and one value head."""

    variant: ClassVar[str] = "mqa"

    num_kv_heads: int = field(init=False, default=1)

    @classmethod
    def sized(cls, hidden_size: int, head_dim: int, **options: Any) -> Self:
        return cls(hidden_size=hidden_size, num_heads=hidden_size // head_dim, head_dim=head_dim, **options)
