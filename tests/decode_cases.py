"""Cases of decoding attention, their tensors, and an oracle that shares nothing with the kernel or its plain twin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from multimatrix.ops.alibi import alibi_slopes
from multimatrix.ops.fp8 import quantize
from multimatrix.ops.reference import turn
from multimatrix.ops.rotary import RopeParameters, SlotRotation

NAN = float("nan")
# What a block table may hold past the pages of a sequence.
WILD = (2**31 - 1, -(2**31), -1)
DEFAULT_ROPE = RopeParameters()
NAMES = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `decode_attention`. B, T, S, N, G, D, V as in its docstring.

    lengths: of every sequence; None for ragged ones, the last of them S. one_length: "int" or "tensor" where one number
    serves all. R: rotated elements of the key, all by default. page: slots of a page, 0 for a contiguous cache. layout
    of the cache: "dense", "static" (the leading slots and elements of a larger buffer) or "swapped" ([B, S, G, D] in
    memory). mask: "left" (padding), "documents", or "shared" (one row of mask for all sequences). fp8: scales per
    "token" or "tensor".
    """

    source: str = "own"
    B: int = 2
    T: int = 1
    S: int = 63
    N: int = 5
    G: int = 1
    D: int = 96
    V: int | None = None
    R: int | None = None
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None
    one_length: str | None = None
    page: int = 0
    layout: str = "dense"
    mask: str | None = None
    alibi: bool = False
    window: int | None = None
    sinks: bool = False
    fp8: str | None = None
    rope: RopeParameters = DEFAULT_ROPE
    blocks: int = 1
    splits: int | None = None

    @property
    def name(self) -> str:
        parts = [self.source, f"B{self.B}", f"T{self.T}", f"S{self.S}", f"N{self.N}"]
        parts += [f"G{self.G}"] if self.G > 1 else []
        parts += [f"D{self.D}"]
        for letter in ("V", "R", "page", "window", "splits"):
            parts += [f"{letter}{value}"] if (value := getattr(self, letter)) else []
        parts += ["L" + "+".join(map(str, self.lengths))] if self.lengths is not None else []
        parts += [f"one_{self.one_length}"] if self.one_length else []
        parts += [self.layout] if self.layout != "dense" else []
        parts += [self.mask] if self.mask else []
        parts += [f"blocks{self.blocks}"] if self.blocks > 1 else []
        parts += [self.rope.rope_type] if self.rope.rope_type != "default" else []
        parts += ["alibi"] if self.alibi else []
        parts += ["sinks"] if self.sinks else []
        parts += [f"fp8_{self.fp8}"] if self.fp8 else []
        return "-".join([*parts, NAMES[self.dtype]])

    @property
    def all_lengths(self) -> list[int]:
        if self.lengths is not None:
            return list(self.lengths) * (self.B if len(self.lengths) == 1 else 1)
        if self.one_length:
            return [self.S] * self.B
        return [self.S - round(self.S * (self.B - 1 - b) / self.B) for b in range(self.B)]

    @property
    def width(self) -> int:
        """Elements of an output."""
        return self.D if self.source in ("key", "unrotated") else self.V or self.D


# One of each way to read a value.
SOURCES = [
    Case(),
    Case(V=64),
    Case(D=64, V=96),
    Case(source="key"),
    Case(source="slice", V=64),
    Case(source="unrotated"),
    Case(source="unrotated", R=32),
]


def each(*changes: dict[str, Any], of: Sequence[Case] = SOURCES) -> list[Case]:
    """Every case with every change."""
    return [replace(case, **change) for case in of for change in changes]


@dataclass
class Call:
    """Arguments of `decode_attention` and of its twin."""

    arguments: tuple[Tensor, ...]
    options: dict[str, Any]


