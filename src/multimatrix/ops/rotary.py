"""Rotary position embedding (RoPE; Su et al., arXiv 2104.09864), one convention: half-split pairs.

Element f is paired with element f + dim/2, and the pair turns by position * theta^(-2f/dim), as in Llama. A cached
token's position is its slot: rotations are relative, so left padding only shifts both sides.

A model runs past its training length L on slower turns (`RopeParameters.rope_type`):

    linear   every frequency divided by the factor (Chen et al., arXiv 2306.15595)
    yarn     pairs that turn often within L stay, pairs that turn less than once are divided by the factor, between
             them a ramp over the pairs; scores are multiplied by (0.1 ln factor + 1)^2 (Peng et al., arXiv 2309.00071)

YaRN's multiplier acts on the whole score. transformers' Llama puts its root on cosines and sines, which is the same
where a whole head is rotated, and would scale the value where the value is the rotated key.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from multimatrix.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """The frequencies of RoPE, in the words of transformers' `rope_parameters`.

    rope_theta: the base. rope_type: "default", "linear" or "yarn". factor: how many times the training length the
    model shall run. For yarn: original_max_position_embeddings, the training length; beta_fast and beta_slow, the
    turns within it from which a frequency stays and below which it is divided; attention_factor, the root of what
    multiplies the scores, None for 0.1 ln factor + 1; truncate, whether the ramp starts and ends at whole pairs.

    Raises:
        InputError: the parameters cannot work together.
    """

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in _NEEDED:
            raise InputError(f"rope_type must be one of {', '.join(_NEEDED)}; got {self.rope_type!r}")
        for name in ("rope_theta", "factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if not (_is_positive(value) or (name == "attention_factor" and value is None)):
                raise InputError(f"rope_parameters: {name} must be a positive number, got {value!r}")
        if self.factor < 1:
            raise InputError(f"rope_parameters: factor must be at least 1, got {self.factor}")
        if self.rope_type == "yarn":
            length = self.original_max_position_embeddings
            if not (isinstance(length, int) and length > 0):
                raise InputError(
                    "rope_parameters: yarn needs original_max_position_embeddings, the length the model was trained "
                    f"at, got {length!r}"
                )
            if self.beta_fast <= self.beta_slow:
                raise InputError(
                    f"rope_parameters: beta_fast must be above beta_slow, got {self.beta_fast} and {self.beta_slow}"
                )

    @classmethod
    def from_dict(cls, parameters: Mapping[str, Any] | None) -> Self:
        """From a config's `rope_parameters`; InputError where a field is missing or has no meaning here."""
        given = {name: value for name, value in (parameters or {}).items() if value is not None}
        rope_type = given.get("rope_type", "default")
        needed, optional = _NEEDED.get(rope_type, ()), _OPTIONAL.get(rope_type, ())
        known = {"rope_theta", "rope_type", *needed, *optional}
        if rope_type in _NEEDED and (unknown := [name for name in given if name not in known]):
            raise InputError(
                f"rope_parameters of type {rope_type} have no {unknown[0]!r}; they are {', '.join(sorted(known))}"
            )
        if missing := [name for name in needed if name not in given]:
            raise InputError(f"rope_parameters of type {rope_type} need {', '.join(missing)}")
        return cls(**given)

    @property
    def text(self) -> str:
        """All of it as an operator's argument, exact; `from_text` reads it."""
        return f"{self.rope_type} " + " ".join(
            repr(value)
            for value in (
                self.rope_theta,
                self.factor,
                self.original_max_position_embeddings,
                self.beta_fast,
                self.beta_slow,
                self.attention_factor,
                self.truncate,
            )
        )

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The parameters that `text` describes."""
        rope_type, *values = text.split(" ")
        theta, factor, length, fast, slow, attention, truncate = (ast.literal_eval(value) for value in values)
        return cls(
            rope_type=rope_type,
            rope_theta=theta,
            factor=factor,
            original_max_position_embeddings=length,
            beta_fast=fast,
            beta_slow=slow,
            attention_factor=attention,
            truncate=truncate,
        )

    @property
    def score_factor(self) -> float:
        """What the scores of rotated queries and keys are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        root = self.attention_factor
        return (0.1 * math.log(self.factor) + 1.0 if root is None else root) ** 2

    def frequencies(self, dim: int, device: torch.device | None = None) -> Tensor:
        """Turn per position of every pair, in radians, float64 [dim / 2]."""
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        plain = self.rope_theta**-exponents
        if self.rope_type == "yarn":
            first, last = self._ramp(dim)
            pairs = torch.arange(dim // 2, dtype=torch.float64, device=device)
            divided = ((pairs - first) / (last - first)).clamp(0, 1)
            return plain * (1 - divided) + plain / self.factor * divided
        return plain / self.factor

    def _ramp(self, dim: int) -> tuple[float, float]:
        """The last pair whose frequency stays and the first that is divided by the whole factor."""
        length = self.original_max_position_embeddings
        assert length is not None

        def pair(turns: float) -> float:
            # theta^(-2 pair / dim) * length = 2 pi turns
            return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(self.rope_theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        return first, last if last != first else last + 0.001


# What each type of RoPE must state, and what it may.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate")}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


# Compared by identity: the compiler of torch 2.11 asks a callable for its hash before its tensors exist.
@dataclass(frozen=True, eq=False)
class Rotation:
    """R at some positions, ready to be applied: `rope(x)` turns x, `rope.inverse(x)` turns it back.

    cos, sin: [T, dim / 2], or None where nothing is rotated. The last axis of x is `blocks` equal blocks; the
    leading `dim` elements of each are turned and the others left alone.
    """

    cos: Tensor | None
    sin: Tensor | None
    blocks: int = 1

    @classmethod
    def at(
        cls, positions: Tensor, dim: int, parameters: RopeParameters, dtype: torch.dtype, blocks: int = 1
    ) -> Rotation:
        """Tables for positions [T]; angles are taken in float32 at least, as every serving engine does."""
        if dim == 0:
            return cls(None, None)
        precision = torch.promote_types(dtype, torch.float32)
        turns = parameters.frequencies(dim, positions.device).to(precision)
        angles = positions.to(precision)[:, None] * turns  # [T, dim / 2]
        return cls(angles.cos().to(dtype), angles.sin().to(dtype), blocks)

    def __call__(self, x: Tensor) -> Tensor:
        """R x for x [B, heads, T, width]."""
        return x if self.sin is None else self._turn(x, self.sin)

    def inverse(self, x: Tensor) -> Tensor:
        """R^-1 x for x [B, heads, T, width]."""
        return x if self.sin is None else self._turn(x, -self.sin)

    def _turn(self, x: Tensor, sin: Tensor) -> Tensor:
        assert self.cos is not None
        # Under autocast x is narrower than the hidden states that the tables were made for.
        cos, sin = (table[:, None, None].to(x.dtype) for table in (self.cos, sin))  # [T, 1, 1, dim / 2]
        half = cos.shape[-1]
        blocks = x.unflatten(-1, (self.blocks, -1))  # [B, heads, T, blocks, width / blocks]
        first, second, rest = blocks.transpose(1, 2).split((half, half, blocks.shape[-1] - 2 * half), dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
        # Token by token, as projections leave their heads: attention's output then is laid out like that too, and
        # the projection after it reads it where it is.
        return turned.flatten(-2).transpose(1, 2)


@dataclass(frozen=True)
class SlotRotation:
    """The rotation of cached keys, whose position is their slot: what "unrotated" needs to make scores.

    dim: leading elements that are turned. blocks: equal blocks of the key, each turned like a key of its own.
    """

    parameters: RopeParameters
    dim: int
    blocks: int = 1

    @property
    def text(self) -> str:
        """All of it as an operator's argument; `from_text` reads it."""
        return f"{self.dim} {self.blocks} {self.parameters.text}"

    @classmethod
    @functools.cache
    def from_text(cls, text: str) -> SlotRotation:
        """The rotation that `text` describes."""
        dim, blocks, parameters = text.split(" ", 2)
        return cls(RopeParameters.from_text(parameters), int(dim), int(blocks))

    def at(self, slots: int, dtype: torch.dtype, device: torch.device) -> Rotation:
        """Tables for slots 0..slots-1."""
        return Rotation.at(torch.arange(slots, device=device), self.dim, self.parameters, dtype, self.blocks)

    def tiles(self, block: int, slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """R at the first slot of every tile, float32 [tiles, 2, dim / 2], and within a tile, [2, block, dim / 2]."""
        # A power of two, so that a cache that grows asks for a new table rarely.
        tiles = 1 << (max(1, -(-slots // block)) - 1).bit_length()
        return _tile_tables(self.parameters, self.dim, block, tiles, device)


@functools.lru_cache(maxsize=16)
def _tile_tables(
    parameters: RopeParameters, dim: int, block: int, tiles: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    turns = parameters.frequencies(dim, device)
    origins = torch.arange(tiles, dtype=torch.float64, device=device)[:, None] * block * turns
    local = torch.arange(block, dtype=torch.float64, device=device)[:, None] * turns
    return (
        torch.stack((origins.cos(), origins.sin()), dim=1).float(),
        torch.stack((local.cos(), local.sin())).float(),
    )
