"""How a decode call is cut into tiles and programs; it follows from shapes and dtypes alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokens. A shorter run spends more on its partial result than on its part of the cache.
SHORTEST_RUN = 256
# Bytes that a program may have on Hopper.
SHARED_MEMORY = 232_448


@dataclass(frozen=True)
class Plan:
    """How a call is cut: columns of key and value, rows and slots of a tile, warps and stages of the pipeline.

    key_chunks, value_chunks: widths of the chunks, 0 for none. waves: programs for every multiprocessor. is_fp8: the
    cache is e4m3. is_pipeline: the kernel is that of `decode_pipeline`. has_pairs: scores are products in e4m3, of the
    query as a sum of two. query: dtype of the query. dot, score, turn: dtypes of the products with values and with
    keys, and of the rotation of keys.
    """

    source: str
    key_chunks: tuple[int, int, int]
    value_chunks: tuple[int, int]
    block_rows: int
    block_slots: int
    warps: int
    stages: int
    waves: int
    is_fp8: bool
    is_pipeline: bool
    has_pairs: bool
    query: str
    dot: str
    score: str
    turn: str

    @property
    def value_width(self) -> int:
        return sum(self.key_chunks) if self.source in ("key", "unrotated") else sum(self.value_chunks)

    @property
    def turned_slots(self) -> int:
        """Slots that one row of the table of rotations serves."""
        return min(32, self.block_slots)

    def kind(self, triton_kernels: Any) -> int:
        """The kernels' number of where values are read."""
        kinds = {"own": "OWN", "key": "KEY", "slice": "SLICE", "unrotated": "ROTATE"}
        return getattr(triton_kernels, kinds[self.source]).value

    def constants(self, triton_kernels: Any) -> dict[str, Any]:
        """The kernel's compile-time arguments that follow from the plan."""
        names = ("W0", "W1", "W2", "V0", "V1")
        widths = dict(zip(names, (*self.key_chunks, *self.value_chunks), strict=True))
        blocks = {name.replace("V", "VB").replace("W", "B"): block_width(width) for name, width in widths.items()}
        if self.is_fp8:
            # Products in e4m3 are 32 columns deep; Triton 3.6 miscompiles values that are converted in tiles of 32.
            narrowest = {"B": 32, "VB": 64 if self.source == "own" else 32}
            blocks = {name: width and max(width, narrowest[name[:-1]]) for name, width in blocks.items()}
        return {
            "VALUE": self.kind(triton_kernels),
            **widths,
            **blocks,
            "BLOCK_R": self.block_rows,
            "BLOCK_N": self.block_slots,
            "DOT": getattr(triton_kernels.tl, self.dot),
            "SCORE": getattr(triton_kernels.tl, self.score),
            "TURN": getattr(triton_kernels.tl, self.turn),
            "CARRIED": self.has_pairs or self.score != self.query,
            "PAIR": self.has_pairs,
            "PRECISION": "ieee" if self.dot == "float32" else "tf32",
        }


def plan_of(
    q: Tensor,
    key: Tensor,
    value: Tensor | None,
    source: str,
    value_dim: int | None,
    rotary_dim: int,
    is_plain: bool,
) -> Plan:
    """The plan of a call; it depends on shapes, strides and dtypes alone.

    is_plain: neither a mask nor a window, biases nor sinks are asked for.
    """
    dim = key.shape[-1]
    value_width = value.shape[-1] if source == "own" and value is not None else 0
    rows = q.shape[1] // key.shape[1] * q.shape[2]
    is_fp8 = key.dtype == torch.float8_e4m3fn
    dot = torch.float16 if is_fp8 else key.dtype
    sizes = (source, dim, value_width, value_dim or 0, rotary_dim, rows, key.dtype.itemsize)
    plan = make_plan(*sizes, str(dot)[6:], str(q.dtype)[6:])
    if is_plain and has_pipeline(q.device) and all(_is_aligned(t) for t in (key, value) if t is not None):
        return make_pipeline_plan(plan, dim, value_width, rotary_dim, key.dtype.itemsize)
    return plan


