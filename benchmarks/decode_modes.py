"""What `decode.py` measures: modes, sizes, data and the exact result."""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimatrix.attention.gmha import ValueSource
from multimatrix.ops.decode import plain_decode_attention
from multimatrix.ops.fp8 import dequantize, quantize
from multimatrix.ops.rotary import RopeParameters, Rotation, SlotRotation

# Of an output against the exact one, by head: bfloat16 weights, products and output leave 3e-3. A peer that rotates its
# keys in bfloat16, as transformers does, leaves more.
TOLERANCE, PEER_TOLERANCE = 1e-2, 2e-2


@dataclass(frozen=True)
class Mode:
    """A kind of cache. heads, dim, value_dim: sizes that the mode fixes, None where the caller chooses."""

    title: str
    source: ValueSource
    fp8: bool = False
    heads: int | None = None
    dim: int | None = None
    value_dim: int | None = None


MODES = {
    "own": Mode("own value, bf16 (MFA)", "own"),
    "key": Mode("value is the key, bf16 (MFA-KR relative)", "key"),
    "unrotated": Mode("value is the un-rotated key, full RoPE, bf16 (MFA-KR unrotated)", "unrotated"),
    "fp8": Mode("own value, FP8 cache, a scale per token (MFA)", "own", fp8=True),
    "mla": Mode("value is a slice of the key, bf16 (MLA, absorbed)", "slice", heads=128, dim=576, value_dim=512),
}
SMOKE_MLA = dataclasses.replace(MODES["mla"], heads=4, dim=48, value_dim=32)


@dataclass(frozen=True)
class Case:
    """One cell of the table: a decode step of one layer, one new token a sequence, one key head."""

    mode: str
    source: ValueSource
    fp8: bool
    heads: int
    dim: int
    value_dim: int
    batch: int
    context: int

    @property
    def tokens(self) -> int:
        return self.batch * self.context

    @property
    def bytes(self) -> int:
        """What the cache stores, every tensor counted once, FP8 scales included."""
        widths = [self.dim, self.value_dim] if self.source == "own" else [self.dim]
        return self.tokens * sum(width + 4 if self.fp8 else 2 * width for width in widths)

    @property
    def flops(self) -> int:
        return 2 * self.heads * (self.dim + self.value_dim) * self.tokens

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.context // 1024}k" if self.context % 1024 == 0 else f"{self.batch}x{self.context}"

    @property
    def label(self) -> str:
        return f"{self.mode} m={self.heads} C={self.dim} {self.shape}"

    @property
    def rotation(self) -> SlotRotation | None:
        return SlotRotation(RopeParameters(), self.dim) if self.source == "unrotated" else None


def parse_shape(text: str) -> tuple[int, int]:
    """BATCHxCONTEXT, such as 16x8k; k is 1024."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(k?)", text)
    if match is None:
        raise ValueError(f"a shape is BATCHxCONTEXT such as 16x8k, got {text!r}")
    return int(match[1]), int(match[2]) * (1024 if match[3] else 1)


def make_cases(
    modes: list[str], heads: list[int], dims: list[int], shapes: list[tuple[int, int]], smoke: bool
) -> list[Case]:
    """All combinations, in the order of the tables; a mode of fixed sizes comes once."""
    cases: dict[Case, None] = {}
    for name in modes:
        mode = SMOKE_MLA if smoke and name == "mla" else MODES[name]
        for m in [mode.heads] if mode.heads else heads:
            for dim in [mode.dim] if mode.dim else dims:
                for batch, context in shapes:
                    case = Case(name, mode.source, mode.fp8, m, dim, mode.value_dim or dim, batch, context)
                    cases[case] = None
    return list(cases)


@dataclass(frozen=True)
class Data:
    """Tensors of one call: q [B, m, 1, D], the cache as `decode_attention` takes it, lengths [B]."""

    q: Tensor
    key: Tensor
    value: Tensor | None
    scales: tuple[Tensor, Tensor] | None
    lengths: Tensor

    def sequence(self, row: int) -> Data:
        """One sequence of the batch."""
        one = slice(row, row + 1)
        value = None if self.value is None else self.value[one]
        scales = None if self.scales is None else (self.scales[0][one], self.scales[1][one])
        return Data(self.q[one], self.key[one], value, scales, self.lengths[one])


def make_data(case: Case, generator: torch.Generator) -> Data:
    """Random normal numbers; the cache is full, so that its length is its size."""
    device = generator.device

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device, generator=generator)

    q = draw(case.batch, case.heads, 1, case.dim)
    key = draw(case.batch, 1, case.context, case.dim)
    value = draw(case.batch, 1, case.context, case.value_dim) if case.source == "own" else None
    scales = None
    if case.fp8:
        assert value is not None
        key, key_scale = quantize(key)
        value, value_scale = quantize(value)
        scales = key_scale, value_scale
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
    data = Data(q, key, value, scales, lengths)
    stored = [key, value, *(scales or ())]
    assert case.bytes == sum(tensor.nbytes for tensor in stored if tensor is not None)
    return data


def cache_arguments(case: Case, data: Data) -> dict[str, Any]:
    """Keyword arguments of `decode_attention` beside the query."""
    return {
        "key": data.key,
        "value": data.value,
        "lengths": data.lengths,
        "scale": case.scale,
        "source": case.source,
        "value_dim": case.value_dim if case.source == "slice" else None,
        "rotation": case.rotation,
        "scales": data.scales,
    }


def keys_and_values(case: Case, data: Data, rope: Rotation | None) -> tuple[Tensor, Tensor]:
    """What attention without a kernel for this cache has to make of it in every step. rope: at all slots, bfloat16."""
    key = data.key
    if data.scales is not None:
        assert data.value is not None
        key_scale, value_scale = data.scales
        return dequantize(key, key_scale, torch.bfloat16), dequantize(data.value, value_scale, torch.bfloat16)
    if case.source == "own":
        assert data.value is not None
        return key, data.value
    if rope is not None:
        return rope(key), key
    return key, key[..., : case.value_dim]


@dataclass(frozen=True)
class Check:
    """The exact output, float64 [m, 1, V], of one sequence of one buffer set."""

    buffer: int
    row: int
    expected: Tensor


def make_checks(case: Case, sets: list[Data]) -> list[Check]:
    """First and last sequence of the first and the last buffer set, by the plain twin in float64.

    One at a time: for several, a product with all heads would copy their keys for every head.
    """
    checks = []
    for buffer, row in itertools.product(sorted({0, len(sets) - 1}), sorted({0, case.batch - 1})):
        one = sets[buffer].sequence(row)
        expected, _ = plain_decode_attention(one.q.double(), **cache_arguments(case, one))
        checks.append(Check(buffer, row, expected[0]))
    return checks


def worst_error(outputs: list[Tensor], checks: list[Check]) -> float:
    """Largest relative error |o - exact| / |exact| of a head; NaN where anything in any output is not finite."""
    if not all(bool(output.isfinite().all()) for output in outputs):
        return float("nan")
    errors = []
    for check in checks:
        difference = outputs[check.buffer][check.row].double() - check.expected
        errors.append((difference.norm(dim=-1) / check.expected.norm(dim=-1)).max().item())
    return max(errors)
