"""The oracle: attention in float64, written as the equations, slowly.

    O_i = sum_c [ sum_{j<=i} softmax_j( q_ci^T R_{j-i} k_cj * scale + bias_ij ) R_{j-i}^(value) v_cj ] O_c

Nothing here is shared with the fast path: rotations are explicit matrices of the distance j - i, every head has its
own keys and values, and nothing is cached. A variant supplies its `Circuits` with `spec.circuits(weights, x)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from multimatrix.ops.alibi import alibi_slopes
from multimatrix.ops.rotary import RopeParameters

if TYPE_CHECKING:
    from multimatrix.attention.gmha import AttentionSpec


@dataclass(frozen=True)
class Circuits:
    """Every head of one sequence in full.

    q, k: [N, T, D] before rotation. v: [N, T, V]. o: [N, V, H].
    rotated: (start, stop) of the runs of elements of q and k that RoPE turns, each half-split in itself.
    value_rotation: "none"; "relative" where the value met at i is R_{j-i} v_j; "absolute" for R_j v_j, which is the
    inconsistent third reading of key reuse and exists only to be shown wrong.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    rotated: tuple[tuple[int, int], ...]
    value_rotation: Literal["none", "relative", "absolute"] = "none"


def reference_attention(
    spec: AttentionSpec, weights: Mapping[str, Tensor], x: Tensor, *, rope: RopeParameters | None = None
) -> Tensor:
    """One layer's attention of one sequence, x [T, H] float64 -> [T, H] float64."""
    circuits, alibi = spec.circuits(weights, x), spec.position == "alibi"
    return attend_circuits(circuits, scale=spec.scale, alibi=alibi, rope=rope)


def attend_circuits(
    circuits: Circuits, *, scale: float, alibi: bool = False, rope: RopeParameters | None = None, offset: int = 0
) -> Tensor:
    """The causal sum over heads and tokens, [T, H].

    rope: frequencies, theta 10,000 by default. offset: position of the first token; only the inconsistent reading
    of key reuse depends on it.
    """
    heads, tokens, dim = circuits.q.shape
    rope = rope if rope is not None else RopeParameters()
    if rope.rope_type == "yarn" and any(stop > start for start, stop in circuits.rotated):
        root = rope.attention_factor if rope.attention_factor is not None else 0.1 * math.log(rope.factor) + 1
        scale *= root * root
    rotations = [
        rotation_matrix(distance, dim, circuits.rotated, rope).to(circuits.q) for distance in range(-tokens, 1)
    ]
    slopes = alibi_slopes(heads)
    rows = []
    for i in range(tokens):
        row = circuits.o.new_zeros(circuits.o.shape[-1])  # [H]
        for c in range(heads):
            scores, values = [], []
            for j in range(i + 1):
                rotation = rotations[j - i - 1]  # R_{j-i}; the list ends with distance 0
                score = circuits.q[c, i] @ (rotation @ circuits.k[c, j]) * scale
                scores.append(score - slopes[c] * (i - j) if alibi else score)
                value = circuits.v[c, j]
                if circuits.value_rotation == "relative":
                    value = rotation @ value
                elif circuits.value_rotation == "absolute":
                    value = rotation_matrix(offset + j, dim, circuits.rotated, rope).to(value) @ value
                values.append(value)
            row = row + torch.stack(scores).softmax(0) @ torch.stack(values) @ circuits.o[c]
        rows.append(row)
    return torch.stack(rows)


def bilinear_attention(x: Tensor, w: Tensor, u: Tensor, *, scale: float) -> Tensor:
    """GMHA itself, without positions: x [T, H], W and U [N, H, H] -> [T, H].

    O_i = sum_c sum_{j<=i} softmax_j(x_i W_c x_j^T * scale) x_j U_c
    """
    rows = []
    for i in range(x.shape[0]):
        seen = x[: i + 1]  # [i + 1, H]
        rows.append(
            sum(
                ((x[i] @ w_c @ seen.T * scale).softmax(0) @ seen @ u_c for w_c, u_c in zip(w, u, strict=True)),
                x.new_zeros(u.shape[-1]),
            )
        )
    return torch.stack(rows)


def rotation_matrix(distance: int, dim: int, rotated: tuple[tuple[int, int], ...], rope: RopeParameters) -> Tensor:
    """R_distance as a dense float64 matrix [dim, dim] that acts on column vectors."""
    matrix = torch.eye(dim, dtype=torch.float64)
    for start, stop in rotated:
        half = (stop - start) // 2
        for f in range(half):
            angle = distance * turn(f, stop - start, rope)
            a, b = start + f, start + f + half
            matrix[a, a] = matrix[b, b] = math.cos(angle)
            matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def turn(pair: int, dim: int, rope: RopeParameters) -> float:
    """Radians per position of one of the dim / 2 pairs."""
    plain = rope.rope_theta ** (-2 * pair / dim)
    if rope.rope_type == "default":
        return plain
    if rope.rope_type == "linear":
        return plain / rope.factor
    # YaRN: by pair number, a line from 1 at the pair that makes beta_fast turns in the training length down to 0 at
    # the pair that makes beta_slow.
    assert rope.original_max_position_embeddings is not None
    ends = [
        dim / 2 * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi), rope.rope_theta)
        for turns in (rope.beta_fast, rope.beta_slow)
    ]
    if rope.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], dim - 1)
    kept = 1 - min(max((pair - first) / (last - first if last != first else 0.001), 0), 1)
    return kept * plain + (1 - kept) * plain / rope.factor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
