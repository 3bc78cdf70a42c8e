"""Run folders: which settings they were made with, and that nobody else's are mixed in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multimatrix.errors import InputError

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
RUN_LOCK = "run.lock"  # held by whoever trains in the folder


def check_free(out: Path, what: str) -> None:
    """InputError unless a folder can begin at `out`; what: a comparison, for example, of which it has no config."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another --out")
    if out.exists() and any(path.suffix != ".lock" for path in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no {what} of ours; choose another --out")


def read_ours(path: Path, keys: Sequence[str], writer: str, way_out: str) -> dict[str, Any]:
    """What `multimatrix writer` stored in `path`; InputError where it is damaged or somebody else's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or any(key not in found for key in keys):
        raise InputError(f"{path} is damaged, or was not written by multimatrix {writer}; {way_out}")
    return found


def refuse_difference(
    directory: Path, found: dict[str, Any], wanted: dict[str, Any], this: str, within: str = ""
) -> None:
    """InputError that names the first setting in which two configurations differ; this: of what it is one."""
    for name in dict.fromkeys([*wanted, *found]):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            refuse_difference(directory, old, new, this, f"{within}{name}.")
        elif old != new:
            raise InputError(
                f"{directory} was made with {within}{name} = {old} and this {this} has {new}; "
                "choose another --out or the same settings"
            )
