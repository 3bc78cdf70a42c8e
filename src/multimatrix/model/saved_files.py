"""What the folder of a saved model holds: a table of its tensors, of which none is loaded.

A safetensors file is eight bytes of header length, a JSON header that states dtype, shape and byte range of every
tensor, and the bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from multimatrix.errors import InputError, one_line
from multimatrix.files import CONFIG, read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What weights may be stored as, in safetensors' words.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its dtype in safetensors' word ("F32"), its shape, and its bytes from `start` to `end`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
        InputError: there is neither or both, a shard is missing, the index is not true, or a file is cut or damaged.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file() and index.is_file():
        raise InputError(f"{folder} has both {WEIGHTS} and {INDEX}; keep the one that is current")
    if single.is_file():
        return _tensors(single)
    if not index.is_file():
        if pickled := sorted(folder.glob("pytorch_model*.bin")):
            raise InputError(
                f"{folder} holds {pickled[0].name}, and only safetensors are read; save it with save_pretrained again"
            )
        raise InputError(f"{folder} has neither {WEIGHTS} nor {INDEX}; give the folder of a saved model")
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not all(_is_file_name(shard) for shard in placed.values()):
        raise InputError(f"{index} has no weight_map from tensors to files beside it; save or copy the model again")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(placed.values())):
        if not (folder / shard).is_file():
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


def check_tensors(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
) -> None:
    """InputError where `stored`, of `folder`, are not the tensors of these names and shapes, or are no floats.

    optional: names of expected ones that may be absent.
    """
    differences = [
        f"{name} is {list(stored[name].shape)} in {stored[name].file.name} and {list(shape)} by {CONFIG}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    differences += [
        f"{name} is in no file and {list(shape)} by {CONFIG}"
        for name, shape in expected.items()
        if name not in stored and name not in optional
    ]
    differences += [
        f"{name} is {list(tensor.shape)} in {tensor.file.name} and not in the model of {CONFIG}"
        for name, tensor in stored.items()
        if name not in expected
    ]
    if differences:
        first, *others = differences
        more = f" ({len(others)} more {'tensor differs' if len(others) == 1 else 'tensors differ'})" if others else ""
        raise InputError(
            f"{folder} holds weights that do not fit its {CONFIG}: {first}{more}; give both of one saved model"
        )
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"{folder} holds weights that are no floats: {name} is stored as {tensor.dtype} in {tensor.file.name}; "
                f"undo the quantization, or save it as one of {', '.join(DTYPES)}"
            )


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name != "" and Path(name).name == name


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """Tensor name -> where in this file; safetensors itself says whether the file is whole."""
    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is cut short or damaged: {_damage(path, error)}; save or copy it again") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    begin = 8 + length
    return {
        name: StoredTensor(path, about["dtype"], tuple(about["shape"]), *(begin + at for at in about["data_offsets"]))
        for name, about in header.items()
        if name != "__metadata__"
    }


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that safetensors refuses, in bytes: 8 for the header's length, the header, the data."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            announced = int.from_bytes(file.read(8), "little")
            if size < 8 + announced:
                return f"it has {size:,} bytes, and its header alone needs {8 + announced:,}"
            header = file.read(announced)
    except OSError as unreadable:
        return one_line(unreadable)
    try:
        tensors = {name: about for name, about in json.loads(header).items() if name != "__metadata__"}
        needed = 8 + announced + max((about["data_offsets"][1] for about in tensors.values()), default=0)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        return f"its header is no table of tensors ({one_line(error)})"
    return one_line(error) if needed == size else f"it has {size:,} bytes, and its tensors need {needed:,}"
