"""Compiles what `decode_attention` would launch for a GPU that need not be there, and reads what the binary uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import JITFunction

from decode_cases import Case, make_call
from multimatrix.ops import decode, decode_launch, decode_plan

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.bool: "i1",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Binary:
    """registers: of a thread. spilled: bytes of a thread in local memory. shared: bytes of a block. products, waits: of
    Hopper's matrix unit, instructions that start one and that wait for some."""

    registers: int
    spilled: int
    shared: int
    products: int
    waits: int
    ptx: str = field(repr=False)


class Recorder:
    """The module of the kernels, which notes launches instead of making them."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.launches: list[tuple[JITFunction, tuple, dict]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        return _Launcher(found, self.launches) if isinstance(found, JITFunction) else found


@dataclass
class _Launcher:
    kernel: JITFunction
    launches: list

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.launches.append((self.kernel, arguments, options))


def launches_of(case: Case, capability: int) -> list[tuple[JITFunction, tuple, dict]]:
    """What a call of this case launches on such a GPU; nothing is launched."""
    recorder, gluon_recorder = Recorder(decode_launch.kernels()), Recorder(decode_launch.pipeline())
    gluon_recorder.launches = recorder.launches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_launch, "kernels", lambda: recorder)
        patch.setattr(decode_launch, "pipeline", lambda: gluon_recorder)
        patch.setattr(decode_plan, "has_pipeline", lambda device: capability == 90)
        patch.setattr(decode_launch, "_can_launch_early", lambda device: capability >= 90)
        patch.setattr(decode, "why_not", lambda *arguments, **options: None)
        call = make_call(case)
        decode.decode_attention(*call.arguments, **call.options, num_splits=case.splits)
    return recorder.launches


def compiled(kernel: JITFunction, arguments: tuple, options: dict[str, Any], capability: int) -> Binary:
    """A launch compiled as at run time, where whole numbers that are 1 are constants and multiples of 16 are known."""
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, signature, constexprs=constants, attrs=attributes)
    names = ("num_warps", "num_stages", "launch_pdl", "maxnreg")
    chosen = {name: options[name] for name in names if name in options}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [CUOBJDUMP, "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    products, waits = len(re.findall(r"[HQ]GMMA", code)), code.count("WARPGROUP.DEPBAR")
    return Binary(registers, stack + local, binary.metadata.shared, products, waits, binary.asm["ptx"])
