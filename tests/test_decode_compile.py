"""The decode kernels compile for Hopper and Ampere, on a machine without a GPU: shared memory, spills, instructions.

`PYTHONPATH=src python tests/test_decode_compile.py` prints what they use now, as SPILLED is written.
"""

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from decode_cases import Case
from decode_compile import compiled, launches_of

assert os.environ.get("TRITON_INTERPRET") != "1", "the compiler cannot share a process with Triton's interpreter"

# Bytes of shared memory that a block may have.
SHARED = {90: 232_448, 80: 166_912}
# Bytes that a thread may keep in local memory, where it is more than SLACK: what is compiled now, and a tenth of it.
SLACK = 64
SPILLED = {
    "sm90-unrotated-192-rows64-bf16": 136,
    "sm90-unrotated-512-rows64-bf16": 552,
    "sm90-partly-256-rows64-bf16": 312,
    "sm90-own-512-rows64-fp8": 584,
    "sm90-key-512-rows64-fp8": 264,
    "sm90-unrotated-192-rows64-fp8": 112,
    "sm90-unrotated-512-rows64-fp8": 648,
    "sm90-slice-576-rows64-fp8": 312,
    "sm90-partly-256-rows64-fp8": 128,
    "sm90-unrotated-512-rows16-fp8": 136,
    "sm80-unrotated-256-rows64-bf16": 408,
    "sm80-unrotated-512-rows64-bf16": 5296,
    "sm80-partly-256-rows64-bf16": 280,
    "sm90-own-all-asked-fp8": 104,
}  # fmt: skip

SMALL = Case(B=1, S=64, N=64, dtype=torch.bfloat16, splits=2)
TUNED = {
    **{
        f"{source}-{D}": replace(SMALL, source=source, D=D)
        for source in ("own", "key", "unrotated")
        for D in (64, 128, 192, 256, 512)
    },
    "slice-576": replace(SMALL, source="slice", D=576, V=512),
    "partly-256": replace(SMALL, source="unrotated", D=256, R=64),
}
ALL_ASKED = replace(SMALL, B=2, T=3, N=40, G=2, D=128, mask="left", alibi=True, window=9, sinks=True)
CASES = {
    # 64 rows stand for 128 too, which are two blocks of 64.
    **{f"sm90-{name}-rows64-bf16": case for name, case in TUNED.items()},
    **{f"sm90-{name}-rows64-fp8": replace(case, fp8="token") for name, case in TUNED.items()},
    **{f"sm90-{name}-rows16-bf16": replace(case, N=16) for name, case in TUNED.items() if case.D in (128, 256, 576)},
    **{f"sm90-{name}-rows16-fp8": replace(case, N=16, fp8="tensor") for name, case in TUNED.items() if case.D == 512},
    **{f"sm80-{name}-rows64-f16": replace(case, dtype=torch.float16) for name, case in TUNED.items() if case.D == 128},
    **{f"sm80-{name}-rows64-bf16": case for name, case in TUNED.items() if case.D in (256, 512, 576)},
    **{
        f"sm90-{source}-all-asked-bf16": replace(ALL_ASKED, source=source, V=V, page=16)
        for source, V in (("own", 64), ("key", None), ("slice", 64), ("unrotated", None))
    },
    "sm90-own-all-asked-fp8": replace(ALL_ASKED, fp8="token", page=64, splits=1),
    "sm80-unrotated-all-asked-bf16": replace(ALL_ASKED, source="unrotated", page=16),
    "sm90-own-many-splits-bf16": replace(SMALL, D=256, splits=132),
    "sm90-own-pages-fp8": replace(SMALL, B=2, T=3, N=40, G=2, D=128, V=64, page=16, fp8="tensor"),
    "sm90-unrotated-pages-bf16": replace(SMALL, source="unrotated", B=2, T=3, N=40, G=2, D=128, page=64, splits=1),
}
# Those that the kernel in Gluon takes.
PIPELINED = {
    *(f"sm90-unrotated-{D}-rows64-bf16" for D in (64, 128, 256)),
    *(f"sm90-unrotated-{D}-rows16-bf16" for D in (128, 256)),
    *(f"sm90-{source}-{D}-rows64-fp8" for source in ("own", "key") for D in (64, 128, 256)),
    "sm90-own-pages-fp8",
    "sm90-unrotated-pages-bf16",
}
# The widest that are taken, which need only run.
WIDEST = {
    f"{source}-{name}": replace(
        SMALL, source=source, D=512 if source == "unrotated" else 576, V=512 if source == "slice" else None, dtype=dtype
    )
    for source in ("own", "key", "slice", "unrotated")
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32))
    if name == "bf16" or source in ("own", "unrotated")
}


def binaries(name, case):
    capability = int(name[2:4])
    return {
        kernel.__name__: compiled(kernel, arguments, options, capability)
        for kernel, arguments, options in launches_of(case, capability)
    }


@pytest.mark.parametrize("name", CASES)
def test_compiles(name):
    case = CASES[name]
    kernels = binaries(name, case)
    first = "pipeline_kernel" if name in PIPELINED else "split_kernel"
    assert set(kernels) == {first, "combine_kernel"} if case.splits > 1 else {first}
    split = kernels.pop(first)
    assert split.shared <= SHARED[int(name[2:4])], split
    assert split.spilled <= SPILLED.get(name, SLACK), split
    if name.startswith("sm90") and case.N // case.G * case.T >= 64:
        assert "wgmma.mma_async" in split.ptx
        assert "mma.sync" not in split.ptx
    if name in PIPELINED:
        # Where a product in flight is touched, the assembler waits after each.
        assert split.waits < split.products / 2, split
    for combine in kernels.values():
        assert combine.spilled == 0, combine
        assert combine.shared <= 65_536, combine


@pytest.mark.parametrize("name", WIDEST)
def test_the_widest_fit(name):
    split = binaries("sm90-" + name, WIDEST[name])["split_kernel"]
    assert split.shared <= SHARED[90], split


if __name__ == "__main__":
    print(f"# {'shape':38} {'registers':>9} {'spilled':>8} {'shared':>8}")
    bounds = []
    for name, case in CASES.items():
        for kernel, binary in binaries(name, case).items():
            print(f"# {name:38} {binary.registers:9} {binary.spilled:8} {binary.shared:8} {kernel}", flush=True)
            if kernel != "combine_kernel" and binary.spilled > SLACK:
                bounds.append(f'    "{name}": {-(-binary.spilled * 11 // 80) * 8},')
    print("SPILLED = {", *bounds, "}  # fmt: skip", sep="\n")
