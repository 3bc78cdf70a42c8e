"""Attention with linear biases (ALiBi; Press et al., arXiv 2108.12409): score_ij - slope_c * (i - j)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def alibi_slopes(heads: int) -> list[float]:
    """Slope of every head: 2^(-8c/n) for a power of two n, filled up with the odd steps of 2n otherwise."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * c / power) for c in range(1, power + 1)]
    between = [2 ** (-8 * (c - 0.5) / power) for c in range(1, power + 1)]
    return slopes + between[: heads - power]


def alibi_bias(slopes: Sequence[float], query_positions: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, [N, T, S]; slopes of N heads, query_positions [T] are slot numbers."""
    slopes_N = torch.tensor(slopes, dtype=dtype, device=query_positions.device)
    distance = query_positions[:, None] - torch.arange(slots, device=query_positions.device)  # [T, S]
    return -slopes_N[:, None, None] * distance
