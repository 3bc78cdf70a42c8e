"""Rotary position embedding (RoPE; Su et al., arXiv 2104.09864), one convention: half-split pairs.

Element f is paired with element f + dim/2, and the pair turns by position * theta^(-2f/dim), as in Llama. A cached
token's position is its slot: rotations are relative, so left padding only shifts both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def inverse_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Turn per position of every pair, in radians, float64 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return theta**-exponents


@dataclass(frozen=True)
class Rotation:
    """R at some positions, ready to be applied: `rope(x)` turns x, `rope.inverse(x)` turns it back.

    cos, sin: [T, dim / 2], or None where nothing is rotated. The last axis of x is `blocks` equal blocks; the
    leading `dim` elements of each are turned and the others left alone.
    """

    cos: Tensor | None
    sin: Tensor | None
    blocks: int = 1

    @classmethod
    def at(cls, positions: Tensor, dim: int, theta: float, dtype: torch.dtype, blocks: int = 1) -> Rotation:
        """Tables for positions [T]; angles are taken in float32 at least, as every serving engine does."""
        if dim == 0:
            return cls(None, None)
        precision = torch.promote_types(dtype, torch.float32)
        turns = inverse_frequencies(dim, theta, positions.device).to(precision)
        angles = positions.to(precision)[:, None] * turns  # [T, dim / 2]
        return cls(angles.cos().to(dtype), angles.sin().to(dtype), blocks)

    def __call__(self, x: Tensor) -> Tensor:
        """R x for x [..., T, width]."""
        return x if self.sin is None else self._turn(x, self.sin)

    def inverse(self, x: Tensor) -> Tensor:
        """R^-1 x for x [..., T, width]."""
        return x if self.sin is None else self._turn(x, -self.sin)

    def _turn(self, x: Tensor, sin: Tensor) -> Tensor:
        assert self.cos is not None
        # Under autocast x is narrower than the hidden states that the tables were made for.
        cos, sin = self.cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)  # [T, 1, dim / 2]
        half = cos.shape[-1]
        blocks = x.unflatten(-1, (self.blocks, -1))  # [..., T, blocks, width / blocks]
        first, second, rest = blocks.split((half, half, blocks.shape[-1] - 2 * half), dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
        return turned.flatten(-2)
