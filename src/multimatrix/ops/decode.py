"""Decoding attention over a long cache: one signature, a Triton kernel and its plain twin.

    o = softmax(scale * q . K + bias) V        for 1 to 8 new queries a sequence, causal among themselves

The value is a tensor of its own, the cached key itself, its leading slice, or the key before rotation; see
`attention.gmha.ValueSource`. The cache is contiguous, with a length per sequence, or paged. `decode_attention` runs the
kernel, `plain_decode_attention` says in torch what it computes.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multimatrix.ops.rotary import RopeParameters, Rotation

if TYPE_CHECKING:
    from multimatrix.attention.gmha import ValueSource

MAX_TOKENS = 8


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
        tiles = _power_of_two(max(1, -(-slots // block)))
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


def plain_decode_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    lengths: Tensor | int,
    scale: float,
    source: ValueSource = "own",
    value_dim: int | None = None,
    rotation: SlotRotation | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What `decode_attention` computes, in plain torch; arguments and results are the same."""
    batch, _, tokens, _ = q.shape
    if block_table is not None:
        key, value = _unpaged(key, block_table), None if value is None else _unpaged(value, block_table)
        if scales is not None and scales[0].dim() > 1:
            scales = tuple(_unpaged(scale_[..., None], block_table).squeeze(-1) for scale_ in scales)
    groups, slots = key.shape[1], key.shape[2]
    lengths = torch.as_tensor(lengths, device=q.device).expand(batch)  # [B]
    n = torch.arange(slots, device=q.device)
    inside = n < lengths[:, None]  # [B, S]
    precision = torch.promote_types(q.dtype, torch.float32)

    def read(tensor: Tensor, which: int) -> Tensor:
        tensor = tensor.to(precision)
        if scales is not None:
            scale_ = scales[which].to(precision)
            tensor = tensor * (scale_[..., None] if scale_.dim() > 1 else scale_)
        return tensor.masked_fill(~inside[:, None, :, None], 0.0)  # memory outside may hold anything

    keys = read(key, 0)  # [B, G, S, D]
    if source == "own":
        assert value is not None
        values = read(value, 1)  # [B, G, S, V]
    else:
        values = keys[..., :value_dim] if source == "slice" else keys
    if source == "unrotated":
        assert rotation is not None
        keys = rotation.at(slots, precision, q.device)(keys)
    position = lengths[:, None] - tokens + torch.arange(tokens, device=q.device)  # [B, T]
    seen = (inside[:, None] & (n <= position[..., None]))[:, None]  # [B, 1, T, S]
    if window is not None:
        seen = seen & (n > position[..., None] - window)[:, None]
    if mask is not None:
        seen = seen & mask
    grouped = q.to(precision).unflatten(1, (groups, -1))  # [B, G, N / G, T, D]
    scores = (grouped @ keys.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale  # [B, N, T, S]
    if slopes is not None:
        scores = scores + slopes.to(precision)[:, None, None] * (n - position[..., None])[:, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.to(precision)[None, :, None, None].expand(batch, -1, tokens, 1)
        scores = torch.cat((scores, sink), dim=-1)
    lse = scores.logsumexp(-1)  # [B, N, T]
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()[..., :slots]
    o = (weights.unflatten(1, (groups, -1)) @ values.unsqueeze(2)).flatten(1, 2)  # [B, N, T, V]
    return o.to(q.dtype), lse.float() if precision == torch.float32 else lse


def _unpaged(pages: Tensor, block_table: Tensor) -> Tensor:
    """Pages [P, G, page, D] -> [B, G, S, D] in the order of the table, whose entries past the end may be anything."""
    table = block_table.long().clamp(0, pages.shape[0] - 1)
    return pages[table].transpose(1, 2).flatten(2, 3)


def why_not(
    q: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    source: ValueSource,
    value_dim: int | None = None,
    rotation: SlotRotation | None = None,
    mask: Tensor | None = None,
) -> str | None:
    """Why the kernel does not take these tensors; None where it does. No tensor is read."""
    dims = [q.shape[-1], value.shape[-1] if source == "own" and value is not None else q.shape[-1]]
    if value_dim is not None and source == "slice":
        dims.append(value_dim)
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on a GPU"
    if kernels() is None:
        return "triton or the kernels are not installed"
    if q.shape[2] > MAX_TOKENS:
        return f"it takes {MAX_TOKENS} new tokens at most"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, key, value)):
        return "it has no gradient"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does not compute in {q.dtype}"
    if any(dim % 16 or dim > 576 for dim in dims):
        return "its head dims are multiples of 16 up to 576"
    if source == "unrotated" and (rotation is None or rotation.blocks != 1 or rotation.dim % 32):
        return "it rotates one block of a multiple of 32"
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1 or mask.stride(-1) != 1):
        return "it takes boolean masks that all heads share"
    if any(t is not None and t.stride(-1) != 1 for t in (q, key, value)):
        return "it reads rows that lie together"
    return None


