"""MFA with key reuse (MFA-KR; Hu et al., arXiv 2412.19255): the value is made from the key.

    q_c = x S_q Q_c    k = x S_k    v = k M^T        c = 1..m heads of dim C
    W_c = S_q Q_c S_k^T    U_c = S_k M^T O_c^T

    value_map   M                      the paper's ablation of it
    tied        I                      v = k
    projected   N                      v = N k
    residual    I + N                  v = k + N k
    gated       I + diag(alpha) N      v = k + alpha (.) N k, the method; alpha = 0 at the start, so v = k

Cached per token: k, C elements, and nothing else. M is the same for every token, so it commutes with the attention
sum: decoding attends over the cached keys as values and applies M to the head outputs.

The paper does not say whether the reused key carries RoPE. Two readings are consistent; they are different functions:

    unrotated   o_i = sum_j a_ij M k_j             the equation as written; the plain key is cached
    relative    o_i = M sum_j a_ij R_{j-i} k_j     the rotated key is cached, the output is rotated by -i

They agree on the dims that RoPE leaves alone, and altogether without RoPE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from multimatrix.attention.gmha import CacheLayout, Weight, side_by_side
from multimatrix.attention.mfa import MFASpec
from multimatrix.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from multimatrix.attention.module import Attention
    from multimatrix.ops.reference import Circuits
    from multimatrix.ops.rotary import Rotation

ValueMap = Literal["tied", "projected", "residual", "gated"]


@dataclass(frozen=True, kw_only=True)
class MFAKRSpec(MFASpec):
    """MFA whose value is the key, mapped by `value_map`; `key_reuse` is the reading of RoPE."""

    variant: ClassVar[str] = "mfa_kr"

    value_map: ValueMap = "gated"
    key_reuse: Literal["unrotated", "relative"] = "unrotated"

    def validate(self) -> None:
        super().validate()
        if self.value_map not in ("tied", "projected", "residual", "gated"):
            raise InputError(
                f"{self.variant}: value_map must be tied, projected, residual or gated, got {self.value_map!r}"
            )
        if self.key_reuse not in ("unrotated", "relative"):
            raise InputError(f"{self.variant}: key_reuse must be unrotated or relative, got {self.key_reuse!r}")

    @property
    def weights(self) -> tuple[Weight, ...]:
        dim = self.head_dim
        projection = (Weight("value_proj", (dim, dim)),) if self.value_map != "tied" else ()
        gate = (Weight("value_gate", (dim,), "gate"),) if self.value_map == "gated" else ()
        return (
            *self.query_weights,
            Weight("k_proj", (dim, self.hidden_size)),
            *projection,
            *gate,
            Weight("o_proj", (self.hidden_size, self.num_heads * dim), heads="in"),
        )

    @property
    def rotates_value(self) -> bool:
        """Whether the value is read off the rotated key."""
        return self.key_reuse == "relative" and self.rope_dim > 0

    @property
    def cache(self) -> CacheLayout:
        rotated_for_scores = self.rope_dim > 0 and not self.rotates_value
        return CacheLayout(key=(1, self.head_dim), value=None, source="unrotated" if rotated_for_scores else "key")

    @property
    def extra_decode_products(self) -> int:
        # Over the cache M acts on every head's output, not once on the key.
        return 0 if self.value_map == "tied" else (self.num_heads - 1) * self.head_dim**2

    @property
    def has_expanded_form(self) -> bool:
        # Before the inverse rotation of the output, M does not commute with the sum.
        return not self.rotates_value

    @property
    def expansion_products(self) -> int:
        return self.head_dim**2 if self.has_expanded_form and self.value_map != "tied" else 0

    @property
    def expanded_elements(self) -> int:
        return 2 * self.head_dim if self.has_expanded_form else self.cache.elements

    def project(self, w: Attention, x: Tensor, rope: Rotation) -> tuple[Tensor, tuple[Tensor, ...]]:
        latent, k = side_by_side(x, w.q_a_proj, w.k_proj)  # [B, T, R], [B, T, C]
        k = k.unsqueeze(1)  # [B, 1, T, C]
        return rope(self.project_query(w, latent)), (rope(k) if self.rotates_value else k,)

    def expand(self, w: Attention, latents: tuple[Tensor, ...], rope: Rotation) -> tuple[Tensor, Tensor]:
        return rope(latents[0]), self._apply_value_map(w, latents[0])

    def restore(self, w: Attention, o: Tensor, rope: Rotation) -> Tensor:
        return self._apply_value_map(w, rope.inverse(o) if self.rotates_value else o)

    def _apply_value_map(self, w: Attention, k: Tensor) -> Tensor:
        """k M^T for row vectors k [..., C]."""
        if self.value_map == "tied":
            return k
        if self.value_map == "projected":
            return w.value_proj(k)
        if self.value_map == "residual":
            return k + w.value_proj(k)
        return k + w.value_gate * w.value_proj(k)

    def circuits(self, w: Mapping[str, Tensor], x: Tensor) -> Circuits:
        unreused = super().circuits(w, x)
        if not self.rotates_value:
            return unreused
        # M acts after the rotation, so it belongs to the output factor.
        return dataclasses.replace(
            unreused,
            v=unreused.k,
            o=self.matrix(w).T @ unreused.o,
            value_rotation="relative",
        )

    def value_matrix(self, w: Mapping[str, Tensor]) -> Tensor:
        return w["k_proj"].T @ self.matrix(w).T

    def matrix(self, w: Mapping[str, Tensor]) -> Tensor:
        """M [C, C]."""
        identity = w["k_proj"].new_ones(self.head_dim).diag()
        if self.value_map == "tied":
            return identity
        if self.value_map == "projected":
            return w["value_proj"]
        if self.value_map == "residual":
            return identity + w["value_proj"]
        return identity + w["value_gate"].diag() @ w["value_proj"]
