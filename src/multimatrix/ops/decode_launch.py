"""The launches of the decode kernels."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multimatrix.ops.decode_plan import Plan, power_of_two


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
    batch, heads, tokens, _ = q.shape
    groups, page = key.shape[1], 0 if block_table is None else key.shape[2]
    rows = heads // groups * tokens
    blocks = -(-rows // plan.block_rows)
    (origin, local), (key_scale, value_scale) = tables, scales
    direct = num_splits == 1
    width = plan.value_width
    out = q.new_empty(batch, heads, tokens, width)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    early = _can_launch_early(q.device)
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
    grid = (num_splits, groups * blocks, batch)
    both = {
        "query": q,
        "key": key,
        "value": value,
        "out": part,
        "lse": part_lse,
        "lengths": lengths if lengths is not None else lse,
        "length": length,
        "table": block_table if block_table is not None else lse,
        "key_scale": key_scale if key_scale is not None else lse,
        "value_scale": value_scale if value_scale is not None else lse,
        "origin": origin if origin is not None else lse,
        "local": local if local is not None else lse,
        "scale": scale,
        **_strides("q", "bnt", q.stride()),
        **_strides("k", "bgs", key.stride()),
        **_strides("v", "bgs", value.stride()),
        **_strides("o", "bnt", out.stride()),
        "stride_lb": 0 if lengths is None or lengths.numel() == 1 else lengths.stride(0),
        "stride_tb": 0 if block_table is None else block_table.stride(0),
        **_strides("s", "bgs", scale_strides),
        "heads": heads // groups,
        "tokens": tokens,
        "groups": groups,
        "num_splits": num_splits,
        "PAGE": page,
        "DIRECT": direct,
        "HAS_LENGTHS": lengths is not None,
        "CAUSAL": tokens > 1,
        "EARLY": early and not direct,
        "SCALES": 0 if key_scale is None else 1 if key_scale.dim() == 1 else 2,
    }
    if plan.is_pipeline:
        pipeline().pipeline_kernel[grid](
            **both,
            VALUE=plan.kind(triton_kernels),
            DIM=key.shape[-1],
            VALUE_DIM=value.shape[-1],
            BLOCK_N=plan.block_slots,
            STAGES=plan.stages,
            num_warps=plan.warps,
            maxnreg=pipeline().REGISTERS,
        )
    else:
        triton_kernels.split_kernel[grid](
            **both,
            mask=mask if mask is not None else lse,
            slopes=slopes if slopes is not None else lse,
            sinks=sinks if sinks is not None else lse,
            **_strides("m", "bt", mask_strides),
            window=window or 0,
            **plan.constants(triton_kernels),
            HAS_MASK=mask is not None,
            HAS_SLOPES=slopes is not None,
            HAS_SINKS=sinks is not None,
            HAS_WINDOW=window is not None,
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
    if not direct:
        # Tiles of about 8,192 numbers: wide where there are few splits, narrow where there are many.
        block_splits, block_width = power_of_two(num_splits), power_of_two(width)
        block_width = min(block_width, max(32, 8192 // block_splits))
        block_rows = min(power_of_two(rows), max(1, 8192 // (block_splits * block_width)))
        triton_kernels.combine_kernel[(-(-rows // block_rows), -(-width // block_width), batch * groups)](
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
            BLOCK_S=block_splits,
            BLOCK_R=block_rows,
            BLOCK_V=block_width,
            HAS_SINKS=sinks is not None,
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )
    return out, lse


def _strides(tensor: str, axes: str, strides: Sequence[int]) -> dict[str, int]:
    """The kernels' names of a tensor's strides."""
    return {f"stride_{tensor}{axis}": stride for axis, stride in zip(axes, strides, strict=False)}


@functools.cache
def _can_launch_early(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one it waits for has ended."""
    return (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and kernels().gdc_wait is not None
    )


@functools.cache
def kernels() -> Any:
    """The module of the Triton kernels."""
    # By name: code that travels with a checkpoint runs where triton may be missing, and goes without kernels.
    return importlib.import_module("multimatrix.ops.decode_kernels")


@functools.cache
def pipeline() -> Any:
    """The module of the kernel in Gluon, for Hopper."""
    return importlib.import_module("multimatrix.ops.decode_pipeline")