def decode_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    lengths: Tensor | int,
    scale: float,
    source: ValueSource = "own",
    value_dim: int | None = None,
    rotation: SlotRotation | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q . keys) values over a cache, by the Triton kernel.

    q: [B, N, T, D], T new tokens of each sequence, 1 to 8; their keys are in the cache. key: [B, G, S, D], N a multiple
    of G, or pages [P, G, page, D] where `block_table`, int32 [B, pages], says which pages hold a sequence, in order.
    value: likewise, [.., V], for source "own". Rows of all three lie together in memory; other strides are free.
    lengths: tokens of every sequence, the new ones included, int32 [B] or [1], or one number for all; 0 gives zeros.
    source, value_dim: where values are read, see `attention.gmha.ValueSource`; "unrotated" needs `rotation`. mask:
    boolean [B or 1, 1, T, S], True is seen. slopes: float32 [N], adds slope * (slot - slot of the query), ALiBi.
    window: a query sees itself and window - 1 slots before it. sinks: [N], a logit without a value in every softmax.
    scales: of key and value of a cache in e4m3, float32, see `ops.fp8`. num_splits: into how many runs a sequence is
    cut; None to fill the device. A fixed number gives results that do not depend on the batch.

    Nothing waits for the device, and what is chosen here depends on shapes alone: a call can be captured in a CUDA
    graph and replayed with other lengths up to S.

    Returns: o [B, N, T, V] in q's dtype, and the natural log of every softmax's sum, float32 [B, N, T], -inf where
    nothing is seen.

    Raises:
        ValueError: the kernel does not take these tensors; the sentence says why, see `why_not`.
    """
    reason = why_not(q, key, value, source=source, value_dim=value_dim, rotation=rotation, mask=mask)
    if reason is not None:
        raise ValueError(f"the decode kernel does not take this: {reason}")
    tensor_lengths = lengths if isinstance(lengths, Tensor) else None
    return torch.ops.multimatrix.decode_attention(
        q,
        key,
        value,
        tensor_lengths,
        0 if tensor_lengths is not None else lengths,
        scale,
        source,
        value_dim,
        rotation.text if source == "unrotated" and rotation is not None else None,
        block_table,
        mask,
        slopes,
        window,
        sinks,
        None if scales is None else scales[0],
        None if scales is None else scales[1],
        num_splits,
    )


@torch.library.custom_op("multimatrix::decode_attention", mutates_args=())
def _decode_op(
    q: Tensor,
    key: Tensor,
    value: Tensor | None,
    lengths: Tensor | None,
    length: int,
    scale: float,
    source: str,
    value_dim: int | None,
    rotation: str | None,
    block_table: Tensor | None,
    mask: Tensor | None,
    slopes: Tensor | None,
    window: int | None,
    sinks: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    num_splits: int | None,
) -> tuple[Tensor, Tensor]:
    turn = None if rotation is None else SlotRotation.from_text(rotation)
    plan = plan_of(q, key, value, source, value_dim, 0 if turn is None else turn.dim)
    slots = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    tables = (None, None) if turn is None else turn.tiles(plan.block_slots, slots, q.device)
    if num_splits is None:
        rows = q.shape[1] // key.shape[1] * q.shape[2]
        programs = q.shape[0] * key.shape[1] * -(-rows // plan.block_rows)
        num_splits = split_count(programs, slots, plan, q.device)
    scales = (key_scale, value_scale)
    return launch(
        plan,
        num_splits,
        q,
        key,
        value,
        lengths,
        length,
        scale,
        tables,
        block_table,
        mask,
        slopes,
        window,
        sinks,
        scales,
    )


def launch(
    plan: Plan,
    num_splits: int,
    q: Tensor,
    key: Tensor,
    value: Tensor | None,
    lengths: Tensor | None,
    length: int,
    scale: float,
    tables: tuple[Tensor | None, Tensor | None] = (None, None),
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Both kernels by this plan; arguments as in `decode_attention`, tables of `SlotRotation.tiles` for its tile."""
    triton_kernels = kernels()
    assert triton_kernels is not None
    batch, heads, tokens, _ = q.shape
    groups, page = key.shape[1], 0 if block_table is None else key.shape[2]
    rows = heads // groups * tokens
    blocks = -(-rows // plan.block_rows)
    (origin, local), (key_scale, value_scale) = tables, scales
    direct = num_splits == 1
    width = plan.value_width
    out = q.new_empty(batch, heads, tokens, width)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    part, part_lse = out, lse
    if not direct:
        part = torch.empty(batch, groups, num_splits, rows, width, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(batch, groups, num_splits, rows, dtype=torch.float32, device=q.device)
    # Tensors that a mode does not have are never read; a pointer is passed all the same.
    value = value if value is not None else key
    mask_strides = (0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2))
    scale_strides = (0, 0, 0)
    if key_scale is not None and key_scale.dim() > 1:
        scale_strides = key_scale.stride()
        assert value_scale is None or value_scale.stride() == scale_strides, "both scales lie alike"
    triton_kernels.split_kernel[(num_splits, groups * blocks, batch)](
        q,
        key,
        value,
        part,
        part_lse,
        lengths if lengths is not None else lse,
        length,
        block_table if block_table is not None else lse,
        mask if mask is not None else lse,
        slopes if slopes is not None else lse,
        sinks if sinks is not None else lse,
        key_scale if key_scale is not None else lse,
        value_scale if value_scale is not None else (key_scale if key_scale is not None else lse),
        origin if origin is not None else lse,
        local if local is not None else lse,
        scale,
        *q.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *out.stride()[:3],
        0 if lengths is None or lengths.numel() == 1 else lengths.stride(0),
        0 if block_table is None else block_table.stride(0),
        *mask_strides,
        *scale_strides,
        heads // groups,
        tokens,
        groups,
        num_splits,
        window or 0,
        **plan.constants(triton_kernels),
        PAGE=page,
        DIRECT=direct,
        HAS_LENGTHS=lengths is not None,
        HAS_MASK=mask is not None,
        HAS_SLOPES=slopes is not None,
        HAS_SINKS=sinks is not None,
        HAS_WINDOW=window is not None,
        CAUSAL=tokens > 1,
        SCALES=0 if key_scale is None else 1 if key_scale.dim() == 1 else 2,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    if not direct:
        block = min(32, _power_of_two(width))
        triton_kernels.combine_kernel[(rows, -(-width // block), batch * groups)](
            part,
            part_lse,
            out,
            lse,
            sinks if sinks is not None else lse,
            *out.stride()[:3],
            heads // groups,
            tokens,
            groups,
            num_splits,
            WIDTH=width,
            BLOCK_V=block,
            BLOCK_S=_power_of_two(num_splits),
            HAS_SINKS=sinks is not None,
            num_warps=4,
        )
    return out, lse


@_decode_op.register_fake
def _(q: Tensor, key: Tensor, value: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    source, value_dim = rest[3], rest[4]
    width = (
        value.shape[-1] if source == "own" and value is not None else value_dim if source == "slice" else key.shape[-1]
    )
    return q.new_empty(*q.shape[:3], width), q.new_empty(q.shape[:3], dtype=torch.float32)


@dataclass(frozen=True)
class Plan:
    """How a call is cut: columns of key and value, rows and slots of a tile, warps and stages of the pipeline.

    key_chunks, value_chunks: widths of the chunks, 0 for none.
    """

    source: str
    key_chunks: tuple[int, int, int]
    value_chunks: tuple[int, int]
    block_rows: int
    block_slots: int
    warps: int
    stages: int
    dot: str

    @property
    def value_width(self) -> int:
        return sum(self.key_chunks) if self.source in ("key", "unrotated") else sum(self.value_chunks)

    def constants(self, triton_kernels: Any) -> dict[str, Any]:
        """The kernel's compile-time arguments that follow from the plan."""
        kinds = {"own": "OWN", "key": "KEY", "slice": "SLICE", "unrotated": "ROTATE"}
        names = ("W0", "W1", "W2", "V0", "V1")
        widths = dict(zip(names, (*self.key_chunks, *self.value_chunks), strict=True))
        blocks = {name.replace("V", "VB").replace("W", "B"): _block(width) for name, width in widths.items()}
        return {
            "VALUE": getattr(triton_kernels, kinds[self.source]).value,
            **widths,
            **blocks,
            "BLOCK_R": self.block_rows,
            "BLOCK_N": self.block_slots,
            "DOT": getattr(triton_kernels.tl, self.dot),
            "PRECISION": "ieee" if self.dot == "float32" else "tf32",
        }


def plan_of(q: Tensor, key: Tensor, value: Tensor | None, source: str, value_dim: int | None, rotary_dim: int) -> Plan:
    """The plan of a call; it depends on shapes and dtypes alone."""
    dim = key.shape[-1]
    value_width = value.shape[-1] if source == "own" and value is not None else 0
    rows = q.shape[1] // key.shape[1] * q.shape[2]
    is_fp8 = key.dtype == torch.float8_e4m3fn
    dot = torch.float16 if is_fp8 else key.dtype
    return _plan(source, dim, value_width, value_dim or 0, rotary_dim, rows, key.dtype.itemsize, str(dot)[6:])


@functools.lru_cache(maxsize=256)
def _plan(
    source: str, dim: int, value_width: int, value_dim: int, rotary_dim: int, rows: int, itemsize: int, dot: str
) -> Plan:
    if source == "slice":
        keys: tuple[int, ...] = (value_dim, dim - value_dim)
        values: tuple[int, ...] = (value_dim,)
    elif source == "unrotated":
        keys = (rotary_dim // 2, rotary_dim // 2, dim - rotary_dim)
        values = keys[:2]
    else:
        keys = _chunks(dim)
        values = _chunks(value_width) if source == "own" else keys[:2]
    block_rows = min(64, max(16, _power_of_two(rows)))
    widest = max(dim, value_width)
    # A tile of keys and values in two to three stages fills shared memory at most.
    bytes_per_slot = (dim + value_width) * itemsize
    block_slots = 64
    while block_slots > 16 and 2 * block_slots * bytes_per_slot > 150_000:
        block_slots //= 2
    if source == "unrotated":
        block_slots = min(block_slots, 32)
    warps = 8 if widest > 256 or source == "unrotated" else 4
    padded = [(*chunks, 0, 0, 0)[:3] for chunks in (keys, values)]
    return Plan(source, padded[0], padded[1][:2], block_rows, block_slots, warps, 2, dot)  # type: ignore[arg-type]


def _chunks(dim: int) -> tuple[int, ...]:
    """The largest power of two and the rest, so that little of a tile is padding."""
    first = 1 << (dim.bit_length() - 1)
    return (first, dim - first) if first < dim else (dim,)


def _block(width: int) -> int:
    return max(16, _power_of_two(width)) if width else 0


def _power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << (number - 1).bit_length()


def split_count(programs: int, slots: int, plan: Plan, device: torch.device) -> int:
    """Into how many runs each sequence is cut so that one wave of programs fills the device.

    programs: what there is without cutting. slots: the longest that a sequence may be.
    """
    wave = _multiprocessors(device) * 2
    longest = max(1, math.ceil(slots / (4 * plan.block_slots)))
    return max(1, min(wave // programs, longest))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def kernels() -> Any:
    """The module of the Triton kernels, or None where triton is not installed."""
    try:
        # By name: code that travels with a checkpoint runs where triton may be missing, and goes without kernels.
        return importlib.import_module("multimatrix.ops.decode_kernels")
    except ImportError:
        return None
