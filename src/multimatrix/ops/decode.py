"""Decoding attention over a long cache: one signature, a Triton kernel and its plain twin.

    o = softmax(scale * q . K + bias) V        for 1 to 8 new queries a sequence, causal among themselves

The value is a tensor of its own, the cached key itself, its leading slice, or the key before rotation; see
`attention.gmha.ValueSource`. The cache is contiguous, with a length per sequence, or paged. `decode_attention` runs the
kernel, `plain_decode_attention` says in torch what it computes.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multimatrix.ops.decode_launch import launch
from multimatrix.ops.decode_plan import block_width, plan_of, split_count
from multimatrix.ops.rotary import SlotRotation

if TYPE_CHECKING:
    from multimatrix.attention.gmha import ValueSource

MAX_TOKENS = 8


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
    if window is not None:
        inside = inside & (n > lengths[:, None] - tokens - window)
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
    # Heads of a group are rows of one product, so that no key is copied for each of them.
    rows = q.to(precision).unflatten(1, (groups, -1)).flatten(2, 3)  # [B, G, N / G * T, D]
    scores = (rows @ keys.transpose(-1, -2)).unflatten(2, (-1, tokens)).flatten(1, 2) * scale  # [B, N, T, S]
    if slopes is not None:
        scores = scores + slopes.to(precision)[:, None, None] * (n - position[..., None])[:, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.to(precision)[None, :, None, None].expand(batch, -1, tokens, 1)
        scores = torch.cat((scores, sink), dim=-1)
    lse = scores.logsumexp(-1)  # [B, N, T]
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()[..., :slots]
    o = weights.unflatten(1, (groups, -1)).flatten(2, 3) @ values  # [B, G, N / G * T, V]
    o = o.unflatten(2, (-1, tokens)).flatten(1, 2)  # [B, N, T, V]
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
    if source == "slice" and value_dim is None:
        return "a slice needs value_dim"
    dims = [q.shape[-1], value.shape[-1] if source == "own" and value is not None else q.shape[-1]]
    if value_dim is not None and source == "slice":
        dims.append(value_dim)
    if q.device.type != "cuda" and not IS_INTERPRETED:
        return "it runs on a GPU"
    if not HAS_KERNELS:
        return "triton or multimatrix is not installed"
    if not 1 <= q.shape[2] <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} new tokens, not {q.shape[2]}"
    if q.shape[1] % key.shape[1]:
        return f"{q.shape[1]} query heads cannot be shared by {key.shape[1]} key heads"
    if q.shape[-1] != key.shape[-1]:
        return f"queries have {q.shape[-1]} elements and keys {key.shape[-1]}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, key, value)):
        return "it has no gradient"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does not compute in {q.dtype}"
    if any(dim % 16 or dim > 576 for dim in dims):
        return "its head dims are multiples of 16 up to 576"
    if source == "unrotated":
        if rotation is None or rotation.blocks != 1 or rotation.dim % 32:
            return "it rotates one block of a multiple of 32"
        if 2 * block_width(rotation.dim // 2) + block_width(q.shape[-1] - rotation.dim) > 576:
            return "half of the rotated part, and the rest, are padded to powers of two, 576 columns at most in all"
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1 or mask.stride(-1) != 1):
        return "it takes boolean masks that all heads share"
    if mask is not None and mask.shape[2] != q.shape[2]:
        return f"a mask has a row for each of the {q.shape[2]} new tokens, not {mask.shape[2]}"
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
    if scales is not None and scales[0].stride() != scales[1].stride():
        raise ValueError(
            f"scales of key and value lie at strides {scales[0].stride()} and {scales[1].stride()}, not alike"
        )
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
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
    is_plain = mask is None and slopes is None and window is None and sinks is None
    plan = plan_of(q, key, value, source, value_dim, 0 if turn is None else turn.dim, is_plain)
    slots = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    tables: tuple[Tensor | None, Tensor | None] = (None, None)
    if turn is not None:
        whole_tiles = -(-slots // plan.block_slots) * plan.block_slots
        tables = turn.tiles(plan.turned_slots, whole_tiles, q.device)
    if num_splits is None:
        rows = q.shape[1] // key.shape[1] * q.shape[2]
        programs = q.shape[0] * key.shape[1] * -(-rows // plan.block_rows)
        num_splits = split_count(programs, slots, plan, q.device)
    scales = (key_scale, value_scale)
    with torch.cuda.device_of(q):  # Triton launches on the current device
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


@_decode_op.register_fake
def _(q: Tensor, key: Tensor, value: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    source, value_dim = rest[3], rest[4]
    width = (
        value.shape[-1] if source == "own" and value is not None else value_dim if source == "slice" else key.shape[-1]
    )
    return q.new_empty(*q.shape[:3], width), q.new_empty(q.shape[:3], dtype=torch.float32)


def _are_installed() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("triton", "multimatrix"))
    except ImportError:
        return False


# Known before a compiler traces anything; triton itself is imported when a kernel is first launched.
HAS_KERNELS = _are_installed()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
