"""The read bandwidth of a card: a Triton kernel that reads every number once and keeps only sums."""

from __future__ import annotations

import functools
import statistics

import torch
import triton
import triton.language as tl

from timing import back_to_back

ELEMENTS = 1 << 29  # int32: 2 GiB, forty times the L2 cache of an H100
BLOCKS = ((2048, 4), (4096, 4), (8192, 4), (8192, 8), (16384, 8), (16384, 16))  # elements, warps
PROGRAMS = (2, 4, 8, 16, 32, None)  # a multiprocessor; None for one block a program
REPEATS = 7


@triton.jit
def read_kernel(source, sums, blocks, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        total += tl.load(source + block * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read_bandwidth(device: torch.device, generator: torch.Generator, elements: int = ELEMENTS) -> float:
    """Bytes per second of the best grid and block size, by the median of its launches.

    Raises:
        RuntimeError: a sum is wrong, so not every byte was read.
    """
    source = torch.randint(-(2**31), 2**31, (elements,), dtype=torch.int32, device=device, generator=generator)
    expected = source.sum().item()
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    best = 0.0
    for block, warps in BLOCKS:
        blocks = elements // block
        for programs in PROGRAMS:
            grid = blocks if programs is None else min(blocks, programs * multiprocessors)
            sums = torch.zeros(grid, dtype=torch.int32, device=device)
            launch = functools.partial(read_kernel[(grid,)], source, sums, blocks, BLOCK=block, num_warps=warps)
            us = statistics.median(back_to_back(launch, REPEATS))
            if (sums.sum().item() - expected) % 2**32:
                raise RuntimeError(f"reading by blocks of {block} in a grid of {grid} gives a wrong sum")
            best = max(best, source.nbytes / (us * 1e-6))
    return best
