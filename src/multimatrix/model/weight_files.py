"""What a folder's safetensors files hold, read from their headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from multimatrix.errors import InputError, one_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its shape, its dtype by the name safetensors gives it ("F32"), and the file's name."""

    shape: tuple[int, ...]
    dtype: str
    file: str


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
        InputError: no such file, a shard missing, an index that is not true, or a file that is cut or damaged.
    """
    if (folder / WEIGHTS).is_file():
        return _tensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        other = next(
            (path.name for path in sorted(folder.glob("*.bin")) if path.name.startswith("pytorch_model")), None
        )
        if other:
            raise InputError(
                f"{folder} holds {other}, and only safetensors are read; save it with save_pretrained again"
            )
        raise InputError(f"{folder} has neither {WEIGHTS} nor {INDEX}; give the folder of a saved multimatrix model")
    placed = read_object(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(shard, str) for shard in placed.values()):
        raise InputError(f"{folder / INDEX} has no weight_map from tensors to files; save or copy the model again")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(placed.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise InputError(f"{folder} lacks {shard}, a shard that its {INDEX} names; copy the model again")
        tensors = _tensors(folder / shard)
        for name in tensors:
            if placed.get(name) != shard:
                where = f"places it in {placed[name]}" if name in placed else "does not list it"
                raise InputError(f"{folder / shard} holds {name} and {INDEX} {where}; save or copy the model again")
        found |= tensors
    for name, shard in placed.items():
        if name not in found:
            raise InputError(
                f"{folder / shard} has no {name}, which {INDEX} places there; save or copy the model again"
            )
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError where it is anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {one_line(error)}; save or copy the model again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a JSON {type(found).__name__}, not an object; save or copy the model again")
    return found


def _tensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: StoredTensor(tuple(s.get_shape()), s.get_dtype(), path.name) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is cut short or damaged: {_damage(path, error)}; save or copy it again") from error


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that safetensors refuses, in bytes: 8 for the header's length, the header, the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        announced = int.from_bytes(file.read(8), "little")
        if size < 8 + announced:
            return f"it has {size:,} bytes, and its header alone needs {8 + announced:,}"
        header = file.read(announced)
    try:
        tensors = {name: about for name, about in json.loads(header).items() if name != "__metadata__"}
        needed = 8 + announced + max((about["data_offsets"][1] for about in tensors.values()), default=0)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        return f"its header is no table of tensors ({one_line(error)})"
    return one_line(error) if needed == size else f"it has {size:,} bytes, and its tensors need {needed:,}"