def make_pipeline_plan(plan: Plan, dim: int, value_width: int, rotary_dim: int, itemsize: int) -> Plan:
    """The plan of `decode_pipeline` where that kernel takes these sizes and is faster, else `plan` itself."""
    slots, converted = 64, 2
    widths = [dim, value_width] if value_width else [dim]
    is_turned = plan.source == "unrotated" and rotary_dim == dim and itemsize == 2
    is_converted = plan.has_pairs and plan.source in ("own", "key")
    if not (is_turned or is_converted) or any(width not in (64, 128, 256) for width in widths):
        return plan
    # The query, tiles in half precision, barriers and tables; then as many tiles as have room.
    used = 64 * dim * 2 + converted * slots * widths[-1] * 2 + 4096
    stages = min(4, (SHARED_MEMORY - used) // (slots * sum(widths) * itemsize))
    return dataclasses.replace(
        plan, is_pipeline=True, block_rows=64, block_slots=slots, warps=4, stages=stages, waves=1
    )


@functools.cache
def has_pipeline(device: torch.device) -> bool:
    """Whether the kernel in Gluon runs there: it is written for Hopper."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return importlib.util.find_spec("triton.experimental.gluon") is not None


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every row of elements can be copied 16 bytes at a time, as the compiler can tell."""
    return tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in tensor.stride()[:-1])


@functools.lru_cache(maxsize=256)
def make_plan(
    source: str,
    dim: int,
    value_width: int,
    value_dim: int,
    rotary_dim: int,
    rows: int,
    itemsize: int,
    dot: str,
    query: str,
) -> Plan:
    """The plan for these sizes; the numbers were measured, see results/decode-h200.md.

    dim, value_width: of the tensors in the cache, the second 0 where there is one tensor. rows: query heads of a key
    head times new tokens. itemsize: bytes of a cached element. dot: dtype of the matrix products. query: of the query.
    """
    if source == "slice":
        keys: tuple[int, ...] = (value_dim, dim - value_dim)
        values: tuple[int, ...] = (value_dim,)
    elif source == "unrotated":
        keys = (rotary_dim // 2, rotary_dim // 2, dim - rotary_dim)
        values = keys[:2]
    else:
        keys = _chunks(dim)
        values = _chunks(value_width) if source == "own" else keys[:2]
    bytes_per_slot = (dim + value_width) * itemsize
    widest = max(dim, value_width)
    if widest > 256:
        # Outputs this wide need the registers of eight warps, and their tiles leave room for two stages.
        warps, stages, waves, tile = 8, 2, 1, 65_536
    elif itemsize == 1:
        # Two programs a multiprocessor: one converts while the other multiplies.
        warps, stages, waves, tile = 4, 3, 2, 16_384
    elif source == "unrotated":
        warps, stages, waves, tile = 4, 3, 2, 16_384
    else:
        warps, stages, waves, tile = 8 if rows > 64 else 4, 3, 1, 32_768
    if itemsize == 4:
        tile //= 2  # products in float32 keep copies of both operands
    block_slots = max(16, min(64, power_of_two(tile // bytes_per_slot + 1) // 2))
    return Plan(
        source=source,
        key_chunks=(*keys, 0, 0)[:3],  # type: ignore[arg-type]
        value_chunks=(*values, 0)[:2],  # type: ignore[arg-type]
        # Four warps hold the outputs of 64 rows. Eight hold those of 128, unless they are wide.
        block_rows=min(128 if warps == 8 and widest <= 256 else 64, max(16, power_of_two(rows))),
        # The rotation within a tile stays in registers.
        block_slots=min(32, block_slots) if source == "unrotated" else block_slots,
        warps=warps,
        stages=stages,
        waves=waves,
        is_fp8=itemsize == 1,
        is_pipeline=False,
        # Exact where the query has 8 bits; keys that are turned are converted anyway.
        has_pairs=itemsize == 1 and query == "bfloat16" and source != "unrotated",
        query=query,
        dot=dot,
        # A turned key is rounded once, to 11 bits in half precision, and half precision is computed in pairs.
        score="float16" if source == "unrotated" and dot == "bfloat16" else dot,
        turn="float32" if dot == "float32" else "float16",
    )


def _chunks(dim: int) -> tuple[int, ...]:
    """The largest power of two and the rest, so that little of a tile is padding."""
    first = 1 << (dim.bit_length() - 1)
    return (first, dim - first) if first < dim else (dim,)


def block_width(width: int) -> int:
    """Columns that a chunk of this width takes."""
    return max(16, power_of_two(width)) if width else 0


def power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << (number - 1).bit_length()


def split_count(programs: int, slots: int, plan: Plan, device: torch.device) -> int:
    """Into how many runs each sequence is cut, so that the programs fill the device once and none is very short.

    programs: what there is without cutting. slots: the longest that a sequence may be.
    """
    wave = _multiprocessors(device) * plan.waves
    return max(1, min(wave // programs, slots // SHORTEST_RUN))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
