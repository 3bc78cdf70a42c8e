"""Where a number came from: command, commit, versions, machine."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from multimatrix import __version__


def environment(device: torch.device) -> dict[str, Any]:
    """Where a number came from."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "multimatrix": __version__,
        "torch": str(torch.__version__),  # with the build, which the package's metadata may leave out
        **{name: metadata.version(name) for name in ("transformers", "accelerate")},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def command_line() -> str:
    """The command that is running, as it can be pasted into a shell."""
    return shlex.join(["multimatrix", *sys.argv[1:]])


def commit() -> str | None:
    """Commit of the checkout this package runs from, `+changes` where it is not clean; None outside a checkout."""
    here = Path(__file__).parent
    if shutil.which("git") is None:
        return None
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    tracked = subprocess.run(
        ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, check=False
    )
    if head.returncode or tracked.returncode:
        return None
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