def make_call(case: Case, device: str = "cpu", seed: int = 0) -> Call:
    """Random tensors; NaN in every slot, page and scale that is not to be read, wild numbers in such table entries."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    query = normal(case.B, case.N, case.T, case.D).to(case.dtype)
    if case.layout == "swapped":  # as a projection leaves it: [B, T, N, D] in memory
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    tensors = [normal(case.B, case.G, case.S, case.D)]
    if case.source == "own":
        tensors.append(normal(case.B, case.G, case.S, case.V or case.D))
    options: dict[str, Any] = {"scale": 1.3 / math.sqrt(case.D), "source": case.source}

    dead = torch.ones(case.B, case.S, dtype=torch.bool, device=device)
    for b, length in enumerate(case.all_lengths):
        dead[b, :length] = False
    dead = dead[:, None, :, None]  # [B, 1, S, 1]
    scales: list[Tensor] = []
    if case.fp8:
        quantized = [quantize(tensor, case.fp8) for tensor in tensors]  # type: ignore[arg-type]
        tensors = [data for data, _ in quantized]
        scales = [scale for _, scale in quantized]
        if case.fp8 == "token":
            scales = [scale.masked_fill(dead[..., 0], NAN) for scale in scales]
        tensors = [tensor.float().masked_fill(dead, NAN).to(torch.float8_e4m3fn) for tensor in tensors]
    else:
        tensors = [tensor.masked_fill(dead, NAN).to(case.dtype) for tensor in tensors]

    if case.page:
        table, order = _table(case, generator, device)
        tensors = [_pages(tensor, order, case.page) for tensor in tensors]
        if case.fp8 == "token":
            scales = [_pages(scale[..., None], order, case.page).squeeze(-1) for scale in scales]
        options["block_table"] = table
    if case.layout != "dense":
        tensors = [_laid_out(tensor, case.layout) for tensor in tensors]
    if scales:
        options["scales"] = (scales[0], scales[-1])

    lengths = torch.tensor(case.all_lengths, dtype=torch.int32, device=device)
    options["lengths"] = lengths
    if case.one_length == "int":
        options["lengths"] = case.all_lengths[0]
    elif case.one_length == "tensor":
        options["lengths"] = lengths[:1]
    if case.source == "slice":
        options["value_dim"] = case.V
    if case.source == "unrotated":
        options["rotation"] = SlotRotation(case.rope, case.R or case.D // case.blocks, case.blocks)
    if case.mask:
        options["mask"] = _mask(case, device)
    if case.alibi:
        options["slopes"] = torch.tensor(alibi_slopes(case.N), device=device)
    if case.window:
        options["window"] = case.window
    if case.sinks:
        options["sinks"] = normal(case.N)
    return Call((query, *tensors), options)


def _table(case: Case, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """The block table, int32 [B, pages], and which page of the pool every page of the logical cache [B, pages] is."""
    pages = -(-case.S // case.page)
    order = torch.randperm(case.B * pages, generator=generator, device=device).view(case.B, pages)
    table = order.int()
    for b, length in enumerate(case.all_lengths):
        used = -(-length // case.page)
        table[b, used:] = torch.tensor([WILD[i % len(WILD)] for i in range(pages - used)], dtype=torch.int32)
    return table, order


def _pages(tensor: Tensor, order: Tensor, page: int) -> Tensor:
    """[B, G, S, D] -> pages [P, G, page, D]; two pages more than are used, and the end of the last one, are NaN."""
    batch, groups, slots, dim = tensor.shape
    count = order.shape[1]
    full = torch.full((batch, groups, count * page, dim), NAN, device=tensor.device).to(tensor.dtype)
    full[:, :, :slots] = tensor
    pool = torch.full((order.numel() + 2, groups, page, dim), NAN, device=tensor.device).to(tensor.dtype)
    _bits(pool)[order.flatten()] = _bits(full.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1))
    return pool


def _bits(tensor: Tensor) -> Tensor:
    """Not every device can scatter e4m3."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same elements at other strides; the last axis stays together."""
    if layout == "static":
        shape = (tensor.shape[0], tensor.shape[1] + 1, tensor.shape[2] + 9, tensor.shape[3] + 16)
        buffer = torch.full(shape, NAN, device=tensor.device).to(tensor.dtype)
        view = buffer[:, 1:, : tensor.shape[2], : tensor.shape[3]]
        view.copy_(tensor)
        return view
    assert layout == "swapped"
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _mask(case: Case, device: str) -> Tensor:
    """Boolean [B or 1, 1, T, S], True is seen; what lies past a sequence's length is seen too, and must not be."""
    slots = -(-case.S // case.page) * case.page if case.page else case.S
    slot = torch.arange(slots, device=device)
    if case.mask == "left":
        padding = torch.tensor([length * (b + 1) // 4 for b, length in enumerate(case.all_lengths)], device=device)
        seen = (slot >= padding[:, None])[:, None, None]  # [B, 1, 1, S]
    elif case.mask == "documents":
        # Documents of 13 slots; the last T slots belong to the last of them.
        lengths = torch.tensor(case.all_lengths, device=device)
        query = lengths[:, None] - case.T + torch.arange(case.T, device=device)  # [B, T]
        seen = (slot // 13 == (query // 13)[..., None])[:, None]  # [B, 1, T, S]
    else:
        assert case.mask == "shared"
        seen = (slot % 3 != 1)[None, None, None]
    return seen.expand(-1, 1, case.T, slots).contiguous()


def oracle(
    q: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    lengths: Tensor | int,
    scale: float,
    source: str,
    value_dim: int | None = None,
    rotation: SlotRotation | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The same call in float64: one cached token after the other, one softmax after the other."""
    batch, heads, tokens, _ = q.shape
    groups = key.shape[1]
    given = lengths.tolist() if isinstance(lengths, Tensor) else [lengths]
    outputs, sums = [], []
    for b in range(batch):
        length = given[b] if len(given) > 1 else given[0]

        def cached(tensor: Tensor, which: int, g: int, j: int, b: int = b) -> Tensor:
            where, slot = b, j
            if block_table is not None:
                where, slot = int(block_table[b, j // key.shape[2]]), j % key.shape[2]
            x = tensor[where, g, slot].double()
            if scales is not None:
                x = x * (scales[which][where, g, slot] if scales[which].dim() > 1 else scales[which][0]).double()
            return x

        for n in range(heads):
            g = n // (heads // groups)
            if n % (heads // groups) == 0:
                raw = [cached(key, 0, g, j) for j in range(length)]
                keys, values = raw, raw
                if source == "own":
                    values = [cached(value, 1, g, j) for j in range(length)]
                elif source == "slice":
                    values = [x[:value_dim] for x in raw]
                elif source == "unrotated":
                    keys = [_turned(x, j, rotation) for j, x in enumerate(raw)]
                matrix_k = torch.stack(keys) if length else None  # [length, D]
                matrix_v = torch.stack(values) if length else None
            for t in range(tokens):
                i = length - tokens + t
                seen = [
                    j
                    for j in range(max(0, i - window + 1) if window else 0, i + 1)
                    if mask is None or mask[b if mask.shape[0] > 1 else 0, 0, t, j]
                ]
                scores = torch.empty(0, dtype=torch.float64)
                if seen:
                    scores = matrix_k[seen] @ q[b, n, t].double() * scale
                    if slopes is not None:
                        scores = scores + float(slopes[n]) * (torch.tensor(seen, dtype=torch.float64) - i)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[n : n + 1].double()))
                weights = scores.softmax(0)[: len(seen)]
                width = value.shape[-1] if source == "own" else value_dim or key.shape[-1]
                outputs.append(weights @ matrix_v[seen] if seen else torch.zeros(width, dtype=torch.float64))
                sums.append(scores.logsumexp(0) if len(scores) else torch.tensor(-math.inf, dtype=torch.float64))
    shape = (batch, heads, tokens)
    return torch.stack(outputs).view(*shape, -1), torch.stack(sums).view(shape)


def _turned(x: Tensor, slot: int, rotation: SlotRotation) -> Tensor:
    """R_slot x: pair f of every block, a complex number, times exp(i slot theta_f)."""
    blocks = []
    half = rotation.dim // 2
    angles = [slot * turn(f, rotation.dim, rotation.parameters) for f in range(half)]
    turns = torch.tensor([complex(math.cos(angle), math.sin(angle)) for angle in angles], dtype=torch.complex128)
    for block in x.chunk(rotation.blocks):
        pairs = torch.complex(block[:half], block[half : 2 * half]) * turns
        blocks += [pairs.real, pairs.imag, block[2 * half :]]
    return torch.cat(blocks)


def differences(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Largest absolute difference, relative difference of norms, and 1 - cosine of the worst row."""
    actual, expected = actual.double(), expected.double()
    error = actual - expected
    rows = (actual * expected).sum(-1) / (actual.norm(dim=-1) * expected.norm(dim=-1)).clamp_min(1e-300)
    alive = expected.norm(dim=-1) > 0
    return {
        "absolute": error.abs().max().item(),
        "relative": (error.norm() / expected.norm().clamp_min(1e-300)).item(),
        "cosine": (1 - rows[alive]).max().item() if alive.any() else 0.0,
    }


def assert_agrees(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """o and lse: inf and NaN in the same places, rows of zeros exact, and the rest within the tolerance."""
    (o, lse), (exact_o, exact_lse) = actual, expected
    assert o.shape == exact_o.shape
    assert lse.shape == exact_lse.shape
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    assert o.isfinite().all()
    assert not lse.isnan().any()
    assert not o[exact_o.abs().amax(-1) == 0].any()
    seen = differences(o, exact_o)
    finite = exact_lse.isfinite()
    seen["lse"] = (lse.double() - exact_lse)[finite].abs().max().item() if finite.any() else 0.0
    # The cosine falls with the square of an error; of a single row, so a wider bound.
    bounds = {"absolute": 5 * tolerance, "relative": tolerance, "cosine": 10 * tolerance**2 + 1e-12, "lse": tolerance}
    beyond = {name: (value, bounds[name]) for name, value in seen.items() if value > bounds[name]}
    assert not beyond, beyond
